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

    It is accelerate's launcher for notebooks. The processes are forked, so the function may be
    defined in a notebook, and may use what was loaded before. It must build model and data itself,
    or take what is still on the CPU, and save what it wants to leave behind: what it returns is
    lost. Inside it everything is as under ``accelerate launch``, with one thread a process.

    Args:
        function: Called with ``*args`` in every process.
        args: For it.
        num_processes: None: one for each device that is here; 1 where there is only a CPU, which
            takes several, too.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; None: ``"no"``.
        use_port: By which the processes find each other; None: a free one.

    Raises:
        ConfigError: The number of processes is below 1, or above that of the devices.
        DistributedError: A device was used before, and its state cannot be forked, or the function
            was launched already.

    >>> launch(print, ["trained"], num_processes=1)
    trained
    """
    has_devices = torch.accelerator.is_available()
    num_devices = torch.accelerator.device_count() if has_devices else 0
    num_processes = num_devices or 1 if num_processes is None else num_processes
    if num_processes < 1 or 0 < num_devices < num_processes:
        here = f"{num_devices} devices are here" if num_devices else "at least 1"
        raise ConfigError(f"num_processes={num_processes!r}: {here}. Leave it out to use them all.")
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
    # The pool of OpenMP does not outlive a fork: where it was used before, a child that asks for
    # several threads waits for ever.
    torch.set_num_threads(1)
    function(*args)


def _require_no_device_used() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise DistributedError(
            "CUDA was used in this process before launch, and what it has set up cannot be forked. "
            "Restart the notebook, and touch no GPU outside of the function: no .to('cuda'), no "
            "prepare_strategy()."
        )
    if was_accelerator_made():
        raise DistributedError(
            "An Accelerator was made in this process before launch, and the processes would take "
            "over that it is alone. Restart the notebook, and make it inside of the function."
        )
