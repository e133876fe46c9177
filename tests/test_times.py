"""Where the time went: every part is seen, and nothing else is changed by looking."""

import json
import time

import pytest
import torch
from helpers import rows, tiny_bert, tiny_tokenizer

from manualloop import SingleDevice, prepare_dataloaders, train_loop
from manualloop.run.history_file import HISTORY, read_history
from manualloop.times import Times

PAUSE = 0.02


def slowed(function):
    def slow(*args, **kwargs):
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return slow


def run(monkeypatch, slow, tmp_path=None, **options):
    """Three epochs of two updates; one part of them is slow."""
    loader = prepare_dataloaders(rows(8), tiny_tokenizer(), batch_size=4)["train"]
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collate = loader.collate_fn
    with monkeypatch.context() as patch:
        if slow == "data":
            loader.collate_fn = slowed(collate)
        if slow == "forward_backward":
            model.register_forward_pre_hook(lambda *args: time.sleep(PAUSE))
        if slow == "optimizer":
            optimizer.register_step_pre_hook(lambda *args: time.sleep(PAUSE))
        if slow == "checkpoint":
            import manualloop.run.folder as run_folder

            patch.setattr(run_folder, "write_checkpoint", slowed(run_folder.write_checkpoint))
        evaluate = dict
        if slow == "evaluation":
            evaluate = slowed(dict)
        return train_loop(
            model,
            loader,
            optimizer,
            strategy=SingleDevice("cpu"),
            evaluate=evaluate,
            checkpoint_dir=tmp_path,
            progress_bar=False,
            **options,
        )


NUM_PAUSES = {"data": 6, "forward_backward": 6, "optimizer": 6, "evaluation": 3, "checkpoint": 3}


@pytest.mark.parametrize("slow", NUM_PAUSES)
def test_a_pause_is_found_where_it_is(slow, monkeypatch, tmp_path):
    plain = run(monkeypatch, None, tmp_path / "plain").times
    times = run(monkeypatch, slow, tmp_path / "slow").times
    least = NUM_PAUSES[slow] * PAUSE
    # A sum of what was slept, which no load of the machine makes shorter.
    assert getattr(times, slow) >= least
    assert times.total >= least
    assert plain.num_tokens == times.num_tokens


def test_tokens_and_padding_are_counted(monkeypatch):
    times = run(monkeypatch, None).times
    loader = prepare_dataloaders(rows(8), tiny_tokenizer(), batch_size=4)["train"]
    masks = []
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        masks += [batch["attention_mask"] for batch in loader]
    assert times.num_tokens == sum(int(mask.sum()) for mask in masks)
    assert times.num_places == sum(mask.numel() for mask in masks)
    assert times.padding == pytest.approx(1 - times.num_tokens / times.num_places)
    assert times.tokens_per_second == times.num_tokens / (times.data + times.update)
    assert f"{times.padding:.0%} padding" in str(times)
    assert "tokens/s" in str(times)


def test_the_ledger_has_them_once_a_process_and_its_records_are_as_before(monkeypatch, tmp_path):
    first = run(monkeypatch, None, tmp_path, max_steps=3)
    second = run(monkeypatch, None, tmp_path, max_steps=6)
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    found = [line["times"] for line in lines if "times" in line]
    assert found == [result.times.as_dict() for result in (first, second)]
    assert [record["step"] for record in read_history(tmp_path)] == [
        record["step"] for record in second.history
    ]
    assert run(monkeypatch, None, tmp_path, max_steps=6).times.total == 0
    assert len((tmp_path / HISTORY).read_text().splitlines()) <= len(lines) + 1


LONG = {"data": 2.0, "update": 98.0, "optimizer": 8.0}


@pytest.mark.parametrize(
    ("changes", "num_workers", "expected"),
    [
        ({}, 0, None),
        ({"data": 60.0}, 0, "38% of the time went to waiting for data. Try num_workers=2."),
        ({"data": 60.0}, 4, "38% of the time went to waiting for data. Try num_workers=8."),
        (
            {"data": 60.0},
            None,
            "38% of the time went to waiting for data. A DataLoader with num_wor",
        ),
        ({"checkpoint": 50.0}, 0, "33% of the time went to saving checkpoints. Try a larger"),
        (
            {"num_tokens": 40, "num_places": 100},
            0,
            "54% of the time went to computing padding. Try group_by_length=True.",
        ),
        ({"data": 9.0, "update": 20.0}, 0, None),  # too short to tell
    ],
)
def test_advice_names_the_largest_share_and_what_to_do(changes, num_workers, expected):
    advice = Times(**{**LONG, **changes}).advice(num_workers, may_group=True)
    assert advice == expected or advice.startswith(expected)


def test_times_of_nothing_and_of_something():
    assert str(Times()) == "0.0 s"
    assert str(Times(data=1.0, update=3.0)) == "4.0 s: data 25%, forward_backward 75%"


def test_no_advice_to_group_what_is_grouped():
    times = Times(**LONG, num_tokens=40, num_places=100)
    assert times.advice(0, may_group=False) is None


def test_a_run_says_it(monkeypatch, caplog):
    monkeypatch.setattr("manualloop.times._LONG_ENOUGH", 0.0)
    with caplog.at_level("INFO", logger="manualloop"):
        run(monkeypatch, "data")
    assert "went to waiting for data. Try num_workers=2." in caplog.text
