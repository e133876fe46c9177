"""How long a run is: updates of another size, epochs of other lengths, updates that are skipped."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import messages, rows, tiny_bert, tiny_tokenizer
from torch import Tensor, nn
from torch.optim import lr_scheduler as torchs
from torch.utils.data import DataLoader, TensorDataset

from manualloop import (
    DataError,
    SingleDevice,
    TrainState,
    Update,
    load_checkpoint,
    prepare_dataloaders,
    prepare_scheduler,
    train_loop,
    train_steps,
)

# Updates of another size --------------------------------------------------------------------------

NUM_ROWS = 24


class Seen:
    """A run over ``NUM_ROWS`` rows, and what it did at each update."""

    def __init__(
        self,
        folder: Path | None,
        batch_size: int,
        *,
        accumulation: int = 1,
        stop: int | None = None,
        num_epochs: int = 2,
        schedule: Any = "linear",
        num_rows: int = NUM_ROWS,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.steps: list[Any] = []
        self.rows: list[int] = []
        self.evaluated: list[int] = []
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        table = TensorDataset(torch.arange(num_rows))
        loader = DataLoader(table, batch_size, shuffle=True)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            self.rows += batch[0].tolist()
            return model(torch.ones(len(batch[0]), 1)).mean()

        def on_step(step: Any) -> None:
            if step.index == stop:
                raise InterruptedError
            self.steps.append(step)

        def evaluate() -> dict[str, float]:
            self.evaluated.append(len(self.rows))
            return {"score": 1.0}

        try:
            self.result = train_loop(
                model,
                loader,
                optimizer,
                schedule(optimizer) if callable(schedule) else schedule,
                num_epochs=num_epochs,
                loss_fn=loss_fn,
                gradient_accumulation_steps=accumulation,
                checkpoint_dir=folder,
                on_step=on_step,
                evaluate=evaluate,
                **{"log_every": 1, "checkpoint_every": 1, "progress_bar": False, **options},
            )
        except InterruptedError:
            self.rows = self.rows[: -batch_size * accumulation] or self.rows
            del self.rows[len(self.steps) * batch_size * accumulation :]

    @property
    def rates(self) -> list[float]:
        return [step.lr for step in self.steps]


@pytest.mark.parametrize("num_done", [1, 4, 6, 7, 12, 13])
@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (4, 1)), ((4, 1), (2, 1)), ((2, 1), (2, 3))]
)
def test_a_run_ends_with_its_schedule_whatever_the_size_of_its_updates(
    before: tuple[int, int],
    after: tuple[int, int],
    num_done: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if num_done * before[0] * before[1] >= 2 * NUM_ROWS:
        return
    first = Seen(tmp_path, before[0], accumulation=before[1], stop=num_done + 1)
    with caplog.at_level("INFO", logger="manualloop"):
        second = Seen(tmp_path, after[0], accumulation=after[1])
    used = first.rows + second.rows
    assert sorted(used[:NUM_ROWS]) == sorted(used[NUM_ROWS:]) == list(range(NUM_ROWS))
    size, num_used = after[0] * after[1], num_done * before[0] * before[1]
    num_updates = 2 * NUM_ROWS // size
    left = math.ceil((NUM_ROWS - num_used % NUM_ROWS) / size)
    left += (1 - num_used // NUM_ROWS) * NUM_ROWS // size
    # The rates of the last updates of a run that had this size from the start.
    assert second.rates == Seen(None, after[0], accumulation=after[1]).rates[-left:]
    assert len(second.steps) == left
    share = Fraction(num_updates - left, num_updates)
    assert abs(share - Fraction(num_used, 2 * NUM_ROWS)) < Fraction(size, 2 * NUM_ROWS)
    last = second.steps[-1]
    assert (last.index, last.is_last, last.ends_epoch) == (num_done + left, True, True)
    assert {step.num_steps for step in second.steps} == {num_done + left}
    epochs = [record["epoch"] for record in second.result.history if record["step"] > num_done]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 2.0
    (line,) = [line for line in messages(caplog) if "another size" in line]
    assert f"another size than the {num_done} before: {float(share):.0%} of the data" in line
    assert "keep batch_size x gradient_accumulation_steps x ranks" in line


def test_a_resized_run_that_is_killed_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for stops in ((5,), (5, 7), (5, 6, 8)):
        folder = tmp_path / str(len(stops))
        Seen(folder, 2, stop=stops[0], num_epochs=3)
        parts = [Seen(folder, 4, stop=stop, num_epochs=3) for stop in (*stops[1:], None)]
        result = parts[-1].result
        rates = [rate for part in parts for rate in part.rates]
        ends.append((rates, result.history, result.state.model.weight.tolist()))
    assert ends[0] == ends[1] == ends[2]


def test_a_size_that_changes_twice_and_an_extension(tmp_path: Path) -> None:
    Seen(tmp_path, 2, stop=5)  # 8 rows of 48
    Seen(tmp_path, 4, stop=7)  # 16 rows
    third = Seen(tmp_path, 8, num_epochs=4)  # 16 of 96
    assert third.rates == Seen(None, 8, num_epochs=4).rates[2:]
    assert third.steps[-1].index == third.steps[-1].num_steps == 6 + 10


def test_parts_of_an_epoch_follow_the_data(tmp_path: Path) -> None:
    Seen(tmp_path, 2, stop=5, evaluate_every="0.25 epoch")
    second = Seen(tmp_path, 1, evaluate_every="0.25 epoch")
    assert second.evaluated == [6 * n - 8 for n in range(2, 9)]


def test_a_schedule_of_the_script_counts_updates_and_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def schedule(optimizer: Any) -> Any:
        return torchs.StepLR(optimizer, 3, gamma=0.5)

    Seen(tmp_path, 2, stop=5, schedule=schedule)
    with caplog.at_level("INFO", logger="manualloop"):
        second = Seen(tmp_path, 4, schedule=schedule)
    assert second.rates[:3] == [0.5, 0.5, 0.25]
    assert any("StepLR counts updates, whatever their size" in line for line in messages(caplog))


def test_by_steps_updates_of_any_size_are_counted(tmp_path: Path) -> None:
    for size, stop in ((2, 5), (4, None)):
        run = Seen(tmp_path, size, stop=stop, num_epochs=None, max_steps=10)
    assert run.rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert run.steps[-1].index == run.steps[-1].num_steps == 10


def test_prepared_loaders_by_rows_and_by_tokens() -> None:
    model, tokenizer = tiny_bert(), tiny_tokenizer()
    for more in ({"batch_size": 2}, {"max_tokens": 24}, {"batch_size": 3, "drop_last": True}):
        seen, saved, contract = [], None, None
        for change in ({}, {"batch_size": 5} if "batch_size" in more else {"max_tokens": 40}):
            loaders = prepare_dataloaders(
                {"train": rows(23)}, tokenizer, model=model, **{**more, **change}
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            num_steps = 2 * len(loaders["train"])
            schedule = prepare_scheduler(optimizer, num_training_steps=num_steps)
            state = TrainState(model, optimizer, schedule)
            if saved is not None:
                state.load_state_dict(saved)
                state.contract = contract
            for step in train_steps(state, loaders["train"], num_epochs=2):
                seen.append(step)
                if step.index == 3 and not change:
                    break
            _saved, _contract = state.state_dict(), state.contract
        last = seen[-1]
        assert last.is_last
        assert last.num_steps == last.index
        assert last.lr == pytest.approx(1e-3 / num_steps)
        assert state.lr_scheduler is not None
        assert state.lr_scheduler.get_last_lr() == [0.0]


# Epochs of other lengths --------------------------------------------------------------------------


class Lengths:
    """A loader whose epochs have different numbers of batches."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.lengths[min(self.epoch, len(self.lengths) - 1)]

    def __iter__(self) -> Any:
        return iter([{"x": torch.ones(4, 1)}] * len(self))


