"""A save in which the n-th call of the system fails, or the n-th allocation, for every n.

Whatever fails, a save ends with its checkpoint or with a CheckpointError. The older checkpoint or
the new one is whole, and the next save succeeds and leaves nothing behind.
"""

import builtins
import errno
import faulthandler
import io
import json
import os
import shutil
import signal
import sys

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from manualloop import CheckpointError, SingleDevice, TrainState, load_checkpoint, save_checkpoint

CPU = SingleDevice("cpu")
BY_PATH = (
    *("open", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir", "stat"),
    *("lstat", "link"),
)
BY_DESCRIPTOR = ("fsync", "fstat", "ftruncate", "pread", "pwrite", "close", "read", "write")


def new_state(step=0):
    torch.manual_seed(step)
    model = torch.nn.Linear(2, 1)
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    state.progress.num_steps = step
    return state


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    save_checkpoint(folder, new_state(1), strategy=CPU)
    return folder


def check(folder, outcome):
    """The folder holds a whole checkpoint, and can be used."""
    assert outcome in ("saved", "CheckpointError", "died"), outcome
    state = new_state()
    step = load_checkpoint(folder, state, strategy=CPU).step
    assert step == 2 if outcome == "saved" else step in (1, 2)
    expected = new_state(step).model.weight
    assert torch.equal(state.model.weight, expected)
    save_checkpoint(folder, new_state(3), keep=1, strategy=CPU)
    assert os.listdir(folder) == ["step-00000003"]


class Failing:
    """Fails at the n-th call that concerns a folder; counts the calls."""

    def __init__(self, folder, number, error):
        self.folder, self.number, self.error, self.count = str(folder), number, error, 0

    def strike(self):
        self.count += 1
        if self.count == self.number:
            raise self.error()

    def by_path(self, function):
        def call(path=".", *args, **kwargs):
            if not isinstance(path, int) and str(path).startswith(self.folder):
                self.strike()
            return function(path, *args, **kwargs)

        return call

    def by_descriptor(self, function):
        def call(*args, **kwargs):
            self.strike()
            return function(*args, **kwargs)

        return call

    def patch(self, monkeypatch):
        for name in BY_PATH:
            monkeypatch.setattr(os, name, self.by_path(getattr(os, name)))
        for name in BY_DESCRIPTOR:
            monkeypatch.setattr(os, name, self.by_descriptor(getattr(os, name)))
        monkeypatch.setattr(io, "open", self.by_path(io.open))
        monkeypatch.setattr(builtins, "open", self.by_path(builtins.open))
        save_file = safetensors.torch.save_file

        def save_or_fail(tensors, path, **kwargs):
            try:
                self.strike()
            except OSError as error:
                raise SafetensorError(f"Error while serializing: I/O error: {error}") from error
            save_file(tensors, path, **kwargs)

        monkeypatch.setattr(safetensors.torch, "save_file", save_or_fail)


def disk_full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def bad_sector():
    return OSError(errno.EIO, os.strerror(errno.EIO))


STRIDES = [pytest.param(11, id="sample"), pytest.param(1, id="all", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("error", [disk_full, bad_sector, MemoryError])
def test_f28_the_nth_call_of_the_system(error, stride, begun, tmp_path, monkeypatch):
    number, outcomes = 1, []
    while True:
        folder = tmp_path / "run"
        shutil.copytree(begun, folder)
        state = new_state(2)
        with monkeypatch.context() as patched:
            failing = Failing(folder, number, error)
            failing.patch(patched)
            try:
                save_checkpoint(folder, state, keep=1, strategy=CPU)
                outcome = "saved"
            except CheckpointError:
                outcome = "CheckpointError"
            except Exception as raised:
                outcome = f"{type(raised).__name__} of call {number}: {raised}"
        check(folder, outcome)
        shutil.rmtree(folder)
        outcomes.append(outcome)
        if failing.count < number:
            break
        number += stride
    print(f"{len(outcomes) - 1} calls; saved {outcomes.count('saved') - 1} of them all the same")
    assert number > 60


def save_with_failing_allocations(begun, base, numbers, pipe):
    """In a process of its own: save once for each number, and tell each time how it ended."""
    import _testcapi

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, if it hangs
    for number in numbers:
        signal.alarm(120)
        folder, state = base / f"run-{number}", new_state(2)
        shutil.copytree(begun, folder)
        _testcapi.set_nomemory(number, number + 1)
        try:
            try:
                save_checkpoint(folder, state, keep=1, strategy=CPU)
                outcome = "saved"
            except CheckpointError:
                outcome = "CheckpointError"
            except BaseException as raised:
                outcome = type(raised).__name__
        finally:
            _testcapi.remove_mem_hooks()
        os.write(pipe, (json.dumps([number, outcome]) + "\n").encode())


FIRST = 60  # before, the arguments are looked at, and nothing has been touched


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "stride",
    [pytest.param(701, id="sample"), pytest.param(1, id="all", marks=pytest.mark.exhaustive)],
)
def test_f28_the_nth_allocation(stride, begun, tmp_path):
    pytest.importorskip("_testcapi", reason="this Python has no _testcapi")
    save_checkpoint(tmp_path / "first", new_state(), strategy=CPU)  # everything is imported
    number, outcomes, since_failure = FIRST, {}, 0
    while since_failure < max(3, 2000 // stride):
        receiver, sender = os.pipe()
        numbers = range(number, number + 50 * stride, stride)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                faulthandler.disable()
                save_with_failing_allocations(begun, tmp_path, numbers, sender)
                status = 0
            finally:
                os._exit(status)
        os.close(sender)
        with os.fdopen(receiver) as lines:
            ended = [json.loads(line) for line in lines]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGSEGV:  # torch uses the tuple of strides that it could not make
            ended.append([numbers[len(ended)], "died"])
        else:
            assert status == 0, f"died of {status} at allocation {numbers[len(ended)]}"
        for failed, outcome in ended:
            check(tmp_path / f"run-{failed}", outcome)
            shutil.rmtree(tmp_path / f"run-{failed}")
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            since_failure = since_failure + 1 if outcome == "saved" else 0
        number = ended[-1][0] + stride
    print(f"up to allocation {number}: {outcomes}", file=sys.stderr)
    assert outcomes.get("died", 0) <= 10
