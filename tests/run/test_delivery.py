"""Each tracker gets every record once, over all processes of a run."""

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import threading
from functools import partial

import pytest
from tracked_runs import NUM_STEPS, KilledAt, killed, killed_at_step, train

from manualloop import ConfigError
from manualloop.run import delivery
from manualloop.run.delivery import TRACKING, Delivery
from manualloop.run.report import History
from manualloop.tracking import csv_file, tensorboard


class Lines:
    """Keeps records as lines of a file; with ``is_live`` also those that no checkpoint knows."""

    def __init__(self, path, *, is_live):
        self.path, self.is_live = path, is_live
        self.closed = None

    def open_run(self, run):
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if self.is_live:
            whole = [json.dumps(record) + "\n" for record in run.records]
        self.path.write_text("".join(whole))
        return len(whole)

    def __call__(self, record):
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def close_run(self, is_finished):
        self.closed = is_finished

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def appended(path):
    """A function of the user, which knows nothing of runs."""

    def append(record):
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    return append


def all_kinds(folder):
    return [
        Lines(folder / "live", is_live=True),
        Lines(folder / "kept", is_live=False),
        appended(folder / "appended"),
    ]


def without_repetition(records):
    return [record for n, record in enumerate(records) if n == 0 or record != records[n - 1]]


def check(folder, expected, at=None):
    live, kept, _ = all_kinds(folder)
    assert live.read() == kept.read() == expected, at
    found = Lines(folder / "appended", is_live=False).read()
    assert without_repetition(found) == expected, at
    return len(found) - len(expected)


POINTS = [("step", step, False) for step in range(1, NUM_STEPS + 1)] + [
    (kind, number, is_after)
    for kind in range(3)
    for number in range(1, 11)
    for is_after in (False, True)
]


def check_kill(point, folder, expected):
    place, number, is_after = point
    folder.mkdir()
    trackers, on_step = all_kinds(folder), None
    if place == "step":
        on_step = killed_at_step(number)
    else:
        trackers[place] = KilledAt(trackers[place], number, is_after=is_after)
    killed(train, folder / "run", trackers, on_step)
    result = train(folder / "run", all_kinds(folder))
    assert result.history == expected
    num_twice = check(folder, expected, point)
    # A function is called again with the record of which it was not noted that it had it.
    assert num_twice == (place == 2 and is_after), point


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    history = train(folder / "run", all_kinds(folder)).history
    assert check(folder, history) == 0
    assert [record["step"] for record in history] == [1, 2, 3, 4, 6, 6, 8, 9, 10, 10]
    return history


