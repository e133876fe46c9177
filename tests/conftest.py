"""Every test runs offline and leaves the process as it found it."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Before any of these libraries is imported: they read it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a tensor of a few numbers, threads that wait for a busy core cost a hundred times the sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:  # the process that hands out the tests to others need not import it
    import torch

# Checkpoints are forced to the disk, and the tests make thousands: in memory that takes no time.
_MEMORY = Path("/dev/shm")
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# Imported for its doctests, the one would be everybody's device, and the other is not run at all.
collect_ignore = ["far_device.py", "typing/user_code.py", "benchmarks/mrpc_job"]

# No test depends on the machine's speed; CI runs the same examples every time.
hypothesis.settings.register_profile(
    "manualloop",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("manualloop")

# A shell starts jobs in the background with SIGINT ignored, and Python leaves that as it is.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_SET_BY_LIBRARIES = ("PYTEST_", "PYTORCH_NVML_", "KMP_", "KINETO_", "TORCHINDUCTOR_", "TRITON_")


# The files that take longest, so that none of them is left over for one process at the end.
_FIRST = (
    "distributed/test_two_ranks.py",
    "resume/test_resume.py",
    "distributed/test_faults.py",
    "strategy/test_far_device.py",
    "resume/test_resume_edges.py",
    "distributed/test_launchers.py",
    "faults/test_kills.py",
    "examples/test_notebook.py",
    "examples/test_tasks.py",
    "faults/test_signals.py",
    "parity/test_course_loop.py",
    "reading/test_sources.py",
    "faults/test_forgeries.py",
    "strategy/test_compiled.py",
    "faults/test_disk.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, each as a whole and in its own order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(_FIRST)}
    assert all(path.exists() for path in places), "rename it in _FIRST as well"
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collectstart() -> None:
    """Keep all that is imported: looking through it for garbage takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Fail if a module that was imported for its doctests has changed what all tests use."""
    import torch

    assert torch.get_default_dtype() == torch.float32
    # torch notes the stack of each call that seeds a device that is not there yet: 0.7 ms.
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        if not devices.is_available():
            devices.manual_seed_all = lambda seed: None
    gc.enable()
    gc.collect()
    gc.freeze()  # a garbage collection in a test need not look at all libraries again


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the real data sets and tokenizers."""
    folder = os.environ.get("MANUALLOOP_SHARED")
    if not folder:
        pytest.skip("MANUALLOOP_SHARED does not name the folder of the shared data sets")
    return Path(folder)


def _environment() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_SET_BY_LIBRARIES)
    }


def _forget_accelerators() -> None:
    """Let the next test make an Accelerator of other settings, which one process refuses."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Fail a test that leaves settings of the process changed; then put them back."""
    import torch

    environment, dtype = _environment(), torch.get_default_dtype()
    num_threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    logger = logging.getLogger("manualloop")
    handlers = list(logger.handlers)
    yield
    changed_names = {name for name, _ in environment.items() ^ _environment().items()}
    left = {
        f"environment variables {sorted(changed_names)}": not changed_names,
        "torch's default dtype": torch.get_default_dtype() == dtype,
        "torch's number of threads": torch.get_num_threads() == num_threads,
        "torch's grad mode": torch.is_grad_enabled() == grad,
        'handlers of the logger "manualloop"': logger.handlers == handlers,
    }
    for name in changed_names - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(grad)
    logger.handlers[:] = handlers
    _forget_accelerators()
    changed = [name for name, is_same in left.items() if not is_same]
    assert not changed, f"The test changed {', '.join(changed)} and did not put it back."


@pytest.fixture
def updates() -> Iterator[list[torch.optim.Optimizer]]:
    """The optimizer of every step that anything makes."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    made: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: made.append(optimizer))
    yield made
    hook.remove()
