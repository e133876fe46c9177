"""Folders that are whole or not there."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from manualloop.checkpoint.files import verify_folder
from manualloop.checkpoint.folders import remove_folder, sweep, write_folder
from manualloop.checkpoint.manifest import (
    find_folders,
    list_names,
    manifest_bytes,
    read_manifest,
)
from manualloop.errors import CheckpointError

CONTENT = {"metrics": {}, "best_metric": None, "contract": None}


def write(directory, step, files=(("a.txt", b"alpha"), ("b.txt", b"beta"))):
    def write_files(folder):
        for name, data in files:
            (folder / name).write_bytes(data)
            yield folder / name

    return write_folder(directory, step, write_files, CONTENT)


def forge(folder, **changes):
    """Write a manifest whose own sha256 is right."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_bytes()), **changes}
    path.write_bytes(manifest_bytes({k: v for k, v in manifest.items() if v is not LEFT_OUT}))


LEFT_OUT = object()


def flipped(data, every=1):
    """Copies of the bytes with one bit flipped; an odd ``every`` meets each of the eight."""
    for bit in range(0, 8 * len(data), every):
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(copy)


def check_whole(directory, names):
    """The directory holds these folders and nothing else, and each verifies."""
    assert sorted(os.listdir(directory)) == sorted(names)
    for name in names:
        verify_folder(directory / name, read_manifest(directory / name))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@pytest.fixture
def record(monkeypatch):
    """What is forced to disk and renamed, in this order."""
    fsync, rename, noted = os.fsync, os.rename, []

    def noted_fsync(descriptor):
        fsync(descriptor)
        noted.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_rename(source, target):
        rename(source, target)
        noted.append(("rename", Path(source), Path(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return noted


@needs_proc
def test_files_manifest_folder_rename_and_directory_are_in_this_order(tmp_path, record):
    final = write(tmp_path, 1)
    aside = record[0][1].parent
    assert aside.parent == tmp_path
    assert aside.name.startswith(".step-00000001.tmp-")
    assert record == [
        ("fsync", aside / "a.txt"),
        ("fsync", aside / "b.txt"),
        ("fsync", aside / "manifest.json"),
        ("fsync", aside),
        ("rename", aside, final),
        ("fsync", tmp_path),
    ]


def test_nothing_is_seen_under_the_name_before_the_folder_is_whole(tmp_path):
    def write_files(folder):
        assert folder.name.startswith(".")
        assert find_folders(tmp_path) == []
        (folder / "a.txt").write_bytes(b"alpha")
        yield folder / "a.txt"
        assert find_folders(tmp_path) == []

    assert write_folder(tmp_path, 1, write_files, CONTENT) == find_folders(tmp_path)[0].path


def test_the_manifest_has_the_sum_of_each_file_and_the_content(tmp_path):
    contract = {"same": {"é": [1, None, True]}, "exact": {}}
    content = {"metrics": {"f1": 0.1}, "best_metric": "-loss", "contract": contract}

    def write_files(folder):
        (folder / "a.txt").write_bytes(b"alpha")
        yield folder / "a.txt"

    manifest = read_manifest(write_folder(tmp_path, 3, write_files, content))
    assert manifest.pop("sha256")
    sha256 = hashlib.sha256(b"alpha").hexdigest()
    files = {"a.txt": {"size": 5, "sha256": sha256}}
    assert manifest == {"format": 1, "step": 3, **content, "files": files}


def test_a_folder_is_written_and_verifies(tmp_path):
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "step-00000007"
    manifest = read_manifest(folder)
    assert manifest["step"] == 7
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        "a.txt": 5,
        "b.txt": 4,
    }
    verify_folder(folder, manifest)
    assert sorted(os.listdir(tmp_path)) == ["step-00000007"]


def test_a_second_folder_of_a_step_has_a_number_and_counts_as_newer(tmp_path):
    names = [write(tmp_path, step).name for step in (7, 7, 7, 100_000_000, 8)]
    assert names == [
        "step-00000007",
        "step-00000007-2",
        "step-00000007-3",
        "step-100000000",
        "step-00000008",
    ]
    found = [entry.path.name for entry in find_folders(tmp_path)]
    assert found == [names[3], names[4], names[2], names[1], names[0]]


def test_the_step_in_the_manifest_counts_and_not_the_clock(tmp_path):
    for step in (9, 10, 2):
        write(tmp_path, step)
    os.utime(tmp_path / "step-00000002")
    os.utime(tmp_path / "step-00000010", (0, 0))
    write(tmp_path, 11).rename(tmp_path / "step-00000001")
    found = find_folders(tmp_path)
    assert [entry.manifest["step"] for entry in found] == [11, 10, 9, 2]
    assert found[0].path.name == "step-00000001"


def test_a_number_is_never_used_again_while_a_later_one_is_there(tmp_path):
    first, second, third = (write(tmp_path, 7) for _ in range(3))
    remove_folder(first)
    remove_folder(second)
    assert write(tmp_path, 7).name == "step-00000007-4"
    remove_folder(third)
    (tmp_path / "step-00000008").write_text("a file of this name")
    assert write(tmp_path, 8).name == "step-00000008-2"


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-9-backup",
        "step-1",
        "STEP-00000001",
        "step-00000009-",
        "step-00000009-2-backup",
        "step-00000009.bak",
        "my-step-00000009",
        "step--0000009",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669",
        ".step-00000009.tmp",
        ".step-00000009.tmp-xyz",
        ".step-00000009.old-00ff",
        "x.step-00000009.tmp-00ff",
    ],
)
def test_folders_of_others_are_ignored_and_untouched(name, tmp_path):
    shutil.copytree(write(tmp_path, 9), tmp_path / name)
    (tmp_path / "step-00000010").write_text("a file")
    remove_folder(tmp_path / "step-00000009")
    assert find_folders(tmp_path) == []
    sweep(tmp_path)
    assert write(tmp_path, 9).name == "step-00000009"
    assert {path.name for path in (tmp_path / name).iterdir()} == {
        "a.txt",
        "b.txt",
        "manifest.json",
    }
    assert (tmp_path / "step-00000010").read_text() == "a file"


