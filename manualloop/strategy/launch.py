"""``launch``: start a function in several processes, from a notebook or a script."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, DistributedError
from manualloop.internals import was_accelerator_made


def num_launched() -> int:
    """Return how many processes the launcher of this one has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Tell whether accelerate's launcher, torchrun or a similar one has started this process."""
    # accelerate launch always sets this variable, also for a single process.
    return "ACCELERATE_MIXED_PRECISION" in os.environ or num_launched() > 1


class Tasks(NamedTuple):
    """Names of the variables by which a scheduler tells a process which of its tasks it is.

    Attributes:
        size: Number of tasks.
        rank: Number of this task.
        local_rank: Number of this task on its machine.
        local_size: Number of tasks on this machine.
    """

    size: str
    rank: str
    local_rank: str
    local_size: str


# From the inside to the outside: srun may have started the shell in which mpirun was called.
_TASKS = (
    Tasks(
        "OMPI_COMM_WORLD_SIZE",
        *(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    ),
    Tasks(
        "MV2_COMM_WORLD_SIZE",
        *(f"MV2_COMM_WORLD_{n}" for n in ("RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    ),
    Tasks("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Not SLURM_NTASKS, which a batch script has too: that is one process, whatever the job has.
    Tasks("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
)


def refuse_training_alone() -> None:
    """Refuse to train in one of several tasks that do not know of each other.

    ``srun`` and ``mpirun`` start a program several times, but do not tell it how to find the
    others, as torchrun does. A person at a terminal or in a notebook works in one of the tasks.

    Raises:
        DistributedError: The process is one of several tasks, and no launcher has given it a rank.
    """
    tasks = next((tasks for tasks in _TASKS if os.environ.get(tasks.size, "").isdigit()), None)
    if tasks is None or num_launched() > 1 or _is_interactive():
        return
    num_tasks = int(os.environ[tasks.size])
    if num_tasks <= 1 or tasks.rank not in os.environ:
        return
    is_slurm = tasks.size.startswith("SLURM")
    num_here = os.environ.get(tasks.local_size)
    if num_here == str(num_tasks) or (is_slurm and os.environ.get("SLURM_STEP_NUM_NODES") == "1"):
        address = "127.0.0.1"
    elif is_slurm:
        address = '$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)'
    else:
        address = "HOST_OF_RANK_0"
    local_rank = tasks.local_rank if tasks.local_rank in os.environ else tasks.rank
    raise DistributedError(
        f"This job has {num_tasks} tasks ({tasks.size}), and each would train alone. Let each one "
        "know its rank: put\n"
        f"    bash -c 'RANK=${tasks.rank} LOCAL_RANK=${local_rank} WORLD_SIZE=${tasks.size} "
        f'MASTER_ADDR={address} MASTER_PORT=29500 exec "$0" "$@"\'\n'
        f"before `python` in the command of {'srun' if is_slurm else 'mpirun'}, or start one "
        "torchrun on each machine. If each task is to train alone, let it name its device: "
        'strategy=prepare_strategy("cpu"), or "cuda".'
    )


def _is_interactive() -> bool:
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return True
    is_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    return "SLURM_PTY_PORT" in os.environ and is_terminal  # a shell inherits the former


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
            was started by a launcher itself, or is one of several tasks of a scheduler.

    >>> launch(print, ["trained"], num_processes=1)
    trained
    """
    check_arguments(
        "launched_precision",
        function=function,
        args=args,
        num_processes=num_processes,
        use_port=use_port,
        launched_precision=mixed_precision,
    )
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
    refuse_training_alone()
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