def test_a_killed_and_resumed_run_neither_repeats_nor_drops_a_record(tmp_path, expected):
    for number, point in enumerate(POINTS[4::9]):
        check_kill(point, tmp_path / str(number), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_run_that_is_killed_at_each_point(point, tmp_path, expected):
    check_kill(point, tmp_path / "folder", expected)


def test_a_run_that_is_killed_again_and_again(tmp_path, expected):
    for step in (3, 5, 6, 9):
        killed(train, tmp_path / "run", all_kinds(tmp_path), killed_at_step(step))
    train(tmp_path / "run", all_kinds(tmp_path))
    assert check(tmp_path, expected) == 0


def test_records_that_the_resumed_run_makes_otherwise_replace_those_that_were_lost(tmp_path):
    killed(train, tmp_path / "run", all_kinds(tmp_path), killed_at_step(8), log_every=1)
    result = train(tmp_path / "run", all_kinds(tmp_path), log_every=3)
    steps = [record["step"] for record in result.history if "loss" in record]
    assert steps == [1, 2, 3, 4, 6, 9, 10]  # 5 and 7 were lost
    assert check(tmp_path, result.history) == 0


def test_a_tracker_that_is_added_later_gets_the_earlier_records_first(tmp_path, expected):
    killed(train, tmp_path / "run", [], killed_at_step(6))
    train(tmp_path / "run", all_kinds(tmp_path))
    assert check(tmp_path, expected) == 0


def test_a_finished_run_sends_what_is_missing_and_nothing_twice(tmp_path, expected):
    killed(train, tmp_path / "run", [KilledAt(print, 10, is_after=False)])  # after the last save
    train(tmp_path / "run", all_kinds(tmp_path))
    assert check(tmp_path, expected) == 0
    (tmp_path / "live").unlink()
    train(tmp_path / "run", all_kinds(tmp_path))
    assert not (tmp_path / "live").exists()  # it has all, and is not opened
    (tmp_path / "live").write_text((tmp_path / "kept").read_text())
    assert check(tmp_path, expected) == 0


def test_without_a_checkpoint_dir_records_come_at_once(tmp_path):
    seen = []
    steps = []

    def on_step(step):
        steps.append((step.index, len(seen)))

    result = train(None, [seen.append], on_step)
    assert seen == result.history
    assert steps[:4] == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_with_a_checkpoint_dir_a_function_gets_what_a_checkpoint_knows(tmp_path):
    known, live = [], Lines(tmp_path / "live", is_live=True)
    counts = []

    def on_step(step):
        counts.append((len(known), len(live.read())))

    train(tmp_path / "run", [known.append, live], on_step)
    assert counts == [(0, n) for n in (0, 1, 2, 3)] + [(4, 4)] * 2 + [(4, 6)] * 2 + [
        (7, 7),
        (7, 8),
    ]


def test_a_tracker_cannot_change_the_history(tmp_path, expected):
    def spoil(record):
        record.clear()

    assert train(None, [spoil]).history == expected


def test_a_tracker_that_raises_gets_its_records_later_and_is_reported_once(
    tmp_path, expected, caplog
):
    seen = []

    def fails_thrice(record):
        fails_thrice.count += 1
        if 2 <= fails_thrice.count <= 4:
            raise ConnectionError("no route to host")
        seen.append(record)

    fails_thrice.count = 0
    delivery_wait = delivery._SECONDS_BETWEEN_TRIES
    vars(delivery)["_SECONDS_BETWEEN_TRIES"] = 0.0
    try:
        result = train(tmp_path / "run", [fails_thrice, other := Seen()])
    finally:
        vars(delivery)["_SECONDS_BETWEEN_TRIES"] = delivery_wait
    assert seen == other == result.history == expected
    told = [record.message for record in caplog.records if "no route to host" in record.message]
    assert len(told) == 1
    assert (
        "fails_thrice raised ConnectionError('no route to host') at the record of step" in told[0]
    )
    assert "has taken the records that it had refused" in caplog.text


class Seen(list):
    def __call__(self, record):
        self.append(record)


def test_what_a_tracker_lacks_at_the_end_is_reported_and_the_same_command_sends_it(
    tmp_path, expected, caplog
):
    seen = []
    is_down = True

    def server(record):
        if is_down and len(seen) == 3:
            raise TimeoutError("timed out")
        seen.append(record)

    train(tmp_path / "run", [server])
    assert len(seen) == 3
    assert (
        "server lacks 7 of 10 records, from step 4 on (TimeoutError('timed out')). They are in "
        f"{tmp_path / 'run'}, and the same command sends them." in caplog.text
    )
    is_down = False
    train(tmp_path / "run", [server])
    assert seen == expected


def test_a_tracker_that_always_fails_is_not_asked_at_each_step(tmp_path):
    calls = []

    def fails(record):
        calls.append(record)
        raise TimeoutError

    train(None, [fails])
    assert len(calls) == 2  # the first record, and that at the end: a minute is not over


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (print, "trackers is a builtin_function_or_method, not a list of functions"),
        ("wandb", "trackers is a str, not a list of functions"),
        (["wandb"], "trackers holds 'wandb', which is no function"),
        (
            [csv_file],
            r"holds the function csv_file itself. Call it: trackers=\[csv_file\(\.\.\.\)\]",
        ),
        ([lambda: None], r"will be called as trackers\(record\), but it takes \(\)"),
        ([None], "trackers holds None"),
    ],
)
def test_what_is_no_tracker_is_refused_before_anything_is_made(trackers, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", trackers)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_be_opened_ends_the_run_before_the_first_update(tmp_path):
    closed = Lines(tmp_path / "lines", is_live=True)
    steps = []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"csv_file\('.*file/x.csv'\) cannot be opened: .*Fix"):
        train(None, [closed, csv_file(tmp_path / "file" / "x.csv")], steps.append)
    assert (steps, closed.closed) == ([], False)


@pytest.mark.parametrize("end", [KeyboardInterrupt, ZeroDivisionError])
def test_trackers_are_closed_when_the_run_breaks_off(end, tmp_path):
    tracker = Lines(tmp_path / "lines", is_live=True)

    def on_step(step):
        if step.index == 5:
            raise end

    with pytest.raises(end):
        train(None, [tracker], on_step)
    assert tracker.closed is False
    assert len(tracker.read()) == 4


