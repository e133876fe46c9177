"""Run folders from somebody else: links, pipes, devices and huge files in place of our own."""

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_damage import needs_linux, watching

from manualloop import (
    CheckpointError,
    TrainState,
    compare_runs,
    load_checkpoint,
    save_checkpoint,
    train_loop,
)
from manualloop.checkpoint.manifest import find_folders

posix = pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")


def loss_fn(model, batch):
    return model(batch).square().mean()


def train(folder, num_epochs=1, stop_after=None, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def on_step(step):
        if step.index == stop_after:
            raise InterruptedError

    options = {"checkpoint_every": 1, "on_step": on_step, "progress_bar": False, **options}
    options["lr_scheduler"] = None
    return train_loop(
        model,
        [torch.ones(2, 2) * n for n in range(1, 5)],
        optimizer,
        num_epochs=num_epochs,
        loss_fn=loss_fn,
        checkpoint_dir=folder,
        **options,
    )


def begun(folder):
    """A folder of a run that was broken off: two checkpoints and a history."""
    with pytest.raises(InterruptedError):
        train(folder, stop_after=3)
    return folder


def weights_of(state):
    return [weight.clone() for weight in state.model.parameters()]


def new_state():
    model = torch.nn.Linear(2, 1)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def link(path, precious):
    path.symlink_to(precious)


def dangling_link(path, precious):
    path.symlink_to(path.parent.parent / "to be made")


def hard_link(path, precious):
    os.link(precious, path)


def pipe(path, precious):
    os.mkfifo(path)


def folder_of_that_name(path, precious):
    path.mkdir()


def listening(path, precious):
    # The path of a socket has at most 108 bytes.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        os.symlink(path.parent, f"{short}/folder")
        server.bind(f"{short}/folder/{path.name}")


def endless(path, precious):
    path.symlink_to("/dev/zero")


TRICKS = [link, dangling_link, hard_link, pipe, folder_of_that_name, listening, endless]
NAMES = [".lock", "history.jsonl"]


@posix
@pytest.mark.parametrize("is_begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trick", TRICKS)
def test_nothing_outside_the_folder_is_written_to(trick, name, is_begun, tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("precious\n")
    if is_begun:
        begun(folder)
        (folder / name).unlink(missing_ok=True)
    else:
        folder.mkdir()
    trick(folder / name, precious)
    if (trick, name) == (hard_link, "history.jsonl"):
        train(folder)  # continues with a copy of its own
        assert (folder / name).read_text().startswith("precious\n{")
    else:
        with pytest.raises(CheckpointError) as error:
            train(folder)
        assert str(folder) in str(error.value)
    assert precious.read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]


@needs_linux
@pytest.mark.parametrize("name", [".lock", "history.jsonl", "step-00000009"])
def test_nothing_outside_the_folder_is_opened(name, tmp_path):
    folder = begun(tmp_path / "run")
    outside = tmp_path / "outside"
    if name.startswith("step"):
        shutil.copytree(folder / "step-00000002", outside)
        secret = outside / "manifest.json"
    else:
        outside.write_text("precious\n")
        secret = outside
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with watching(secret) as was_opened:
        if name.startswith("step"):
            train(folder)
        else:
            with pytest.raises(CheckpointError):
                train(folder)
        assert not was_opened()
        secret.read_bytes()
        assert was_opened(), "the watch works"


@posix
@pytest.mark.parametrize("name", NAMES)
def test_save_checkpoint_and_compare_runs_refuse_them_too(name, tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("precious\n")
    save_checkpoint(folder, new_state())
    (folder / name).symlink_to(precious)
    if name == ".lock":
        with pytest.raises(CheckpointError, match=r"\.lock is a link"):
            save_checkpoint(folder, new_state())
    else:
        with pytest.raises(CheckpointError, match="is a link"):
            compare_runs(folder, folder)
    assert precious.read_text() == "precious\n"


@posix
def test_a_refused_history_has_loaded_nothing(tmp_path):
    folder = begun(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    os.mkfifo(folder / "history.jsonl")
    torch.manual_seed(5)
    model = torch.nn.Linear(2, 1)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(CheckpointError, match="is a pipe"):
        train_loop(
            model,
            [torch.ones(2, 2)] * 4,
            torch.optim.SGD(model.parameters(), lr=0.1),
            num_epochs=1,
            loss_fn=loss_fn,
            checkpoint_dir=folder,
            progress_bar=False,
        )
    assert all(map(torch.equal, before, model.parameters()))


@posix
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("trick", [link, pipe, folder_of_that_name, listening, endless])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_is_a_file(name, trick, verify, tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    path = save_checkpoint(folder, new_state()) / name
    shutil.copy(path, precious)
    path.unlink()
    trick(path, precious)
    state = new_state()
    before = weights_of(state)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder, state, verify=verify)
    assert all(map(torch.equal, before, state.model.parameters()))


@posix
def test_a_linked_checkpoint_is_skipped_and_stays(tmp_path, caplog):
    folder, other = begun(tmp_path / "run"), tmp_path / "other"
    train(other)
    (folder / "step-00000009").symlink_to(other / "step-00000004")
    result = train(folder)
    assert result.state.progress.num_steps == 4
    assert "step-00000009 (it is a link" in caplog.text
    assert (other / "step-00000004" / "manifest.json").exists()
    with pytest.raises(CheckpointError, match="is a link"):
        (folder / "step-00000010").symlink_to(other / "step-00000004")
        load_checkpoint(folder, new_state(), which="step-00000010")
    # A path that the user has written may lead anywhere.
    assert load_checkpoint(other, new_state(), which=folder / "step-00000010").step == 4


@posix
def test_leftovers_that_are_links_are_removed_without_what_they_point_to(tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    precious.mkdir()
    (precious / "file").write_text("precious\n")
    (folder / ".step-00000001.tmp-0a").symlink_to(precious)
    (folder / ".step-00000002.trash-0a").symlink_to(precious / "file")
    os.mkfifo(folder / ".probe-0a")
    train(folder)
    assert (precious / "file").read_text() == "precious\n"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def sparse(path, num_bytes):
    with open(path, "ab") as file:
        file.truncate(num_bytes)


@posix
@pytest.mark.parametrize(
    ("name", "num_bytes", "text"),
    [
        ("history.jsonl", 5 << 30, "has more than 4 GiB"),
        ("manifest.json", 5 << 30, "manifest.json is larger than 100 MB"),
    ],
)
def test_huge_files_are_refused_unread(name, num_bytes, text, tmp_path):
    folder = begun(tmp_path / "run")
    path = folder / name if name == "history.jsonl" else folder / "step-00000002" / name
    sparse(path, num_bytes)
    if name == "history.jsonl":
        with pytest.raises(CheckpointError, match=text):
            train(folder)
    else:
        (entry,) = [entry for entry in find_folders(folder) if entry.problem]
        assert text in entry.problem


@posix
@pytest.mark.parametrize("name", ["state.json", "rng.safetensors"])
def test_huge_files_that_the_manifest_lists_are_refused_unread(name, tmp_path):
    import json

    from manualloop.checkpoint.manifest import manifest_bytes

    checkpoint = save_checkpoint(tmp_path, new_state())
    num_bytes = {"state.json": 101_000_000, "rng.safetensors": 1 << 43}[name]
    sparse(checkpoint / name, num_bytes)
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name]["size"] = num_bytes
    path.write_bytes(manifest_bytes(manifest))
    with pytest.raises(CheckpointError, match=r"larger than 100 MB|of memory"):
        load_checkpoint(tmp_path, new_state(), verify=name == "rng.safetensors")


def test_lines_without_end_take_no_memory(tmp_path):
    from manualloop.run.history_file import HistoryFile, read_history

    HistoryFile(tmp_path, 0, 0).write([{"step": 1, "loss": 0.5}])
    sparse(tmp_path / "history.jsonl", 100 << 20)
    before = sys.getallocatedblocks()
    assert read_history(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert sys.getallocatedblocks() - before < 1000


def test_a_lock_with_commands_for_the_terminal_is_not_printed(tmp_path, caplog):
    text = '{"pid": 1, "host": "\\u001b[2J", "started": "now"}'
    for content in (text, "[" * 900, '{"pid": {}}', "\x00" * 2000):
        (tmp_path / ".lock").write_text(content)
        caplog.clear()
        save_checkpoint(tmp_path, new_state())
        assert "taking over" not in caplog.text


@posix
def test_a_path_through_a_link_is_the_users_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    train(tmp_path / "runs" / "one")
    assert train(tmp_path / "runs" / "one").stopped_by == "num_epochs"
    assert Path(tmp_path / "disk" / "one" / "history.jsonl").is_file()