class GrowingTable(TensorDataset):
    """A dataset that is added to: a DataLoader's length follows."""

    def __init__(self) -> None:
        self.size = 4
        super().__init__(torch.ones(100, 1))

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.size = 4 + 4 * epoch


def train(loader: Any, schedule: Any = "linear", **options: Any) -> tuple[Any, list[Any]]:
    model, steps = nn.Linear(1, 1), list[Any]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"] if isinstance(batch, dict) else batch[0]).mean()

    error = None
    try:
        train_loop(
            model,
            loader,
            optimizer,
            schedule(optimizer) if callable(schedule) else schedule,
            loss_fn=loss_fn,
            **{"num_epochs": 3, "progress_bar": False, "on_step": steps.append, **options},
        )
    except DataError as raised:
        error = raised
    return error, steps


@pytest.mark.parametrize(
    ("make", "num_steps", "lengths"),
    [
        (lambda: Lengths(2, 4, 6), 2, "has 4 updates.*epochs of 2"),
        (lambda: Lengths(6, 6, 1), 12, "has 1 updates.*epochs of 6"),
        (lambda: DataLoader(GrowingTable(), 2), 2, "has 4 updates.*epochs of 2"),
    ],
)
def test_a_schedule_of_the_first_epochs_length_is_refused_where_that_changes(
    make: Any, num_steps: int, lengths: str
) -> None:
    error, steps = train(make())
    assert len(steps) == num_steps
    with pytest.raises(DataError, match=lengths):
        raise error
    for fix in ("lr_scheduler=None", "max_steps=", "prepare_scheduler(optimizer, num_training"):
        assert fix in str(error)


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda optimizer: prepare_scheduler(optimizer, num_training_steps=12),
        lambda optimizer: torchs.StepLR(optimizer, 5),
    ],
)
def test_what_does_not_depend_on_the_first_epochs_length(schedule: Any) -> None:
    evaluated: list[int] = []
    seen: list[Any] = []

    def evaluate() -> dict[str, float]:
        evaluated.append(len(seen))
        return {"score": 1.0}

    def on_step(step: Any) -> None:
        seen.append(step)

    options = {"evaluate": evaluate, "evaluate_every": "0.5 epoch"}
    error, _ = train(Lengths(2, 4, 6), schedule, **{**options, "on_step": on_step})
    assert error is None
    assert evaluated == [1, 2, 4, 6, 9, 12]
    assert [step.num_steps for step in seen] == [6] * 2 + [10] * 4 + [12] * 6
    assert [step.index for step in seen if step.ends_epoch] == [2, 6, 12]