@pytest.mark.parametrize("number", range(5))
def test_a_disk_that_is_full_at_any_fsync_or_at_the_rename_leaves_nothing_behind(
    number, tmp_path, monkeypatch
):
    write(tmp_path, 1)
    fsync, rename, calls = os.fsync, os.rename, []

    def fail_or(function, *arguments):
        calls.append(function)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)

    monkeypatch.setattr(os, "fsync", lambda *a: fail_or(fsync, *a))
    monkeypatch.setattr(os, "rename", lambda *a: fail_or(rename, *a))
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    assert len(calls) > number
    check_whole(tmp_path, ["step-00000001"])
    monkeypatch.undo()
    write(tmp_path, 2)
    check_whole(tmp_path, ["step-00000001", "step-00000002"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_to_a_full_disk_leaves_nothing_behind(tmp_path):
    write(tmp_path, 2)

    def write_files(folder):
        (folder / "a.txt").write_bytes(b"alpha")
        yield folder / "a.txt"
        (folder / "b.txt").symlink_to("/dev/full")
        (folder / "b.txt").write_bytes(b"beta")

    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path, 2, write_files, CONTENT)
    check_whole(tmp_path, ["step-00000002"])
    assert Path("/dev/full").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_stops_the_writing_leaves_nothing_behind(error, tmp_path):
    def write_files(folder):
        (folder / "a.txt").write_bytes(b"alpha")
        yield folder / "a.txt"
        raise error

    with pytest.raises(error):
        write_folder(tmp_path, 1, write_files, CONTENT)
    assert os.listdir(tmp_path) == []


def test_content_that_is_no_json_leaves_nothing_behind(tmp_path):
    for value in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_folder(tmp_path, 1, lambda folder: [], {**CONTENT, "metrics": {"x": value}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", ["nothing", "one file", "all files"])
def test_an_error_leaves_nothing_behind(after, tmp_path):
    write(tmp_path, 1)

    def write_files(folder):
        if after != "nothing":
            (folder / "a.txt").write_bytes(b"alpha")
            yield folder / "a.txt"
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_folder(tmp_path, 2, write_files, CONTENT)
    assert os.listdir(tmp_path) == ["step-00000001"]
    verify_folder(tmp_path / "step-00000001", read_manifest(tmp_path / "step-00000001"))


@pytest.mark.parametrize("change", ["another byte", "longer", "missing", "a folder", "a link"])
def test_a_changed_file_is_named(change, tmp_path):
    folder = write(tmp_path, 1)
    path = folder / "b.txt"
    if change == "another byte":
        path.write_bytes(b"beto")
    elif change == "longer":
        path.write_bytes(b"beta and more")
    else:
        path.rename(tmp_path / "elsewhere")
    if change == "a folder":
        path.mkdir()
    elif change == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"b\.txt"):
        verify_folder(folder, read_manifest(folder))


def test_damaged_folders_are_listed_with_what_is_wrong(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").unlink()
    (tmp_path / "step-00000003").mkdir()
    found = find_folders(tmp_path)
    assert list(list_names(found)) == [
        "step-00000003 (no manifest.json)",
        "step-00000002 (no manifest.json)",
        "step-00000001 (whole)",
    ]


def test_removing_and_sweeping_touch_only_what_is_ours(tmp_path):
    folder = write(tmp_path, 1)
    write(tmp_path, 2)
    remove_folder(folder)
    remove_folder(folder)  # again: it is gone
    for name in (".step-00000003.tmp-00ff", ".step-00000003-2.trash-0a", ".step-3.tmp-00", ".git"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".git", ".step-3.tmp-00", "step-00000002"]


def test_a_directory_that_is_not_there_holds_nothing(tmp_path):
    assert find_folders(tmp_path / "no") == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for bit, data in flipped(whole, every=9):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            pytest.fail(f"bit {bit} was read as {read_manifest(folder)}")
    path.write_bytes(whole)
    check_whole(tmp_path, [folder.name])


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
def test_every_flipped_bit_of_a_file_is_refused_by_its_name(name, tmp_path):
    folder = write(tmp_path, 1)
    manifest, path = read_manifest(folder), folder / name
    whole = path.read_bytes()
    for bit, data in flipped(whole):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"^{name} is damaged"):
            pytest.fail(f"bit {bit}: {verify_folder(folder, manifest)}")
    path.write_bytes(whole)
    verify_folder(folder, manifest)


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "manifest.json"])
def test_a_truncated_file_is_refused_by_its_name(name, tmp_path):
    folder = write(tmp_path, 1)
    path = folder / name
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=rf"^{name} (has {size} bytes|is damaged)"):
            verify_folder(folder, read_manifest(folder))


