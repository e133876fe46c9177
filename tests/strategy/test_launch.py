"""A process that is one of several tasks, and does not know of the others, does not train."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from manualloop import (
    DistributedError,
    accumulate_gradients,
    launch,
    prepare_strategy,
    verify_resume,
)
from manualloop.strategy.launch import refuse_training_alone

PREFIXES = ("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_")

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_NUM_NODES": "1"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_ID": "0"}
TASK = JOB | STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
ONE_TASK = JOB | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}

TASKS = {
    "srun": TASK,
    "srun with PMI-2": TASK | {"PMI_SIZE": "4", "PMI_RANK": "2"},
    "mpirun of Open MPI": OPEN_MPI,
    "mpirun of MPICH": {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "2"},
    "mpirun of MVAPICH": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"},
    "mpirun in the shell of one task": ONE_TASK | OPEN_MPI,
    "srun in the shell of one task": TASK | {"SLURM_PTY_PORT": "4711"},
    "srun of a launcher of one process": TASK | {"WORLD_SIZE": "1", "RANK": "0"},
}
HARMLESS = {
    "a batch script": JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "a shell of salloc": JOB,
    "a shell of salloc with its own step": ONE_TASK | {"SLURM_STEP_ID": "4294967290"},
    "srun with one task": ONE_TASK,
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    "mpirun -n 1 in a job": TASK | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    "srun of torchrun": TASK | {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"},
    "left over in a profile": {"PMI_SIZE": "4"},
    "no number": {"PMI_SIZE": "", "SLURM_STEP_NUM_TASKS": "many"},
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIXES) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("started_by", TASKS)
def test_a_task_of_several_is_refused(started_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASKS[started_by])
    with pytest.raises(DistributedError, match=r"4 tasks .*, and each would train alone"):
        refuse_training_alone()
    with pytest.raises(DistributedError, match="each would train alone"):
        prepare_strategy()
    assert prepare_strategy("cpu").world_size == 1  # who names a device means it


@pytest.mark.parametrize("started_by", HARMLESS)
def test_one_process_is_not_refused(started_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, HARMLESS[started_by])
    refuse_training_alone()


def test_other_ways_to_train_alone_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASK)
    with pytest.raises(DistributedError, match="train alone"):
        launch(print, num_processes=2)
    with pytest.raises(DistributedError, match="train alone"):
        accumulate_gradients(nn.Linear(1, 1), [])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with pytest.raises(DistributedError, match="train alone"):
        prepare_strategy(Accelerator(cpu=True))


def test_what_starts_processes_itself_is_refused_inside_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="verify_resume was called in one of 2 processes"):
        verify_resume(print, at=1)


def test_a_notebook_is_used_by_one_person(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASK)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    refuse_training_alone()


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
@pytest.mark.parametrize("started_by", ["srun", "mpirun of Open MPI"])
def test_the_command_in_the_message_runs(started_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASKS[started_by])
    with pytest.raises(DistributedError) as raised:
        refuse_training_alone()
    found = re.search(r"^ +(bash -c '.*')$", str(raised.value), re.MULTILINE)
    assert found is not None
    ran = subprocess.run(
        ["bash", "-c", f"{found[1]} env"], capture_output=True, text=True, check=True
    )
    seen = dict(line.partition("=")[::2] for line in ran.stdout.splitlines())
    assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == ("2", "2", "4")
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("127.0.0.1", "29500")
    set_all(monkeypatch, {name: seen[name] for name in ("RANK", "WORLD_SIZE")})
    refuse_training_alone()
