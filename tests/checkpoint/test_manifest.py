"""Which checkpoint is the last, which the best, and what it costs to know."""

import math
import os
import shutil
import sys
from itertools import groupby
from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from tracked_runs import FORK

from manualloop import CheckpointError, TrainState, load_checkpoint, save_checkpoint
from manualloop.checkpoint.manifest import find_best, find_folders, find_last

OPENED = []


def note_opened():
    """For good, and every call of ``id`` takes longer then: in a process of its own alone."""
    sys.addaudithook(lambda event, args: event == "open" and OPENED.append(str(args[0])))


def counting(function, *arguments):
    """Call a function in a process of its own that notes what it opens; return its result."""
    ours, theirs = FORK.Pipe(duplex=False)

    def call():
        note_opened()
        theirs.send(function(*arguments))

    process = FORK.Process(target=call)
    process.start()
    theirs.close()
    result = ours.recv()
    process.join(600)
    return result


class Counted:
    """Files of a folder that are opened inside the ``with`` block, by the ends of their names."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __enter__(self):
        self.start = len(OPENED)
        return self

    def __exit__(self, *error):
        names = [name for name, _ in groupby(OPENED[self.start :])]  # open() may be two events
        found = [Path(name) for name in names if name.startswith(self.folder)]
        self.manifests = sum(path.name == "manifest.json" for path in found)
        self.others = {path for path in found if path.name != "manifest.json"}


def new_state():
    model = nn.Linear(1, 1)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def save(folder, state, step, keep=1000, **options):
    state.progress.num_steps = step
    with Counted(folder) as counted:
        save_checkpoint(folder, state, keep=keep, **options)
    return counted


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def forty_saves(folder):
    state = new_state()
    return [
        save(folder, state, step, metrics={"f1": 1 / step}, best_metric="f1")
        for step in range(1, 41)
    ]


def test_a_save_opens_the_same_files_however_many_checkpoints_are_kept(tmp_path):
    costs = counting(forty_saves, tmp_path)
    assert costs[0].others
    assert {len(cost.others) for cost in costs} == {len(costs[0].others)}
    assert {cost.manifests for cost in costs} == {costs[0].manifests}
    assert costs[-1].manifests <= 3  # written, and read back
    assert all(
        "step-00000040" in str(path) or path.parent == tmp_path
        for path in costs[-1].others
        if path != tmp_path
    )


def test_a_process_that_resumes_reads_each_manifest_once(tmp_path):
    state = new_state()
    for step in range(1, 21):
        save(tmp_path, state, step)
    script = tmp_path.with_suffix(".py")
    script.write_text(f"""if True:
        from test_manifest import Counted, Path, load_checkpoint, new_state, note_opened, save
        note_opened()
        folder, state = Path({str(tmp_path)!r}), new_state()
        with Counted(folder) as loading:
            load_checkpoint(folder, state)
        print(loading.manifests, *(save(folder, state, step).manifests for step in range(21, 26)))
    """)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    loading, *saves = map(int, processes.run(script, env=env).output.split())
    assert loading == 20
    assert set(saves) == {saves[0]}
    assert saves[0] <= 3


def saves_in_two_folders(folder):
    states = {name: new_state() for name in "ab"}
    return [
        save(folder / name, states[name], step).manifests for step in range(1, 11) for name in "ab"
    ]


def test_a_run_of_two_folders_reads_neither_again(tmp_path):
    costs = counting(saves_in_two_folders, tmp_path)
    assert costs[0] > 0
    assert len(set(costs[2:])) == 1


def test_a_folder_that_was_moved_is_read_at_its_new_place(tmp_path):
    state = new_state()
    for step in (1, 2, 3):
        save(tmp_path / "a", state, step, metrics={"f1": -step}, best_metric="f1")
    other = new_state()
    save(tmp_path / "b", other, 9)
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    assert find_last(tmp_path / "a").manifest["step"] == 9
    assert find_best(find_folders(tmp_path / "a")) is None
    assert find_last(tmp_path / "c").manifest["step"] == 3
    save(tmp_path / "c", state, 4, keep=1, metrics={"f1": -4}, best_metric="f1")
    assert names(tmp_path / "c") == ["step-00000001", "step-00000004"]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_with_another(path):
    other = path.parent.with_name("step-00000002") / path.name
    shutil.copyfile(other, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize(
    "harm",
    [
        os.remove,
        damage,
        lambda path: path.write_bytes(b""),
        lambda path: shutil.rmtree(path.parent),
    ],
    ids=["removed", "damaged", "emptied", "folder removed"],
)
def test_what_somebody_else_does_between_two_saves_is_seen(harm, tmp_path):
    """The best one is harmed: the best of the others counts, and nothing more is removed."""
    state = new_state()
    for step, f1 in [(1, 0.5), (2, 0.9), (3, 0.1)]:
        save(tmp_path, state, step, keep=1, metrics={"f1": f1}, best_metric="f1")
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    harm(tmp_path / "step-00000002" / "manifest.json")
    save(tmp_path, state, 4, keep=1, metrics={"f1": 0.2}, best_metric="f1")
    usable = [entry.path.name for entry in find_folders(tmp_path) if entry.manifest]
    assert usable == ["step-00000004"]
    assert set(names(tmp_path)) <= {"step-00000002", "step-00000004"}
    assert load_checkpoint(tmp_path, state, which="best").step == 4


def test_a_manifest_that_was_replaced_counts_as_it_is_now(tmp_path):
    state = new_state()
    for step in (1, 2, 3):
        save(tmp_path, state, step)
    replace_with_another(tmp_path / "step-00000003" / "manifest.json")
    assert sorted(entry.manifest["step"] for entry in find_folders(tmp_path)) == [1, 2, 2]


def test_a_manifest_of_the_same_size_and_time_is_still_another(tmp_path):
    state = new_state()
    save(tmp_path, state, 1, metrics={"f1": 0.25}, best_metric="f1")
    path = tmp_path / "step-00000001" / "manifest.json"
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (entry,) = find_folders(tmp_path)
    assert "damaged" in entry.problem


def test_the_best_follows_the_newest_best_metric(tmp_path):
    state = new_state()
    scores = [(0.9, 0.5), (0.5, 0.1), (0.7, 0.9)]
    for step, ((f1, loss), best_metric) in enumerate(
        zip(scores, ["f1", "f1", "-loss"], strict=True)
    ):
        save(tmp_path, state, step, metrics={"f1": f1, "loss": loss}, best_metric=best_metric)
    assert find_best(find_folders(tmp_path)).manifest["step"] == 1
    save(tmp_path, state, 3, metrics={"f1": 0.1, "loss": 9.0}, best_metric="f1")
    assert find_best(find_folders(tmp_path)).manifest["step"] == 0
    save(tmp_path, state, 4)  # without one
    assert find_best(find_folders(tmp_path)).manifest["step"] == 0


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([math.nan, 0.5, 0.7], 3),
        ([0.5, math.nan, math.nan], 1),
        ([math.nan, math.nan], 1),
        ([-math.inf, math.nan], 1),
        ([math.nan, -math.inf], 1),
        ([0.5, math.inf, math.nan], 2),
        ([0.5, 0.5], 1),
        (["high", 0.1, None], 2),
    ],
)
@pytest.mark.parametrize("sign", ["", "-"])
def test_the_best_of_odd_metrics(values, best, sign, tmp_path):
    """NaN is the worst, of equals the first is the best, and what is no number does not count."""
    state = new_state()
    for step, value in enumerate(values, start=1):
        value = -value if sign and isinstance(value, float) else value
        save(tmp_path, state, step, metrics={"f1": value}, best_metric=f"{sign}f1")
    assert find_best(find_folders(tmp_path)).manifest["step"] == best
    save(tmp_path, state, 9, keep=1, metrics={"f1": math.nan}, best_metric=f"{sign}f1")
    assert load_checkpoint(tmp_path, state, which="best").step == best


def test_what_was_loaded_does_not_change_what_is_known_of_the_folder(tmp_path):
    state = new_state()
    save(tmp_path, state, 1, metrics={"f1": 0.5}, best_metric="f1")
    info = load_checkpoint(tmp_path, state)
    info.metrics["f1"] = 9.0
    assert find_folders(tmp_path)[0].manifest["metrics"] == {"f1": 0.5}


def test_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_checkpoint(tmp_path, new_state())
    save(tmp_path, state := new_state(), 1)
    with pytest.raises(CheckpointError, match="saved with a best_metric"):
        load_checkpoint(tmp_path, state, which="best")