def test_a_byte_more_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    for name in ("a.txt", "manifest.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole + b"\n")
        with pytest.raises(CheckpointError, match=name):
            verify_folder(folder, read_manifest(folder))
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "../a.txt",
        "/etc/hostname",
        "sub/a.txt",
        "a.txt/",
        "./a.txt",
        "..",
        ".",
        "",
        "manifest.json",
        "..\\x",
        "a\0b",
        "a\nb",
        "\ud800",
    ],
    ids=repr,
)
def test_a_manifest_that_names_what_is_no_file_of_the_folder_is_refused(name, tmp_path):
    folder = write(tmp_path, 1)
    files = read_manifest(folder)["files"]
    forge(folder, files={**files, name: files["a.txt"]})
    with pytest.raises(CheckpointError, match="not a file of the folder") as error:
        read_manifest(folder)
    assert repr(name) in str(error.value)
    str(error.value).encode()  # it can be printed and logged


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": "a.txt"},
        {"files": None},
        {"files": LEFT_OUT},
        {"files": {"a.txt": 5}},
        {"files": {"a.txt": ["size", "sha256"]}},
        {"files": {"a.txt": {}}},
        {"files": {"a.txt": {"sha256": ""}}},
        {"files": {"a.txt": {"size": 5}}},
        {"step": "1"},
        {"step": 1.0},
        {"step": True},
        {"step": None},
        {"step": -1},
        {"step": LEFT_OUT},
        {"metrics": []},
        {"metrics": LEFT_OUT},
        {"best_metric": 3},
        {"best_metric": LEFT_OUT},
        {"contract": "none"},
        {"contract": LEFT_OUT},
    ],
    ids=lambda changes: repr(changes).replace(repr(LEFT_OUT), "left out"),
)
def test_a_manifest_of_other_types_is_refused(changes, tmp_path):
    folder = write(tmp_path, 1)
    forge(folder)
    read_manifest(folder)  # the forging itself is not what is refused
    forge(folder, **changes)
    with pytest.raises(CheckpointError, match="not one of ours"):
        read_manifest(folder)
    (entry,) = find_folders(tmp_path)
    assert entry.manifest is None
    assert entry.problem.startswith("manifest.json is not one of ours: ")


@pytest.mark.parametrize(
    "entry", [{"size": "5", "sha256": ""}, {"size": None, "sha256": None}, {"size": 5, "sha256": 5}]
)
def test_sizes_and_sums_of_other_types_fit_no_file(entry, tmp_path):
    folder = write(tmp_path, 1)
    forge(folder, files={"a.txt": entry})
    with pytest.raises(CheckpointError, match=r"not one of ours: files\.a\.txt\."):
        verify_folder(folder, read_manifest(folder))


