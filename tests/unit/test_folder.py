"""Folders that are whole or not there."""

import errno
import os

import pytest

from manualloop.errors import CheckpointError
from manualloop.folder import (
    find_folders,
    list_names,
    read_manifest,
    remove_folder,
    sweep,
    verify_folder,
    write_folder,
)

CONTENT = {"metrics": {}, "best_metric": None, "contract": None}


def write(directory, step, files=(("a.txt", b"alpha"), ("b.txt", b"beta"))):
    def write_files(folder):
        for name, data in files:
            (folder / name).write_bytes(data)
            yield folder / name

    return write_folder(directory, step, write_files, CONTENT)


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