def test_by_steps_a_schedule_knows_its_length() -> None:
    error, steps = train(Lengths(2, 4, 6), num_epochs=None, max_steps=10)
    assert error is None
    assert [step.lr for step in steps] == pytest.approx([1 - n / 10 for n in range(10)])


def test_batches_that_make_the_same_number_of_updates_are_no_other_length() -> None:
    error, steps = train(Lengths(5, 6, 4), gradient_accumulation_steps=3)
    assert error is None
    assert len(steps) == 6


def test_at_level_2_the_epoch_of_another_length_is_refused_too() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = Lengths(2, 3)
    schedule = prepare_scheduler(optimizer, num_training_steps=3 * len(loader))
    steps = train_steps(
        TrainState(model, optimizer, schedule),
        loader,
        num_epochs=3,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
    )
    with pytest.raises(DataError, match="has 3 updates"):
        list(steps)


def test_an_epoch_of_another_length_is_resumed(tmp_path: Path) -> None:
    def run(folder: Path | None, stop: int | None) -> list[Any]:
        places: list[Any] = []

        def on_step(step: Any) -> None:
            if step.index == stop:
                raise InterruptedError
            places.append((step.index, step.epoch, step.num_steps, step.ends_epoch))

        with contextlib.suppress(InterruptedError):
            train(
                Lengths(2, 4, 6),
                None,
                on_step=on_step,
                checkpoint_dir=folder,
                checkpoint_every=1,
            )
        return places

    whole = run(None, None)
    for stop in range(2, 13):
        folder = tmp_path / str(stop)
        assert run(folder, stop) + run(folder, None) == whole, stop


# Updates that are skipped -------------------------------------------------------------------------


def labelled(*counts: int) -> list[dict[str, Tensor]]:
    """A batch for each number of labels to learn from."""
    return [
        {"x": torch.ones(4, 1), "labels": torch.tensor([0] * n + [-100] * (4 - n))} for n in counts
    ]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


class Passes:
    """Updates by windows of labels to learn from, and what came in which order."""

    def __init__(self, loader: Any, **options: Any) -> None:
        self.order: list[Any] = []
        model = nn.Linear(1, 2)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            self.order.append("pass")
            return cross_entropy(model, batch)

        def evaluate() -> dict[str, float]:
            self.order.append("evaluated")
            return {"score": 1.0}

        try:
            self.result = train_loop(
                model,
                loader,
                torch.optim.SGD(model.parameters(), lr=0.1),
                loss_fn=loss_fn,
                evaluate=evaluate,
                **{"progress_bar": False, **options},
            )
            self.error = None
        except DataError as error:
            self.error = error


@pytest.mark.parametrize("end", [{"num_epochs": 3}, {"max_steps": 50}])
@pytest.mark.parametrize("counts", [(0,), (0, 0, 0, 0, 0)])
def test_an_epoch_without_an_update_is_an_error_after_it(
    end: dict[str, int], counts: tuple[int, ...]
) -> None:
    run = Passes(labelled(*counts), **end)
    assert str(run.error).startswith("Nothing was learned: all updates of epoch 0 were skipped")
    assert "no label to learn from" in str(run.error)
    assert run.order.count("pass") <= len(counts)


def test_a_later_epoch_without_an_update_is_an_error_too() -> None:
    class Fading(Lengths):
        def __iter__(self) -> Any:
            return iter(labelled(*([4, 4] if self.epoch < 2 else [0, 0])))

    run = Passes(Fading(2), num_epochs=4)
    assert "all updates of epoch 2 were skipped" in str(run.error)