@pytest.mark.parametrize("value", [2, 0, "1", None, [1], LEFT_OUT], ids=range(6))
def test_another_format_is_said_to_be_one(value, tmp_path):
    folder = write(tmp_path, 1)
    forge(folder, format=value, files="of the future")
    with pytest.raises(CheckpointError, match=r"^format .* is not 1: another version"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b"NaN",
        b'{"step": NaN}',
        b'{"step": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b"\0" * 100,
        b"1" * 10_000,
    ],
    ids=range(13),
)
def test_json_that_is_no_manifest_is_damaged(text, tmp_path):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"^manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("change", [b' "step"', b'"step":2,"step"'], ids=["a space", "twice"])
def test_a_manifest_of_the_same_content_in_other_bytes_is_damaged(change, tmp_path):
    path = write(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    assert data.count(b'"step"') == 1
    path.write_bytes(data.replace(b'"step"', change))
    with pytest.raises(CheckpointError, match=r"^manifest\.json is damaged"):
        read_manifest(path.parent)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a folder", "a pipe"])
def test_a_manifest_that_is_no_regular_file_is_refused_and_not_waited_for(kind, tmp_path):
    folder = write(tmp_path, 1)
    path = folder / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    if kind == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"^manifest\.json is a (link|folder|pipe)$"):
        read_manifest(folder)


@needs_proc
def test_no_file_is_left_open(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").rename(tmp_path / "elsewhere")
    before = len(os.listdir("/proc/self/fd"))
    (folder / "manifest.json").mkdir()
    with pytest.raises(CheckpointError):
        read_manifest(folder)
    verify_folder(folder, json.loads((tmp_path / "elsewhere").read_bytes()))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("link", "is a link"),
        ("dangling", "is a link"),
        ("folder", "is a folder"),
        ("pipe", "is a pipe"),
        ("missing", "is missing"),
    ],
)
def test_a_file_that_became_something_else_is_said_to_be_that(kind, reason, tmp_path):
    folder = write(tmp_path, 1)
    path = folder / "b.txt"
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=rf"^b\.txt {reason}$"):
        verify_folder(folder, read_manifest(folder))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_file_that_the_disk_cannot_read_is_named():
    manifest = {"files": {"mem": {"size": 0, "sha256": ""}}}
    with pytest.raises(OSError, match="Input/output error"), open("/proc/self/mem", "rb") as file:
        file.read(1)
    with pytest.raises(CheckpointError, match=r"^mem cannot be read: .*Input/output error"):
        verify_folder(Path("/proc/self"), manifest)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_name_that_no_disk_has_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    forge(folder, files={"a" * 300: {"size": 0, "sha256": ""}})
    with pytest.raises(CheckpointError, match=r"^a{300} cannot be read: .*name too long"):
        verify_folder(folder, read_manifest(folder))


def test_a_folder_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    folder, rmtree, seen = write(tmp_path, 1), shutil.rmtree, []

    def noted_rmtree(path, **options):
        seen.append((folder.exists(), Path(path).name, sorted(os.listdir(path))))
        return rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted_rmtree)
    remove_folder(folder)
    ((was_there, name, content),) = seen
    assert not was_there
    assert name.startswith(".step-00000001.trash-")
    assert content == ["a.txt", "b.txt", "manifest.json"]
    assert os.listdir(tmp_path) == []


def test_what_a_kill_left_half_removed_or_half_written_is_swept(tmp_path, monkeypatch):
    write(tmp_path, 1)
    # A kill: nothing after this point runs.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    remove_folder(write(tmp_path, 2))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, 3, files=Failing())
    monkeypatch.undo()
    left = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert sorted(name.split("-")[1] for name in left) == ["00000002.trash", "00000003.tmp"]
    assert [entry.path.name for entry in find_folders(tmp_path)] == ["step-00000001"]
    sweep(tmp_path)
    check_whole(tmp_path, ["step-00000001"])


class Failing:
    def __iter__(self):
        yield "a.txt", b"alpha"
        raise OSError(errno.ENOSPC, "full")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_link_to_a_folder_is_removed_without_what_it_points_to(tmp_path):
    kept = tmp_path / "kept"
    write(tmp_path, 1).rename(kept)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "step-00000001").symlink_to(kept)
    (directory / ".step-00000002.trash-00ff").symlink_to(kept)
    assert [entry.problem[:12] for entry in find_folders(directory)] == ["it is a link"]
    remove_folder(directory / "step-00000001")
    sweep(directory)
    assert os.listdir(directory) == []
    verify_folder(kept, read_manifest(kept))
