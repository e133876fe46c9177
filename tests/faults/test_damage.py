"""Checkpoints whose files were truncated, changed or forged."""

import ctypes
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import bench
import pytest
import torch

from manualloop import CheckpointError, SingleDevice, TrainState, load_checkpoint, save_checkpoint
from manualloop.checkpoint.manifest import find_folders, manifest_bytes

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")

FILES = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "optimizer.safetensors",
    "extras.safetensors",
    "rng.safetensors",
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder of a run with two checkpoints, of steps 4 and 5, and more to come."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    from injections import KillAt

    bench.run(folder, None, KillAt("rename", 6))
    assert bench.saved_steps(folder) == [4, 5]
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def new_state():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return TrainState(model, optimizer, schedule)


def load(folder, **options):
    state = new_state()
    return load_checkpoint(folder, state, strategy=SingleDevice("cpu"), **options), state


def test_a_checkpoint_has_the_files_that_are_damaged_below(folder):
    assert {path.name for path in (folder / "step-00000005").iterdir()} == set(FILES)
    assert load(folder)[0].step == 5


def is_sampled(name, part):
    """All kinds of damage of two files, and one kind of all files."""
    return name in ("manifest.json", "model.safetensors") or part == "half"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=() if is_sampled(name, part) else pytest.mark.exhaustive)
        for name in FILES
        for part in ("nothing", "half", "all but the last byte", "missing")
    ],
)
def test_f07_a_truncated_file_is_skipped_with_a_warning(name, part, folder, finish):
    path = folder / "step-00000005" / name
    size = path.stat().st_size
    if part == "missing":
        path.unlink()
    else:
        kept = {"nothing": 0, "half": size // 2, "all but the last byte": size - 1}[part]
        os.truncate(path, kept)
    finish(folder)
    text = bench.messages(folder)
    assert re.search(rf"skipped step-00000005 \(.*{re.escape(name)}", text)
    assert "resuming from step-00000004" in text
    assert any(path.name.startswith("damaged-step-00000005-") for path in folder.iterdir())


def flip_bits(data, number, draws):
    """Copies of the bytes with one bit flipped, each another one."""
    for bit in draws.sample(range(8 * len(data)), number):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


@pytest.mark.parametrize("number", [6, pytest.param(60, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FILES)
def test_f08_a_flipped_bit_never_loads(name, number, folder):
    shutil.rmtree(folder / "step-00000004")
    path = folder / "step-00000005" / name
    whole = path.read_bytes()
    for bit, data in flip_bits(whole, number, random.Random(name)):
        path.write_bytes(data)
        state = new_state()
        weights = [weight.clone() for weight in state.model.parameters()]
        for which in ("last", "step-00000005"):
            with pytest.raises(CheckpointError, match=re.escape(name)):
                load_checkpoint(folder, state, which=which, strategy=SingleDevice("cpu"))
        assert all(map(torch.equal, weights, state.model.parameters())), f"bit {bit} was loaded"
    path.write_bytes(whole)
    assert load(folder)[0].step == 5


@pytest.mark.parametrize("name", FILES)
def test_f08_with_a_flipped_bit_the_older_checkpoint_is_used(name, folder, finish):
    path = folder / "step-00000005" / name
    (_, data), *_ = flip_bits(path.read_bytes(), 1, random.Random(name + "older"))
    path.write_bytes(data)
    finish(folder)
    assert re.search(rf"skipped step-00000005 \(.*{re.escape(name)}", bench.messages(folder))


@pytest.mark.exhaustive
def test_f08_each_bit_of_the_manifest(folder):
    shutil.rmtree(folder / "step-00000004")
    path = folder / "step-00000005" / "manifest.json"
    whole = path.read_bytes()
    for _, data in flip_bits(whole, 8 * len(whole), random.Random(0)):
        path.write_bytes(data)
        (entry,) = find_folders(folder)
        assert entry.manifest is None


def test_f08_verify_false_trusts_the_disk(folder):
    path = folder / "step-00000005" / "model.safetensors"
    whole = list(load(folder)[1].model.parameters())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load(folder)[0].step == 4
    info, trusted = load(folder, verify=False)
    assert info.step == 5
    differ = [not torch.equal(a, b) for a, b in zip(whole, trusted.model.parameters(), strict=True)]
    assert any(differ), "it has loaded what is not what was saved"


def test_without_an_intact_checkpoint_the_run_does_not_start_again(folder):
    for step in (4, 5):
        os.truncate(folder / f"step-0000000{step}" / "model.safetensors", 3)
    kind, error, text = bench.run(folder)
    assert (kind, error) == ("failed", "CheckpointError")
    assert "No checkpoint in" in text
    assert text.count("model.safetensors has 3 bytes, not") == 2
    assert bench.saved_steps(folder) == [4, 5]


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def sign(folder, **changes):
    """Write a manifest as an attacker could: everything in it is consistent."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_bytes()), **changes}
    for name, entry in manifest["files"].items():
        file = folder / name
        if isinstance(entry, dict) and file.is_file():
            data = file.read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(manifest_bytes(manifest))


@pytest.mark.parametrize("name", [*FILES[1:], "optimizer.pt", "rng_state.pth", "scaler.pt"])
def test_f20_a_pickle_is_never_opened(name, folder, tmp_path):
    canary = tmp_path / "canary"
    checkpoint = folder / "step-00000005"
    (checkpoint / name).write_bytes(pickle.dumps(Canary(canary)))
    sign(checkpoint)
    if name in FILES:
        with pytest.raises(CheckpointError):
            load(folder, which=checkpoint)
    else:
        assert load(folder)[0].step == 5
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary works"


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "optimizer.pt"])
def test_f20_a_resumed_run_never_opens_a_pickle(name, is_listed, folder, tmp_path, undisturbed):
    canary, checkpoint = tmp_path / "canary", folder / "step-00000005"
    (checkpoint / name).write_bytes(pickle.dumps(Canary(canary)))
    if is_listed:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        sign(checkpoint, files={name: {}, **files})
    outcome = bench.run(folder)
    if is_listed and name in FILES:
        assert outcome[:2] == ("failed", "CheckpointError")
        assert name in outcome[2]
    else:
        assert outcome == ("finished", "num_epochs", undisturbed[0])
    assert not canary.exists()


def load_audited(pipe, folder, checkpoint):
    """Load in this process; send what was raised, and every file that Python has opened."""
    load(folder, which="step-00000004")  # opens what is imported only when needed
    opened = []

    def note_opens(event, arguments):
        if event == "open" and not isinstance(arguments[0], int):
            opened.append(os.path.abspath(os.fsdecode(arguments[0])))

    sys.addaudithook(note_opens)
    try:
        load(folder, which=checkpoint)
        text = "loaded"
    except CheckpointError as error:
        text = str(error)
    load(folder, which="step-00000004")  # in case the other one was refused unopened
    pipe.send((text, list(opened)))


def check_refused_unopened(folder, checkpoint, reason, secret):
    """The checkpoint is refused, and no file outside the folder was opened by any code."""
    receiver, sender = bench.CONTEXT.Pipe(duplex=False)
    process = bench.CONTEXT.Process(target=load_audited, args=(sender, folder, checkpoint))
    with watching(secret) as was_opened:
        process.start()
        sender.close()
        text, opened = receiver.recv()
        assert not was_opened(), "the file outside was opened"
        secret.read_bytes()
        assert was_opened(), "the watch works"
    process.join(600)
    assert re.search(reason, text), text
    assert str(folder / "step-00000004" / "manifest.json") in opened, "the audit works"
    assert [name for name in opened if not name.startswith(f"{folder}{os.sep}")] == []


@contextmanager
def watching(path):
    """Watch whether any code opens a file, including safetensors, which is not Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    in_open = 0x20
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), in_open) >= 0

    def was_opened():
        try:
            return bool(os.read(descriptor, 4096))
        except BlockingIOError:
            return False

    try:
        yield was_opened
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {"../../secret": {"size": 6, "sha256": "0"}}}, "not a file of the folder"),
        ({"files": {"/etc/hostname": {"size": 6, "sha256": "0"}}}, "not a file of the folder"),
        ({"files": {"..": {"size": 6, "sha256": "0"}}}, "not a file of the folder"),
        ({"files": {"a\\..\\b": {"size": 6, "sha256": "0"}}}, "not a file of the folder"),
        ({"files": {"link": {"size": 6, "sha256": "0"}}}, "link is a link"),
        ({"files": ["model.safetensors"]}, "not one of ours"),
        ({"files": {"model.safetensors": 7}}, "not one of ours"),
        ({"files": {"model.safetensors": {"size": 6}}}, "not one of ours"),
        ({"step": "5"}, "not one of ours"),
        ({"step": -1}, "not one of ours"),
        ({"metrics": None}, "not one of ours"),
        ({"format": 2}, "format 2 is not 1"),
        ({"format": None}, "format None is not 1"),
    ],
)
@needs_linux
def test_f21_a_manifest_with_tricks_is_refused(changes, reason, folder):
    checkpoint, secret = folder / "step-00000005", folder.parent / "secret"
    secret.write_text("secret")
    (checkpoint / "link").symlink_to(secret)
    path = checkpoint / "manifest.json"
    path.write_bytes(manifest_bytes({**json.loads(path.read_bytes()), **changes}))
    check_refused_unopened(folder, checkpoint, reason, secret)
    assert load(folder)[0].step == 4


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@needs_linux
def test_f21_a_file_that_is_a_link_is_refused_though_its_bytes_are_right(name, folder):
    checkpoint, secret = folder / "step-00000005", folder.parent / "secret"
    (checkpoint / name).rename(secret)
    (checkpoint / name).symlink_to(secret)
    check_refused_unopened(folder, checkpoint, re.escape(name), secret)
    assert load(folder)[0].step == 4