def test_trackers_are_closed_after_sigterm_and_told_that_the_run_is_not_over(tmp_path, expected):
    def on_step(step):
        if step.index == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    first, second = (Lines(tmp_path / "lines", is_live=False) for _ in range(2))
    with pytest.raises(SystemExit):
        train(tmp_path / "run", [first], on_step)
    assert first.closed is False
    assert first.read() == expected[:4]  # all that the checkpoint knows
    train(tmp_path / "run", [second])
    assert second.closed is True
    assert second.read() == expected


def test_an_evaluation_that_a_signal_breaks_off_is_one_record_when_it_is_made(tmp_path):
    calls = []

    def evaluate():
        calls.append(1)
        if len(calls) == 2:  # that of step 6, which has a record of training, too
            os.kill(os.getpid(), signal.SIGTERM)
        return {"f1": 0.5}

    with pytest.raises(SystemExit):
        train(tmp_path / "run", all_kinds(tmp_path), evaluate=evaluate)
    result = train(tmp_path / "run", all_kinds(tmp_path), evaluate=evaluate)
    assert [record["step"] for record in result.history] == [1, 2, 3, 4, 6, 6, 8, 9, 10, 10]
    assert check(tmp_path, result.history) == 0


def test_a_run_of_a_folder_without_notes_is_sent_from_its_first_record(tmp_path, expected):
    train(tmp_path / "run", [], num_epochs=1)  # as an earlier release has left it
    train(tmp_path / "run", all_kinds(tmp_path))
    history = train(tmp_path / "run", []).history
    assert check(tmp_path, history) == 0


def test_an_extended_run_continues_with_its_trackers(tmp_path):
    train(tmp_path / "run", all_kinds(tmp_path), num_epochs=1)
    result = train(tmp_path / "run", all_kinds(tmp_path), num_epochs=3)
    assert check(tmp_path, result.history) == 0


def test_an_older_checkpoint_than_the_trackers_know_repeats_nothing(tmp_path, expected, caplog):
    train(tmp_path / "run", all_kinds(tmp_path))
    (tmp_path / "run" / "step-00000010" / "model.safetensors").unlink()
    train(tmp_path / "run", all_kinds(tmp_path))
    assert check(tmp_path, expected) == 0
    assert caplog.text.count("They stay, and are not sent again.") == 2


def test_a_copied_folder_is_another_run_and_a_moved_one_the_same(tmp_path):
    ids = []

    class Ids(Seen):
        def open_run(self, run):
            ids.append((run.id, run.name))
            return 0

    train(tmp_path / "a", [Ids()], num_epochs=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "b", [Ids()])
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    train(tmp_path / "c", [Ids()])
    (first, copied, moved) = ids
    assert first[0] == moved[0] != copied[0]
    assert (first[1], copied[1], moved[1]) == ("a", "b", "c")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"id": "x", "directory": "y", "delivered": {"f": -1}}', "\xff" * 9]
)
def test_notes_that_cannot_be_read_begin_a_new_run(text, tmp_path, caplog):
    (tmp_path / TRACKING).write_text(text, encoding="latin-1")
    seen = Seen()
    found = Delivery([seen], tmp_path)
    found.open([{"step": 1}], {}, is_finished=False)
    assert seen == [{"step": 1}]
    assert "cannot be read" in caplog.text
    assert json.loads((tmp_path / TRACKING).read_text())["delivered"] == {"Seen": 1}


def test_notes_that_cannot_be_written_are_reported_and_end_no_run(tmp_path, caplog):
    seen = Seen()
    found = Delivery([seen], tmp_path)
    (tmp_path / f".{TRACKING}.tmp").mkdir()
    found.open([], {}, is_finished=False)
    found.deliver([{"step": 1}, {"step": 2}], 2, 2)
    assert len(seen) == 2
    assert caplog.text.count("cannot be written") == 1


def test_notes_are_forced_to_disk_once_a_delivery(tmp_path, monkeypatch):
    fsync, forced, seen = os.fsync, [], Seen()

    def noted_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        forced.append(path) if TRACKING in path else None
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    found = Delivery([seen], tmp_path)
    found.open([], {}, is_finished=False)
    records = [{"step": step} for step in range(1, 101)]
    found.deliver(records, 100, 60)
    found.deliver(records, 100, 60)  # nothing new
    assert (len(seen), len(forced)) == (60, 2)
    found.close(records, 100, 100, is_finished=True)
    assert (seen, len(forced)) == (records, 3)
    assert os.listdir(tmp_path) == [TRACKING]


