"""Records as rows of a CSV file."""

import csv
import os

import pandas as pd
import pytest
from tracked_runs import KilledAt, killed, killed_at_step, train

from manualloop import ConfigError
from manualloop.tracking import csv_file
from manualloop.types import TrackedRun


def opened(path, run="one", records=()):
    tracker = csv_file(path)
    tracker.open_run(TrackedRun(run, None, list(records), {}))
    return tracker


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check(path, history):
    names = {name for record in history for name in record}
    found = rows(path)
    assert len({row.pop("run") for row in found}) == 1
    assert [{n: _value(v) for n, v in row.items() if v} for row in found] == history
    assert set(found[0]) == names


def _value(text):
    try:
        return float(text)
    except ValueError:
        return text


def test_the_rows_are_those_of_to_pandas_to_the_last_bit(tmp_path):
    check(
        path := tmp_path / "new" / "x.csv", train(None, [csv_file(path)], max_grad_norm=1.0).history
    )


@pytest.mark.parametrize("number", [5])
def test_a_killed_run_has_each_row_once(number, tmp_path):
    path = tmp_path / "x.csv"
    tracker = KilledAt(csv_file(path), number, is_after=True)
    killed(train, tmp_path / "run", [tracker])
    check(path, train(tmp_path / "run", [csv_file(path)]).history)


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
    path = tmp_path / "x.csv"
    killed(train, tmp_path / "run", [csv_file(path)], killed_at_step(7))
    with path.open("a") as file:
        file.write("4f2a,7,0.")
    check(path, train(tmp_path / "run", [csv_file(path)]).history)


def test_several_runs_share_a_file_and_each_replaces_its_own_rows(tmp_path):
    path = tmp_path / "folds.csv"
    histories = {}
    for fold in range(2):
        killed(train, tmp_path / str(fold), [csv_file(path)], killed_at_step(7))
        histories[fold] = train(tmp_path / str(fold), [csv_file(path)]).history
    found = rows(path)
    assert len({row["run"] for row in found}) == 2
    assert [int(row["step"]) for row in found] == [
        record["step"] for fold in (0, 1) for record in histories[fold]
    ]


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "no csv", "run,step\n", b"\x89PNG\r\n\x00\xff", "\n"]
)
def test_a_file_of_something_else_is_refused_and_stays(text, tmp_path):
    path = tmp_path / "mine.csv"
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not a file of csv_file.* Name another file\."):
        train(None, [csv_file(path)])
    assert path.read_bytes() == content


def test_an_empty_file_is_taken(tmp_path):
    (tmp_path / "x.csv").touch()
    tracker = opened(tmp_path / "x.csv")
    tracker({"step": 1, "epoch": 1.0, "loss": 0.5})
    tracker.close_run(True)
    assert (tmp_path / "x.csv").read_text() == "run,step,epoch,loss\none,1,1.0,0.5\n"


def test_texts_lists_and_names_with_commas_come_back(tmp_path):
    text = 'a "b", c\nd'
    tracker = opened(tmp_path / "x.csv")
    tracker({"step": 1, "epoch": 1.0, "eval_text": text, "eval_list": [1, 2], 'eval_"a, b"': 0.5})
    tracker({"step": 2, "epoch": 2.0, "eval_text": None, "loss": float("nan")})
    tracker.close_run(True)
    first, second = rows(tmp_path / "x.csv")
    assert first["eval_text"] == text
    assert first["eval_list"] == "[1, 2]"
    assert first['eval_"a, b"'] == "0.5"
    assert [name for name, value in second.items() if value] == ["run", "step", "epoch", "loss"]
    table = pd.read_csv(tmp_path / "x.csv")
    assert list(table["eval_text"].fillna("")) == [text, ""]


def test_texts_of_any_length_come_back(tmp_path):
    path, long = tmp_path / "history.csv", "word " * 100_000  # csv reads 131,072 characters
    limit = csv.field_size_limit()
    tracker = opened(path)
    tracker({"step": 1, "epoch": 0.5, "eval_text": long})
    tracker.close_run(True)
    opened(path, "two").close_run(True)
    assert csv.field_size_limit() == limit
    (row,) = pd.read_csv(path).to_dict("records")
    assert row["eval_text"] == long


def test_a_full_disk_leaves_no_half_row(tmp_path):
    tracker = opened(tmp_path / "x.csv", records=[{"step": 1, "epoch": 1.0, "loss": 0.5}])
    before = (tmp_path / "x.csv").read_text()
    file, calls = tracker._file, []

    class Full:
        def write(self, text):
            file.write(text[:5])

        def flush(self):
            file.flush()
            calls.append("flush")
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(file, name)

    tracker._file = Full()
    with pytest.raises(OSError, match="No space"):
        tracker({"step": 2, "epoch": 2.0, "loss": 0.25})
    tracker._file = file
    assert (tmp_path / "x.csv").read_text() == before
    tracker({"step": 2, "epoch": 2.0, "loss": 0.25})
    assert (tmp_path / "x.csv").read_text() == before + "one,2,2.0,0.25\n"
    tracker.close_run(True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*Permission denied"):
        train(None, [csv_file(tmp_path / "x.csv")])


@pytest.mark.parametrize("path", ["", "s3://bucket/x.csv", 3])
def test_what_is_no_path_is_refused_at_the_call(path):
    with pytest.raises(ConfigError, match="path"):
        csv_file(path)