@pytest.mark.parametrize("value", [b"NaN", b"Infinity"])
@pytest.mark.parametrize("key", [b"num_steps", b"num_samples"])
def test_f21_a_count_that_is_no_number_is_refused(key, value, folder):
    checkpoint = folder / "step-00000005"
    text, replaced = re.subn(
        rb'"%s": \d+' % key, b'"%s": %s' % (key, value), (checkpoint / "state.json").read_bytes()
    )
    assert replaced
    (checkpoint / "state.json").write_bytes(text)
    sign(checkpoint)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(folder, which=checkpoint)


def test_f21_a_manifest_that_lists_nothing_is_refused(folder):
    sign(folder / "step-00000005", files={})
    with pytest.raises(CheckpointError, match=r"has no state\.json"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"NaN",
        b'{"step": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"format": 1, "step": 5, "files": {}, "sha256": "0"}',
    ],
    ids=range(9),
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_f21_json_with_tricks_is_refused(name, text, folder):
    checkpoint = folder / "step-00000005"
    (checkpoint / name).write_bytes(text)
    if name == "state.json":
        sign(checkpoint)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(folder, which=checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        (10**10).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little"),
        (8).to_bytes(8, "little") + b"{" * 8,
        b"",
    ],
    ids=["10 GB", "2**63", "no JSON", "empty"],
)
def test_f21_a_safetensors_header_with_tricks_is_refused(header, folder):
    checkpoint = folder / "step-00000005"
    (checkpoint / "optimizer.safetensors").write_bytes(header)
    sign(checkpoint)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        load(folder, which=checkpoint)


def test_foreign_files_in_a_checkpoint_are_left_alone(folder, finish):
    (folder / "step-00000005" / "README.md").write_text("the good one")
    (folder / "notes.txt").write_text("mine")
    assert load(folder)[0].step == 5
    (folder / "notes.txt").unlink()
    finish(folder)


def test_a_state_of_another_shape_is_refused_with_the_differences_and_nothing_is_loaded(tmp_path):
    cpu = SingleDevice("cpu")
    save_checkpoint(tmp_path, new_state(), strategy=cpu)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 17), torch.nn.Dropout(0.3), torch.nn.Linear(17, 1, bias=False)
    )
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), extras={"ema": model})
    weights = [weight.clone() for weight in model.parameters()]
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path, state, strategy=cpu)
    for line in (
        "- extras.ema is in the run only",
        "- lr_scheduler is in the checkpoint only",
        "- model: 0.weight is float32 (16, 8) in the checkpoint, float32 (17, 8) here",
        "nothing was loaded",
    ):
        assert line in str(error.value)
    assert all(map(torch.equal, weights, model.parameters()))