def test_losses_that_are_not_finite_in_all_of_an_epoch() -> None:
    batches = [{**batch, "x": batch["x"] * math.nan} for batch in labelled(4, 4)]
    run = Passes(batches, num_epochs=2, on_nonfinite="skip")
    assert "not finite" in str(run.error)


def test_an_endless_stream_without_a_label_ends() -> None:
    class Stream:
        def __iter__(self) -> Any:
            while True:
                yield from labelled(0)

    run = Passes(Stream(), max_steps=5)
    assert "the last 1000 updates were skipped" in str(run.error)


def test_a_step_fn_that_never_applies_an_update() -> None:
    def step_fn(state: Any, batches: Any, strategy: Any) -> Update:
        return Update(torch.zeros(()), 4, applied=False)

    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(DataError, match=r"all updates of epoch 0.*step_fn has not applied them"):
        list(train_steps(state, labelled(4, 4), num_epochs=2, step_fn=step_fn))


def test_the_search_of_a_loss_scale_may_take_more_than_an_epoch() -> None:
    """One batch an epoch, whose scaled gradients overflow at first."""
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    model = nn.Linear(1, 1)
    result = train_loop(
        model,
        [{"x": torch.full((4, 1), 50.0)}],
        torch.optim.SGD(model.parameters(), lr=1e-6),
        max_steps=3,
        loss_fn=lambda model, batch: model(batch["x"]).float().square().mean() * 1e3,
        strategy=strategy,
        progress_bar=False,
    )
    assert result.state.progress.num_steps == 3
    assert result.state.progress.num_skipped > 1


def test_the_rest_of_an_epoch_that_is_resumed_may_hold_no_update(tmp_path: Path) -> None:
    def run(stop: int | None) -> Any:
        def on_step(step: Any) -> None:
            if step.index == stop:
                raise InterruptedError

        return Passes(
            labelled(4, 4, 0, 0),
            num_epochs=2,
            on_step=on_step,
            checkpoint_dir=tmp_path,
            checkpoint_every=1,
        )

    with pytest.raises(InterruptedError):
        run(3)  # that of step 2 is saved
    resumed = run(None)
    assert resumed.error is None
    assert resumed.result.state.progress.num_steps == 4


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, ["pass", "pass", "evaluated", "pass", "pass", "evaluated"]),
        (
            {"evaluate_every": "0.5 epoch"},
            ["pass", "pass", "evaluated", "pass", "pass", "evaluated"],
        ),
        ({"evaluate_every": "2 epochs"}, ["pass", "pass", "pass", "pass", "evaluated"]),
        ({"evaluate_every": 3}, ["pass", "pass", "pass", "evaluated", "pass", "evaluated"]),
    ],
)
def test_what_is_due_where_the_last_update_of_an_epoch_is_skipped(
    options: dict[str, Any], order: list[str]
) -> None:
    run = Passes(labelled(4, 4, 0, 0), num_epochs=2, **options)
    passes_with_labels = list(run.order)
    assert run.error is None
    assert condensed(passes_with_labels) == order


def condensed(order: list[str]) -> list[str]:
    """Leave out the passes without a label: the third and fourth of each four."""
    kept, number = [], 0
    for entry in order:
        number += entry == "pass"
        if entry != "pass" or number % 4 in (1, 2):
            kept.append(entry)
    return kept


def test_the_end_of_an_epoch_is_saved_and_logged_at_a_skipped_update(tmp_path: Path) -> None:
    run = Passes(
        labelled(4, 4, 0),
        num_epochs=2,
        checkpoint_dir=tmp_path,
        keep_checkpoints=9,
        log_every="epoch",
    )
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]
    logged = [(record["step"], record["epoch"]) for record in run.result.history if "lr" in record]
    assert logged == [
        (1, pytest.approx(1 / 3)),
        (2, pytest.approx(2 / 3)),
        (4, pytest.approx(5 / 3)),
    ]
    model = nn.Linear(1, 2)
    state = TrainState(
        model, torch.optim.SGD(model.parameters(), lr=0.1), run.result.state.lr_scheduler
    )
    load_checkpoint(tmp_path, state)
    assert (state.progress.epoch, state.progress.num_samples) == (2, 0)


def test_patience_counts_an_evaluation_once(tmp_path: Path) -> None:
    """The weights are the same at a skipped update: they are not evaluated again."""
    run = Passes(
        labelled(4, 4, 0, 0),
        num_epochs=2,
        evaluate_every="0.25 epoch",
        best_metric="score",
        patience=3,
    )
    assert run.order.count("evaluated") == 4
    assert run.result.stopped_by == "patience"


def test_a_bar_that_grows_with_the_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    train(Lengths(2, 4, 6), None, progress_bar=True)
    assert "step 12/12 (100%)" in capsys.readouterr().out
