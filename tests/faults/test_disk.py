"""Full disks, read-only and deleted folders, power cuts, concurrent runs, wrong clocks."""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bench
import pytest
import torch
from injections import DiskFull, FileSizeLimit, FullAt, Gate, KillAt

from manualloop import (
    CheckpointError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    save_checkpoint,
    train_loop,
)
from manualloop.checkpoint.files import verify_folder
from manualloop.checkpoint.manifest import find_folders, read_manifest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def check_refused(folder, outcome, cause):
    kind, error, text = outcome
    assert (kind, error) == ("failed", "CheckpointError"), outcome
    assert str(folder) in text
    assert re.search(cause, text), text
    for entry in find_folders(folder):
        verify_folder(entry.path, entry.manifest)
    assert not list(folder.glob(".step-*")), "a temporary folder is left"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=() if n in (1, 3, 8, 20) else pytest.mark.exhaustive)
        for n in (1, 3, 6, 7, 8, 9, 20, 40)
    ],
)
def test_f05_a_full_disk_is_explained_and_the_old_checkpoint_stays(number, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    outcome = bench.run(folder, log, DiskFull(number))
    check_refused(folder, outcome, "No space left on device")
    if number > 1:  # the first fsync is that of the ledger
        assert re.search(NEEDED_AND_FREE, outcome[2])
    last = max(bench.saved_steps(folder), default=None)
    assert ("There is none from before" if last is None else f"The last is {folder}") in outcome[2]
    finish(folder, log)


NEEDED_AND_FREE = r"It takes [\d.]+ MB. Free there: [\d.]+ MB."


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize(
    "point", ["mkdir", "model:half", "state:half", "manifest:before", "manifest:half", "rename"]
)
def test_f05_a_disk_that_fills_up_inside_a_file_is_explained(point, number, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    outcome = bench.run(folder, log, FullAt(point, number))
    check_refused(folder, outcome, "No space left on device")
    assert re.search(NEEDED_AND_FREE, outcome[2])
    assert bench.saved_steps(folder) == list(range(1, number))
    assert (f"The last is {folder / 'step-00000002'}" in outcome[2]) == (number > 1)
    finish(folder, log)


@pytest.mark.parametrize(("num_bytes", "number"), [(200, 0), (1500, 0), (4000, 0), (4000, 3)])
def test_f05_a_file_that_may_not_grow_is_explained(num_bytes, number, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    outcome = bench.run(folder, log, FileSizeLimit(num_bytes, number))
    check_refused(folder, outcome, "File too large")
    if num_bytes > 200:  # that is too short for a line of the ledger
        assert re.search(NEEDED_AND_FREE, outcome[2])
    if number:
        assert bench.saved_steps(folder) == [2, 3]
        assert f"The last is {folder / 'step-00000003'}" in outcome[2]
    finish(folder, log)


MS_REMOUNT, CLONE_NEWNS, CLONE_NEWUSER = 32, 0x20000, 0x10000000


def mount_tmpfs(folder, size, flags=0):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def train_on_a_small_disk(pipe, folder, log, size):
    """Run on a file system that only this process sees; then enlarge it and run again."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS):
            raise PermissionError("unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        mount_tmpfs(folder, size)
    except OSError as error:
        pipe.send(f"no file system for this process alone: {error}")
        return
    pipe.send(None)
    bench._child(pipe, folder, log, None, {})
    whole = [entry for entry in find_folders(Path(folder)) if entry.manifest is not None]
    for entry in whole:
        verify_folder(entry.path, entry.manifest)
    pipe.send(([entry.path.name for entry in whole], sorted(os.listdir(folder))))
    mount_tmpfs(folder, "8m", MS_REMOUNT)
    bench._child(pipe, folder, log, None, {})
    pipe.send(bench.junk(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(s, marks=() if s in ("32k", "100k") else pytest.mark.exhaustive)
        for s in ("20k", "32k", "60k", "68k", "100k", "108k")
    ],
)
def test_f05_a_disk_that_is_really_full_is_explained(size, tmp_path, undisturbed):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    folder.mkdir()
    receiver, sender = bench.CONTEXT.Pipe(duplex=False)
    arguments = (sender, str(folder), str(log), size)
    process = bench.CONTEXT.Process(target=train_on_a_small_disk, args=arguments)
    process.start()
    sender.close()
    if reason := receiver.recv():
        pytest.skip(reason)
    kind, error, text = receiver.recv()
    whole, names = receiver.recv()
    assert (kind, error) == ("failed", "CheckpointError"), text
    assert "No space left on device" in text
    assert str(folder) in text
    assert re.search(NEEDED_AND_FREE, text)
    # Some 36 KB each: of one that did not fit nothing is left.
    assert whole == {"2": [], "3": [], "6": ["step-00000001"]}.get(
        size[0], ["step-00000002", "step-00000001"]
    )
    assert f"The last is {folder / whole[0]}" in text if whole else "There is none" in text
    assert set(names) - {"history.jsonl"} == set(whole)
    assert receiver.recv() == ("finished", "num_epochs", undisturbed[0])
    assert receiver.recv() == []
    process.join(600)
    assert bench.merged(log) == undisturbed[1]


@dataclass
class Recorder:
    """Records in which order files are forced to the disk and renamed."""

    path: str

    def __call__(self):
        fsync, rename = os.fsync, os.rename

        def note(*words):
            with open(self.path, "a") as file:
                file.write(" ".join(words) + "\n")

        def recorded_fsync(descriptor):
            fsync(descriptor)
            note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

        def recorded_rename(source, target):
            rename(source, target)
            note("rename", str(source), str(target))

        os.fsync, os.rename = recorded_fsync, recorded_rename


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_f06_the_order_is_files_manifest_folder_rename_parent(tmp_path):
    folder, record = tmp_path / "run", tmp_path / "record.txt"
    bench.run(folder, None, Recorder(str(record)), max_steps=1, num_epochs=None)
    lines = [line.split() for line in record.read_text().splitlines()]
    lines = [line for line in lines if "history.jsonl" not in line[-1]]
    names = [Path(line[1]).name for line in lines if line[0] == "fsync"]
    (rename,) = [number for number, line in enumerate(lines) if line[0] == "rename"]
    files = {path.name for path in (folder / "step-00000001").iterdir()}
    assert set(names[: len(files) - 1]) == files - {"manifest.json"}
    assert names[len(files) - 1] == "manifest.json"
    assert re.fullmatch(r"\.step-00000001\.tmp-\w+", names[len(files)])
    assert rename == len(files) + 1
    assert lines[rename + 1] == ["fsync", str(folder)]
    assert len(lines) == rename + 2


@dataclass
class PowerCut(Recorder):
    """Kills the process at the ``number``-th fsync; the record shows which files would be lost."""

    number: int = 1

    def __call__(self):
        super().__call__()
        KillAt("fsync", self.number)()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=() if n in (1, 6, 8, 10, 11, 19) else pytest.mark.exhaustive)
        for n in (1, 2, 5, 6, 7, 8, 9, 10, 11, 15, 18, 19, 20, 30)
    ],
)
def test_f06_a_run_resumes_after_a_power_cut_that_loses_files(number, tmp_path, finish):
    folder, log, record = tmp_path / "run", tmp_path / "log.jsonl", tmp_path / "record.txt"
    record.touch()
    bench.run(folder, log, PowerCut(str(record), number))
    lines = [line.split() for line in record.read_text().splitlines()]
    forced = {line[1] for line in lines if line[0] == "fsync"}
    renames = [line[1:] for line in lines if line[0] == "rename"]
    last_parent = max((n for n, x in enumerate(lines) if x == ["fsync", str(folder)]), default=-1)
    for path in sorted(folder.rglob("*"), reverse=True):
        # A rename counts for certain once the parent was forced; before that either may be true.
        names = [str(path), *(str(path).replace(new, old) for old, new in renames)]
        if path.is_file() and path.name != ".lock" and not forced & set(names):
            path.write_bytes(b"\0" * path.stat().st_size)  # its blocks never reached the disk
    if last_parent < len(lines) - 1:
        undone = [line for line in lines[last_parent + 1 :] if line[0] == "rename"]
        for _, old, new in reversed(undone):
            if ".tmp-" in old and Path(new).exists():
                os.rename(new, old)
    finish(folder, log)


@dataclass
class Unprivileged:
    """Drops root, and makes a folder read-only after some calls of fsync."""

    folder: str
    number: int | None = None

    def __call__(self):
        for path in (Path(self.folder).parent, Path(self.folder)):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        inner, seen = os.fsync, 0

        def fsync(descriptor):
            nonlocal seen
            seen += 1
            if seen == self.number:
                os.chmod(self.folder, 0o555)
            inner(descriptor)

        os.fsync = fsync
        if self.number is None:
            os.chmod(self.folder, 0o555)
        if os.geteuid() == 0:
            os.chown(self.folder, 65534, 65534)
            for path in Path(self.folder).rglob("*"):
                os.chown(path, 65534, 65534)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)


@pytest.fixture
def open_path(tmp_path):
    """A folder that an unprivileged process can reach."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    return tmp_path


@pytest.mark.parametrize("has_stale_lock", [False, True])
def test_f22_a_read_only_folder_is_refused_before_the_first_step(has_stale_lock, open_path):
    folder, log = open_path / "run", open_path / "log.jsonl"
    folder.mkdir()
    if has_stale_lock:  # which can be opened and locked, though no file can be made
        (folder / ".lock").touch()
    outcome = bench.run(folder, log, Unprivileged(str(folder)))
    check_refused(folder, outcome, "Permission denied")
    assert not log.exists(), "it has trained"
    folder.chmod(0o777)
    bench.run(folder, log, Unprivileged(str(folder), 25))
    assert log.exists(), "but it can write there"
    shutil.rmtree(folder)
    folder.mkdir()
    assert not (folder / "history.jsonl").exists()


def test_f22_a_folder_that_becomes_read_only_ends_the_run_with_the_old_checkpoint(
    open_path, finish
):
    folder = open_path / "run"
    folder.mkdir()
    outcome = bench.run(folder, None, Unprivileged(str(folder), 25))
    assert outcome[:2] == ("failed", "CheckpointError"), outcome
    assert "Permission denied" in outcome[2]
    assert f"The last is {folder}" in outcome[2]
    folder.chmod(0o777)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 0, 0)
    finish(folder)


@dataclass
class ParentRemoved:
    folder: str
    number: int

    def __call__(self):
        inner, seen = os.fsync, 0

        def fsync(descriptor):
            nonlocal seen
            seen += 1
            inner(descriptor)
            if seen == self.number:
                # At once: a file that a thread adds meanwhile would leave half of the folder.
                os.rename(self.folder, f"{self.folder}-deleted")
                shutil.rmtree(f"{self.folder}-deleted", ignore_errors=True)

        os.fsync = fsync


@pytest.mark.parametrize("number", [8, 9, 10, 25])
def test_f22_a_folder_deleted_during_the_run_ends_it_with_an_explanation(number, tmp_path):
    folder = tmp_path / "deep" / "run"
    folder.parent.mkdir()
    outcome = bench.run(folder, None, ParentRemoved(str(folder.parent), number))
    assert outcome[:2] == ("failed", "CheckpointError"), outcome
    assert "No such file or directory" in outcome[2]
    assert "There is none from before" in outcome[2]


def test_f22_a_folder_deleted_during_the_run_leaves_the_trained_weights_in_memory(tmp_path):
    torch.manual_seed(0)
    model, before = torch.nn.Linear(8, 1), []

    def on_step(step):
        if step.index == 3:
            before.extend(weight.clone() for weight in model.parameters())
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(CheckpointError, match="No such file or directory"):
        train_loop(
            model,
            [{"x": torch.ones(2, 8)}] * 6,
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            strategy=SingleDevice("cpu"),
            checkpoint_dir=tmp_path / "run",
            checkpoint_every=1,
            on_step=on_step,
            progress_bar=False,
        )
    assert before
    assert all(map(torch.equal, before, model.parameters()))


def wait_for(path, process):
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


def test_f23_a_second_run_in_the_same_folder_is_refused(tmp_path, undisturbed):
    folder, gate = tmp_path / "run", tmp_path / "gate"
    process, receiver = bench.start(folder, None, Gate(str(gate), 2))
    wait_for(folder / "step-00000001", process)
    refused = [bench.run(folder) for _ in range(2)]  # the first takes nothing away
    gate.touch()
    for kind, error, text in refused:
        assert (kind, error) == ("failed", "CheckpointError")
        assert f"process {process.pid} on {socket.gethostname()}, since " in text
        assert re.search(r"since \d{4}-\d\d-\d\dT", text)
    assert receiver.recv() == ("finished", "num_epochs", undisturbed[0])
    process.join()
    assert bench.junk(folder) == []


def test_f23_the_lock_of_a_killed_run_is_taken_over_with_a_notice(tmp_path, finish):
    folder = tmp_path / "run"
    process, _ = bench.start(folder, None, Gate(str(tmp_path / "never"), 3))
    wait_for(folder / "step-00000002", process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert json.loads((folder / ".lock").read_text())["pid"] == process.pid
    finish(folder)
    assert f"taking over {folder} from a run that did not end by itself: process {process.pid}" in (
        bench.messages(folder)
    )


@pytest.mark.parametrize("clock", ["backwards", "standing still"])
def test_f25_a_run_resumes_whatever_the_clock_shows_and_foreign_folders_stay(
    clock, tmp_path, undisturbed
):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    assert bench.run(folder, log, KillAt("rename", 6))[0] == "killed"
    assert bench.saved_steps(folder) == [4, 5]
    foreign = ["STEP-00000099", "checkpoint-9-backup", "step-00000099-old"]
    for name in foreign:
        shutil.copytree(folder / "step-00000004", folder / name)
    for leftover in (".step-00000003.trash-0badcafe", ".step-00000099.tmp-0badcafe"):
        shutil.copytree(folder / "step-00000004", folder / leftover)
    for step, path in enumerate(sorted(folder.glob("step-0000000?"))):
        past = 1_000_000_000 - (1000 * step if clock == "backwards" else 0)
        for file in (*path.iterdir(), path):
            os.utime(file, (past, past))
    outcome = bench.run(folder, log)
    assert f"resuming from {folder / 'step-00000005'}" in bench.messages(folder)
    assert outcome == ("finished", "num_epochs", undisturbed[0])
    assert bench.merged(log) == undisturbed[1]
    here = {path.name for path in folder.iterdir()}
    assert here == {*foreign, "history.jsonl", "step-00000011", "step-00000012"}
    for name in foreign:
        verify_folder(folder / name, read_manifest(folder / name))


def new_state():
    model = torch.nn.Linear(3, 2)
    return TrainState(model, torch.optim.AdamW(model.parameters()))


def test_f25_only_the_step_in_the_manifest_orders_and_foreign_folders_are_left_alone(tmp_path):
    cpu = SingleDevice("cpu")
    state = new_state()
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        state.progress.num_steps = step
        path = save_checkpoint(folder, state, keep=2, strategy=cpu)
        past = 1_000_000_000 - step * 1000  # the clock goes backwards
        os.utime(path, (past, past))
        for foreign in ("checkpoint-9-backup", "STEP-00000009", "step-9", "step-00000009.bak"):
            (folder / foreign).mkdir(exist_ok=True)
        (folder / ".step-00000002.tmp-0badcafe").mkdir()
        (folder / "step-00000077").touch()  # a file, not a folder
    assert load_checkpoint(folder, state, strategy=cpu).step == 3
    assert sorted(path.name for path in folder.iterdir()) == [
        ".step-00000002.tmp-0badcafe",
        "STEP-00000009",
        "checkpoint-9-backup",
        "step-00000002",
        "step-00000003",
        "step-00000009.bak",
        "step-00000077",
        "step-9",
    ]
    state.progress.num_steps = 4
    save_checkpoint(folder, state, keep=2, strategy=cpu)
    assert not (folder / ".step-00000002.tmp-0badcafe").exists(), "swept by the next one who saves"
    assert (folder / "step-00000003").is_dir()
    # A folder that was renamed by hand counts by its manifest, and not by its name.
    (folder / "step-00000004").rename(folder / "step-00000001")
    assert load_checkpoint(folder, state, strategy=cpu).step == 4


def test_an_older_step_is_not_saved_into_a_folder_of_later_ones(tmp_path):
    cpu, state = SingleDevice("cpu"), new_state()
    state.progress.num_steps = 5
    save_checkpoint(tmp_path, state, strategy=cpu)
    state.progress.num_steps = 4
    with pytest.raises(CheckpointError, match="holds step-00000005, and this run is at step 4"):
        save_checkpoint(tmp_path, state, strategy=cpu)
    assert bench.saved_steps(tmp_path) == [5]
