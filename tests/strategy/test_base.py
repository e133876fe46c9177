"""Any object with the members of the protocol is a strategy, and its state is saved."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manualloop import (
    CheckpointError,
    ConfigError,
    SingleDevice,
    Strategy,
    TrainState,
    check_accumulation,
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.strategy.base import MEMBERS
from manualloop.strategy.select import strategy_for


class OwnStrategy:
    """Written from the members of the protocol alone, with a loss scale as fp16 has one."""

    def __init__(self, scale: float = 2.0**16, every: int = 3) -> None:
        self.device = torch.device("cpu")
        self.is_main, self.rank, self.world_size = True, 0, 1
        self.precision, self.compile, self.scales_losses = "own", False, True
        self.scale, self.growth, self.every = scale, 0, every
        self.is_unscaled = self.overflows = False

    def prepare(self, model: Any, optimizer: Any) -> Any:
        return model, optimizer

    def prepare_model(self, model: Any) -> Any:
        return model

    def to_device(self, batch: Any) -> Any:
        return batch

    def autocast(self) -> Any:
        return nullcontext()

    def hold_gradients(self, model: Any, hold: bool) -> Any:
        return nullcontext()

    def backward(self, loss: Any) -> None:
        (loss * self.scale).backward()

    def _unscale(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)
                    self.overflows |= not bool(parameter.grad.isfinite().all())
        self.is_unscaled = True

    def clip_gradients(self, optimizer: Any, max_norm: float) -> Any:
        self._unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def apply(self, optimizer: Any) -> bool:
        if not self.is_unscaled:
            self._unscale(optimizer)
        overflows, self.is_unscaled, self.overflows = self.overflows, False, False
        if overflows:
            self.scale, self.growth = self.scale / 2, 0
            return False
        optimizer.step()
        self.growth += 1
        if self.growth == self.every:
            self.scale, self.growth = self.scale * 2, 0
        return True

    def sum_over_ranks(self, values: Any) -> Any:
        return values

    def sum_counts(self, counts: Any) -> list[float]:
        return list(counts)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def explain(self, error: BaseException) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth": torch.tensor(self.growth)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale, self.growth = state_dict["scale"], int(state_dict["growth"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x).squeeze(-1)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.mse_loss(logits, labels)}


def batches(overflow_at: int | None = 4, num: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [
        {"x": torch.randn(3, 4, generator=generator), "labels": torch.ones(3)} for _ in range(num)
    ]
    if overflow_at is not None:
        found[overflow_at]["x"] = found[overflow_at]["x"] * 1e18  # finite, until it is scaled
    return found


def new_state(num_steps: int = 12) -> TrainState:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=num_steps))


def weights(state: TrainState) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def given() -> Any:
    return OwnStrategy()


def test_the_strategy_has_the_members_of_the_protocol_and_no_class_of_ours() -> None:
    own = given()
    public = {name for name in dir(own) if not name.startswith("_")}
    assert set(MEMBERS) <= public
    assert public - set(MEMBERS) == {"scale", "growth", "every", "is_unscaled", "overflows"}
    assert prepare_strategy(own) is own
    for strategy in (SingleDevice("cpu"), own):
        assert all(hasattr(strategy, name) for name in MEMBERS)
    for name in MEMBERS:
        assert inspect.getdoc(getattr(Strategy, name)), name


def test_every_member_is_asked_for_by_its_name() -> None:
    for name in MEMBERS:
        lacking = copy.copy(given())
        present = {n: getattr(lacking, n) for n in MEMBERS if n != name}
        partial: Any = type("Partial", (), present)()
        with pytest.raises(ConfigError, match=rf"Partial lacks members of a Strategy: {name}\."):
            prepare_strategy(partial)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_level_2_resumes_bit_equal_with_the_loss_scale(
    cut: int, max_grad_norm: float | None, tmp_path: Any
) -> None:
    def train(state: TrainState, strategy: Any, stop: int | None = None) -> None:
        steps = train_steps(
            state, batches(), num_epochs=1, max_grad_norm=max_grad_norm, strategy=strategy
        )
        for step in steps:
            if step.index == stop:
                save_checkpoint(tmp_path, state)  # of the strategy that trains the model
                break

    whole, strategy = new_state(), given()
    train(whole, strategy)
    assert whole.progress.num_skipped == 1
    assert strategy.scale == 2.0**18  # it has grown three times, and fallen once
    cut_short, first = new_state(), given()
    train(cut_short, first, stop=cut)
    resumed, second = new_state(), given()
    torch.manual_seed(99)
    load_checkpoint(tmp_path, resumed, strategy=second)
    assert (second.scale, second.growth) == (first.scale, first.growth)
    train(resumed, second)
    assert same(weights(resumed), weights(whole))
    assert (second.scale, second.growth) == (strategy.scale, strategy.growth)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_level_1_resumes_bit_equal_with_the_loss_scale(accumulation: int, tmp_path: Any) -> None:
    def train(folder: Any, strategy: Any, **options: Any) -> TrainState:
        state = new_state()
        return train_loop(
            state.model,
            batches(),
            state.optimizer,
            num_epochs=2,
            gradient_accumulation_steps=accumulation,
            strategy=strategy,
            checkpoint_dir=folder,
            progress_bar=False,
            **options,
        ).state

    def die(step: Any) -> None:
        if step.index == 5:
            raise KeyError("killed")

    strategy = given()
    whole = train(tmp_path / "whole", strategy)
    with pytest.raises(KeyError):
        train(tmp_path / "cut", given(), on_step=die, checkpoint_every=2)
    second = given()
    resumed = train(tmp_path / "cut", second)
    assert same(weights(resumed), weights(whole))
    assert (second.scale, second.growth) == (strategy.scale, strategy.growth)
    assert whole.progress.num_skipped == 2  # the scale has moved


def test_the_scaled_updates_are_those_of_a_loop_in_plain_torch() -> None:
    state, strategy = new_state(), given()
    for _ in train_steps(
        state, batches(), num_epochs=1, max_grad_norm=0.5, strategy=strategy, on_nonfinite="raise"
    ):
        pass
    plain, scale, growth = new_state(), 2.0**16, 0
    plain.model.train()
    for batch in batches():
        plain.optimizer.zero_grad()
        (plain.model(**batch)["loss"] * scale).backward()
        for parameter in plain.model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(scale)
        norm = nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        if not math.isfinite(float(norm)):
            scale, growth = scale / 2, 0
            continue
        plain.optimizer.step()
        assert plain.lr_scheduler is not None
        plain.lr_scheduler.step()
        growth += 1
        if growth == 3:
            scale, growth = scale * 2, 0
    assert same(weights(state), weights(plain))
    assert strategy.scale == scale


def test_it_is_evaluated_predicted_with_and_checked() -> None:
    state, strategy = new_state(), given()
    data = batches(overflow_at=None, num=4)
    plain = evaluate_loop(state.model, data, strategy=SingleDevice("cpu"))
    assert evaluate_loop(state.model, data, strategy=strategy) == plain
    ours = predict_loop(state.model, data, strategy=strategy).predictions
    assert (ours == predict_loop(state.model, data, strategy=SingleDevice("cpu")).predictions).all()
    assert check_accumulation(state.model, data[0], strategy=strategy).is_exact
    assert strategy.scale == given().scale


# The state of a strategy in a checkpoint ----------------------------------------------------------


def test_a_state_is_neither_lost_nor_made_up(tmp_path: Any) -> None:
    state = new_state()
    save_checkpoint(tmp_path / "own", state, strategy=given())
    save_checkpoint(tmp_path / "plain", state, strategy=SingleDevice("cpu"))
    before = weights(other := new_state())
    with pytest.raises(CheckpointError, match="SingleDevice of this run has no state"):
        load_checkpoint(tmp_path / "own", other, strategy=SingleDevice("cpu"))
    with pytest.raises(CheckpointError, match="OwnStrategy of this run has a state"):
        load_checkpoint(tmp_path / "plain", other, strategy=given())
    assert same(weights(other), before)


def test_a_loss_scale_in_a_checkpoint_of_release_0_1_is_loaded(tmp_path: Any) -> None:
    strategy, state = SingleDevice("cpu", mixed_precision="fp16"), new_state()
    for _ in train_steps(state, batches(None), max_steps=3, strategy=strategy):
        path = save_checkpoint(tmp_path, state)
    assert strategy.scaler is not None
    strategy.scaler.update(2.0**11)
    path = save_checkpoint(tmp_path, state)
    size = (path / "state.json").stat().st_size  # of "strategy", which is longer
    saved = json.loads((path / "state.json").read_text())
    saved["scaler"] = saved.pop("strategy")  # what the part was called
    text = json.dumps(saved)
    (path / "state.json").write_text(text + " " * (size - len(text)))
    resumed, other = SingleDevice("cpu", mixed_precision="fp16"), new_state()
    load_checkpoint(tmp_path, other, strategy=resumed, verify=False)
    assert resumed.state_dict() == strategy.state_dict()
    assert same(weights(other), weights(state))


def test_the_precision_is_noted_and_a_change_is_printed(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def save(strategy: Any) -> TrainState:
        state = new_state()
        for _ in train_steps(state, batches(None), max_steps=1, strategy=strategy):
            save_checkpoint(tmp_path, state)
        return state

    assert save(given()).contract["settings"]["mixed_precision"] == "own"  # type: ignore[index]
    strategy, state = given(), new_state()
    strategy.precision, strategy.compile = "fp8", {"mode": "default"}
    load_checkpoint(tmp_path, state, strategy=strategy)
    next(train_steps(state, batches(None), max_steps=2, strategy=strategy))
    assert "mixed_precision: own -> fp8" in caplog.text
    assert "compile: False -> True" in caplog.text


# Which strategy has prepared a model --------------------------------------------------------------


def test_calls_that_name_no_strategy_use_the_one_that_trains() -> None:
    state, strategy = new_state(), given()
    next(train_steps(state, batches(), num_epochs=1, strategy=strategy))
    assert strategy_for(state.model, None) is strategy
    evaluate_loop(state.model, batches(None), strategy=SingleDevice("cpu"))
    assert isinstance(strategy_for(state.model, None), SingleDevice)
    check_accumulation(state.model, batches(None)[0], strategy=strategy)
    assert strategy_for(state.model, None) is strategy


def test_a_model_that_could_not_be_prepared_keeps_its_strategy() -> None:
    state, strategy, other = new_state(), given(), given()
    next(train_steps(state, batches(), num_epochs=1, strategy=strategy))
    other.prepare_model = lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate_loop(state.model, batches(None), strategy=other)
    assert strategy_for(state.model, None) is strategy


def test_a_wrapper_that_a_strategy_makes_is_remembered_as_well() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    state, strategy = new_state(), given()
    strategy.prepare = lambda model, optimizer: (
        model if isinstance(model, Wrapper) else Wrapper(model),
        optimizer,
    )
    inner = state.model
    next(train_steps(state, batches(), num_epochs=1, preflight=False, strategy=strategy))
    assert isinstance(state.model, Wrapper)
    assert strategy_for(state.model, None) is strategy_for(inner, None) is strategy


def test_a_strategy_that_is_gone_is_not_replaced_in_silence() -> None:
    model = Net()
    train_loop(model, batches(), max_steps=1, strategy=given(), progress_bar=False)
    gc.collect()
    with pytest.raises(ConfigError, match=r"OwnStrategy that prepared this model.*strategy="):
        evaluate_loop(model, batches(None))
    evaluate_loop(model, batches(None), strategy=SingleDevice("cpu"))


def test_neither_the_model_nor_the_strategy_is_kept_alive() -> None:
    state, strategy = new_state(), given()
    strategy.model = state.model  # as one that wraps it
    result = train_loop(
        state.model, batches(), state.optimizer, strategy=strategy, progress_bar=False
    )
    gone = weakref.ref(state.model), weakref.ref(strategy)
    del state, strategy, result
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_run_leaves_nothing_in_a_strategy() -> None:
    for strategy in (given(), SingleDevice("cpu")):
        before = set(vars(strategy))
        state = new_state()
        train_loop(state.model, batches(), state.optimizer, strategy=strategy, progress_bar=False)
        assert set(vars(strategy)) == before
        assert not any("manualloop" in name for name in vars(state.model))
