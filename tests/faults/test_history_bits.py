"""Every bit of ``history.jsonl`` flipped, and lines removed, doubled and cut."""

import json

import pytest
import torch

from manualloop import train_loop
from manualloop.run.history_file import HISTORY, HistoryFile, read_history


def records(number, start=1):
    return [{"step": n, "epoch": n / 4, "loss": 1 / n, "lr": 0.1} for n in range(start, number + 1)]


@pytest.fixture
def history(tmp_path):
    """Two processes: the first wrote six records, of which the second knew four."""
    first = records(6)
    file = HistoryFile(tmp_path, 0, 0)
    file.write(first)
    file.write_times({"total": 1.5})
    again = [*first[:4], *({**record, "loss": 9.0} for record in records(8, start=5))]
    HistoryFile(tmp_path, 4, 4).write(again)
    assert read_history(tmp_path) == read_history(tmp_path, 8) == again
    return tmp_path / HISTORY, again


def check(path, whole, caplog, num_records):
    caplog.clear()
    found = read_history(path.parent, num_records)
    rest = iter(whole)
    assert all(record in rest for record in found), "changed, added, or in another order"
    if len(found) < len(whole) and num_records is not None:
        (line,) = [r.getMessage() for r in caplog.records if HISTORY in r.getMessage()]
        assert "missing" in line
    return len(found)


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.exhaustive, id="all")])
def test_f27_a_flipped_bit_changes_no_record(stride, history, caplog):
    path, whole = history
    data, fewest, lost = path.read_bytes(), len(whole), 0
    with caplog.at_level("INFO", logger="manualloop"):
        for bit in range(0, 8 * len(data), stride):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            num_found = check(path, whole, caplog, len(whole))
            fewest, lost = min(fewest, num_found), lost + (num_found < len(whole))
            check(path, whole, caplog, None)
    print(f"{len(range(0, 8 * len(data), stride))} bits, {lost} with a record lost")
    assert fewest >= len(whole) - 2, "a flipped end of a line damages two"


@pytest.mark.parametrize("is_doubled", [False, True])
def test_f27_a_line_that_is_removed_or_doubled(is_doubled, history, caplog):
    path, whole = history
    lines = path.read_bytes().splitlines(keepends=True)
    with caplog.at_level("INFO", logger="manualloop"):
        for number in range(len(lines)):
            middle = lines[number : number + 1] * (2 * is_doubled)
            path.write_bytes(b"".join([*lines[:number], *middle, *lines[number + 1 :]]))
            num_found = check(path, whole, caplog, len(whole))
            assert num_found == len(whole) or (num_found == len(whole) - 1 and not is_doubled)


def test_f27_a_file_cut_anywhere(history, caplog):
    path, whole = history
    data = path.read_bytes()
    with caplog.at_level("INFO", logger="manualloop"):
        for size in range(0, len(data), 7):
            path.write_bytes(data[:size])
            check(path, [*whole, *records(6)], caplog, None)


def test_f27_lines_of_release_0_1_0_are_read(tmp_path, caplog):
    """They have no guard: what cannot be read is reported, and the rest is used."""
    old = records(3)
    lines = [json.dumps(record) for record in old]
    (tmp_path / HISTORY).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert read_history(tmp_path, 3) == old
    whole = [*old, *records(5, start=4)]
    HistoryFile(tmp_path, 3, 3).write(whole)
    assert read_history(tmp_path) == read_history(tmp_path, 5) == whole
    text = (tmp_path / HISTORY).read_text()
    (tmp_path / HISTORY).write_text(text.replace('"step": 2', '"step: 2'))
    with caplog.at_level("INFO", logger="manualloop"):
        assert read_history(tmp_path, 5) == [whole[0], *whole[2:]]
    assert "1 record is missing (damaged: line 2, 4); the others are used" in caplog.text
    (tmp_path / HISTORY).write_text(text.replace('"from_step"', '"grom_step"', 1))
    assert read_history(tmp_path, 5)[:3] == old


@pytest.mark.parametrize(
    "line",
    [
        '{"from_step": 1}',
        '{"from_step": 1, "num_records": "2"}',
        '{"from_step": 1, "num_records": -2}',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1e999}',
        "[" * 5000,
        '{"step": 1, "guard": "0.0.0-00000000"}',
        '{"step": 1, "gu\\u0061rd": "x"}',
        "\x00" * 100,
        "",
    ],
    ids=range(11),
)
def test_f27_lines_with_tricks_are_no_records(line, history):
    path, whole = history
    path.write_text(path.read_text() + line + "\n")
    assert read_history(path.parent, 8) == whole


def test_f27_a_run_resumes_after_damage_and_counts_on(tmp_path):
    """Records that were lost keep their numbers, so that later ones never take their places."""

    def train(folder, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)

        def on_step(step):
            if step.index == stop:
                raise InterruptedError

        return train_loop(
            model,
            [torch.ones(2, 2)] * 12,
            torch.optim.SGD(model.parameters(), lr=0.1),
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch).square().mean(),
            checkpoint_dir=folder,
            checkpoint_every=1,
            log_every=1,
            on_step=on_step,
            progress_bar=False,
        ).history

    whole = train(tmp_path / "whole")
    for stop in (4, 7, 10):
        with pytest.raises(InterruptedError):
            train(tmp_path / "run", stop)
        path = tmp_path / "run" / HISTORY
        path.write_bytes(path.read_bytes().replace(b'"step": %d' % (stop - 2), b'"step": 99', 1))
    lost = {2, 5, 8}
    assert train(tmp_path / "run") == [r for r in whole if r["step"] not in lost]
    assert read_history(tmp_path / "run") == [r for r in whole if r["step"] not in lost]