class Interrupted(Seen):
    """Ends the delivery, as a kill does, at a record."""

    def __call__(self, record):
        if record["step"] == 7:
            raise KeyboardInterrupt
        super().__call__(record)


def test_what_a_tracker_got_in_a_delivery_that_did_not_end_is_known(tmp_path):
    records = [{"step": step} for step in range(1, 11)]
    first = Delivery([Interrupted()], tmp_path)
    first.open([], {}, is_finished=False)
    with pytest.raises(KeyboardInterrupt):
        first.deliver(records, 10, 10)
    os.close(first._journal)
    notes = json.loads((tmp_path / TRACKING).read_text())
    assert notes["delivered"] == {}  # the rest is in the journal
    (journal,) = set(tmp_path.iterdir()) - {tmp_path / TRACKING}
    # The power has failed while a line was written, and somebody has left another one.
    journal.write_bytes(journal.read_bytes() + b'[1]\n{"Seen": -4}\n{"Interrupted": 9')
    second = Delivery([seen := Interrupted()], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        second.open(records, {}, is_finished=False)  # at the seventh, of which nobody knows
    assert seen == []
    (tmp_path / TRACKING).unlink()
    third = Delivery([seen := Interrupted()], tmp_path)  # the journal belongs to the notes
    with pytest.raises(KeyboardInterrupt):
        third.open(records, {}, is_finished=False)
    assert seen == records[:6]
    os.close(third._journal)


def test_a_folder_may_keep_its_runs_from_sending_records(tmp_path):
    delivery.send_nothing(tmp_path / "run")
    train(tmp_path / "run", [seen := Seen()])
    assert seen == []
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(tmp_path / "copy", [seen], num_epochs=3)
    assert seen == []


def test_trackers_of_the_same_name_are_told_apart(tmp_path):
    first, second = [], []
    train(tmp_path / "run", [partial(keep, first), partial(keep, second)])
    assert json.loads((tmp_path / "run" / TRACKING).read_text())["delivered"] == {
        "keep": 10,
        "keep (2)": 10,
    }
    assert first == second


def keep(where, record):
    where.append(record)


def test_a_record_whose_loss_has_not_landed_waits_with_those_behind_it():
    class Late:
        def has_landed(self):
            return False

    history = History()
    history.records = [{"step": 1}, {"step": 2, "loss": None}, {"step": 2, "eval_f1": 0.5}]
    assert history.num_complete == 3
    history._pending = [(history.records[1], Late(), None, [])]
    assert history.num_complete == 1
    # Equal records are told apart.
    history.records.insert(1, {"step": 2, "loss": None})
    assert history.num_complete == 2


def test_two_runs_at_once_have_trackers_of_their_own(tmp_path):
    seen = {name: Seen() for name in ("outer", "inner")}

    def on_step(step):
        if step.index == 5:
            train(tmp_path / "inner", [seen["inner"]])

    outer = train(tmp_path / "outer", [seen["outer"]], on_step)
    assert seen["outer"] == seen["inner"] == outer.history


def test_the_settings_of_the_run_are_plain_values(tmp_path):
    found = {}

    class Settings(Seen):
        def open_run(self, run):
            found.update(run.config)

    train(None, [Settings()], gradient_accumulation_steps=2)
    json.dumps(found)
    expected = {
        "model": "Linear",
        "num_parameters": 3,
        "num_trainable_parameters": 3,
        "optimizer": "SGD",
        "lr": 0.1,
        "lr_scheduler": "linear",
        "num_epochs": 2,
        "num_steps": 6,
        "gradient_accumulation_steps": 2,
        "num_processes": 1,
        "version_of_torch": importlib.metadata.version("torch"),
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_tracker_of_the_package_is_named_by_what_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert csv_file("x.csv").tracker_name == f"csv_file({str(tmp_path / 'x.csv')!r})"
    assert tensorboard("runs").tracker_name == f"tensorboard({str(tmp_path / 'runs')!r})"


def test_nothing_of_a_tracker_outlives_the_run(tmp_path):
    before = threading.active_count()
    train(tmp_path / "run", [tensorboard(tmp_path / "events"), csv_file(tmp_path / "x.csv")])
    assert threading.active_count() == before
    assert multiprocessing.active_children() == []
