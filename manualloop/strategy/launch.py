"""``launch``: start a function in several processes, from a notebook or a script."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from manualloop.errors import ConfigError, DistributedError
from manualloop.internals import was_accelerator_made


def num_launched() -> int:
    """Return how many processes the launcher of this one has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Tell whether accelerate's launcher, torchrun or a similar one has started this process."""
    # accelerate launch always sets this variable, also for a single process.
    return "ACCELERATE_MIXED_PRECISION" in os.environ or num_launched() > 1


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    num_processes: int | None = None,
    mixed_precision: str | None = None,
    use_port: int | str | None = None,
) -> None:
    """Run a function in several processes that train together; return when all have ended.

    This is accelerate's launcher for notebooks. The processes are forked, so the function may be
    defined in a notebook and may use what was loaded before. It must build model and data itself,
    or use those that are still on the CPU, and save its results: its return value is lost. Inside
    of it everything is as under ``accelerate launch``, with one thread per process.

    Args:
        function: The function that is called with ``*args`` in every process.
        args: The arguments of the function.
        num_processes: Number of processes. None for one per device, or 1 on a machine that has
            only a CPU, where more are possible as well.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``. None means ``"no"``.
        use_port: The port by which the processes find each other; None for a free one.

    Raises:
        ConfigError: The number of processes is below 1, or above the number of devices.
        DistributedError: A device was used before, whose state cannot be forked, or the process
            was started by a launcher itself.

    >>> launch(print, ["trained"], num_processes=1)
    trained
    """
    has_devices = torch.accelerator.is_available()
    num_devices = torch.accelerator.device_count() if has_devices else 0
    num_processes = num_devices or 1 if num_processes is None else num_processes
    if num_processes < 1 or 0 < num_devices < num_processes:
        limit = f"there are {num_devices} devices" if num_devices else "at least 1"
        raise ConfigError(f"num_processes={num_processes!r}: {limit}. Omit it to use them all.")
    if num_launched() > 1:
        raise DistributedError(
            "launch was called in a process that a launcher has started. Call the function itself, "
            "or start the script with plain python."
        )
    if num_processes == 1:
        function(*args)
        return
    _require_no_device_used()
    from accelerate import notebook_launcher
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.utils.distributed import get_free_port

    settings = {"accelerate_mixed_precision": mixed_precision or "no", "omp_num_threads": "1"}
    if not has_devices:
        settings["accelerate_use_cpu"] = "1"  # else each process would train alone
    with patch_environment(**settings):
        notebook_launcher(
            _in_one_thread,
            (function, *args),
            num_processes=num_processes,
            mixed_precision=mixed_precision or "no",
            use_port=str(use_port or get_free_port()),  # type: ignore[no-untyped-call]
        )


def _in_one_thread(function: Callable[..., Any], *args: Any) -> None:
    # OpenMP's threads do not survive a fork. If they were used before, a child that asks for
    # several of them waits forever.
    torch.set_num_threads(1)
    function(*args)


def _require_no_device_used() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise DistributedError(
            "CUDA was used in this process before launch, and its state cannot be forked. Restart "
            "the notebook, and use no GPU outside of the function: no .to('cuda'), no "
            "prepare_strategy()."
        )
    if was_accelerator_made():
        raise DistributedError(
            "An Accelerator was made in this process before launch, and the new processes would "
            "inherit it. Restart the notebook, and make it inside of the function."
        )
