"""Workers end with the run that they read for, and a later pass begins where they were."""

from __future__ import annotations

import gc
import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from manualloop import (
    TrainState,
    evaluate_loop,
    load_checkpoint,
    save_checkpoint,
    train_loop,
    train_steps,
)


class Noisy(Dataset[dict[str, Tensor]]):
    """Rows with noise that the workers draw."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": torch.full((2,), float(row)) + torch.rand(2)}


@pytest.fixture(autouse=True)
def _earlier() -> None:
    """Leave out the workers of earlier tests, which a garbage collection ends some time."""
    EARLIER.clear()
    EARLIER.update(process.pid for process in multiprocessing.active_children())


EARLIER: set[int | None] = set()


def workers() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()} - EARLIER


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(
        Noisy(), 2, shuffle=True, num_workers=2, multiprocessing_context="fork", **options
    )


def loss_fn(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(batch["x"]).square().mean()
    return loss


def new_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=1e-3))


def weights(state: TrainState) -> Tensor:
    return torch.cat([weight.detach().reshape(-1).clone() for weight in state.model.parameters()])


@pytest.mark.parametrize("is_persistent", [True, False])
@pytest.mark.parametrize("end", [{"num_epochs": 2}, {"max_steps": 8}])
def test_a_run_ends_its_workers_and_can_be_continued(is_persistent: bool, end: Any) -> None:
    expected, data = new_state(), loader(persistent_workers=is_persistent)
    for _ in train_steps(expected, data, num_epochs=3, loss_fn=loss_fn):
        pass
    state = new_state()
    data = loader(persistent_workers=is_persistent)
    optimizer: Any = state.optimizer
    result = train_loop(
        state.model, data, optimizer, None, loss_fn=loss_fn, progress_bar=False, **end
    )
    assert workers() == set()  # though the result is there, and its loader
    for _ in train_steps(result.state, data, num_epochs=3, loss_fn=loss_fn):
        pass
    assert torch.equal(weights(result.state), weights(expected))


def test_a_run_that_fails_ends_its_workers() -> None:
    def fail(step: Any) -> None:
        raise ValueError("no more")

    state = new_state()
    optimizer: Any = state.optimizer
    with pytest.raises(ValueError, match="no more") as raised:
        train_loop(
            state.model,
            loader(persistent_workers=True),
            optimizer,
            loss_fn=loss_fn,
            on_step=fail,
            num_epochs=2,
        )
    assert workers() == set()
    assert raised.value.__traceback__ is not None  # holds every object of the run


def test_a_loss_that_refers_to_the_state_keeps_no_workers() -> None:
    state = new_state()

    def with_state(model: Any, batch: Any) -> Tensor:
        return loss_fn(model, batch) * (1 + state.progress.epoch * 0)

    for _ in train_steps(state, loader(persistent_workers=True), num_epochs=1, loss_fn=with_state):
        assert workers()
    assert workers() == set()


def test_new_workers_continue_where_those_of_the_epochs_before_were() -> None:
    state, data = new_state(), loader(persistent_workers=True)
    for num_epochs in (1, 2, 3):
        for _ in train_steps(state, data, num_epochs=num_epochs, loss_fn=loss_fn):
            pass
    whole = new_state()
    for _ in train_steps(whole, loader(persistent_workers=True), num_epochs=3, loss_fn=loss_fn):
        pass
    assert torch.equal(weights(state), weights(whole))


@pytest.mark.parametrize("way", ["break", "raise", "max_steps"])
def test_a_loop_that_was_left_ends_its_workers_and_continues_exactly(way: str) -> None:
    """As the workers of a plain loop end; those that are persistent are meant to stay."""
    whole = new_state()
    for _ in train_steps(whole, loader(), max_steps=6, loss_fn=loss_fn):
        pass
    state, data = new_state(), loader()
    for number in range(1, 7):
        with suppress(ArithmeticError):
            max_steps = number if way == "max_steps" else 6
            for step in train_steps(state, data, max_steps=max_steps, loss_fn=loss_fn):
                assert workers()
                assert step.index == number
                if way == "raise":
                    raise ArithmeticError
                if way == "break":
                    break
        assert not workers()
    assert torch.equal(weights(state), weights(whole))


def test_a_loop_that_was_left_keeps_its_workers_for_the_next_step() -> None:
    state, data = new_state(), loader(persistent_workers=True)
    pids: set[int | None] = set()
    for _ in range(4):
        for _ in train_steps(state, data, num_epochs=1, loss_fn=loss_fn):
            pids |= workers()
            break
    assert len(pids) == 2
    assert state.reader is not None
    state.reader.close()
    assert workers() == set()


def test_workers_of_a_loop_that_was_left_end_by_themselves_in_a_garbage_collection() -> None:
    """torch's iterator waited five seconds for each, and some outlived its SIGTERM for ever."""

    def leave_a_loop() -> list[Any]:
        state, data = new_state(), loader(persistent_workers=True)

        def with_state(model: Any, batch: Any) -> Tensor:  # the state keeps it: a circle
            return loss_fn(model, batch) * (1 + state.progress.epoch * 0)

        for _ in train_steps(state, data, num_epochs=1, loss_fn=with_state):
            break
        return [p for p in multiprocessing.active_children() if p.pid in workers()]

    left = leave_a_loop()
    gc.collect()
    for process in left:
        process.join(60)
    codes = [process.exitcode for process in left]
    for process in left:
        process.kill()
    assert codes == [0, 0]


def test_a_state_saved_after_the_run_has_the_generators_of_its_loss(tmp_path: Path) -> None:
    def run(num_epochs: int) -> tuple[TrainState, torch.Generator, Any]:
        generator = torch.Generator().manual_seed(1)

        def noisy(model: Any, batch: Any) -> Tensor:
            return loss_fn(model, batch) * torch.rand((), generator=generator)

        state = new_state()
        optimizer: Any = state.optimizer
        batches = [{"x": torch.ones(2, 2)}] * 4
        result = train_loop(
            state.model,
            batches,
            optimizer,
            None,
            loss_fn=noisy,
            num_epochs=num_epochs,
            progress_bar=False,
        )
        return result.state, generator, (batches, noisy)

    expected, _, _ = run(2)
    half, _, _ = run(1)
    save_checkpoint(tmp_path, half)
    state = new_state()
    _, _, (batches, noisy) = run(1)  # its generator is elsewhere by now
    load_checkpoint(tmp_path, state)
    for _ in train_steps(state, batches, num_epochs=2, loss_fn=noisy):
        pass
    assert torch.equal(weights(state), weights(expected))


class Counting(IterableDataset):
    """Gives the numbers below 16, of which each worker gives all, or its own."""

    def __init__(self, splits):
        self.splits = splits

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if self.splits else (0, 1)
        yield from ({"x": torch.tensor([float(n)])} for n in range(start, 16, step))


@pytest.mark.parametrize("splits", [False, True])
def test_a_stream_of_which_each_worker_gives_all_rows_is_told(splits, caplog):
    loader, model = DataLoader(Counting(splits), batch_size=4, num_workers=2), torch.nn.Linear(1, 1)

    def loss_fn(model, batch):
        return model(batch["x"]).mean()

    train_loop(model, loader, max_steps=4, loss_fn=loss_fn, progress_bar=False)
    evaluate_loop(model, loader, loss_fn=loss_fn)
    told = "each of the 2 workers gives the same rows of the stream"
    assert caplog.text.count(told) == (0 if splits else 1)
