"""Strategies: plain torch and accelerate give the same bits, and half precision skips cleanly."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from manualloop import (
    Accelerated,
    ConfigError,
    DataError,
    DistributedError,
    SingleDevice,
    Step,
    TrainState,
    accumulate_gradients,
    evaluate_loop,
    predict_loop,
    prepare_optimizer,
    prepare_scheduler,
    prepare_strategy,
    train_loop,
    train_steps,
)
from manualloop.strategy.base import MEMBERS
from manualloop.strategy.select import strategy_for, strategy_in_place
from manualloop.strategy.transfer import move


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a launcher is in the environment."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


class Net(nn.Module):
    """Two layers with dropout, so that the random state matters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        values = self.head(self.dropout(self.hidden(x).relu())).squeeze(-1)
        outputs = {"logits": values}
        if labels is not None:
            outputs["loss"] = nn.functional.mse_loss(values.float(), labels)
        return outputs


def make_net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def make_batches(sizes: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(size, 4, generator=generator),
            "labels": torch.randn(size, generator=generator),
        }
        for size in sizes
    ]


# prepare_strategy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["cpu", torch.device("cpu")])
def test_a_device(spec: Any) -> None:
    strategy = prepare_strategy(spec)
    assert isinstance(strategy, SingleDevice)
    assert strategy.device == torch.device("cpu")
    assert strategy.is_main
    assert repr(strategy) == "SingleDevice(device='cpu', mixed_precision='no')"


def test_auto_is_the_accelerator_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    present = torch.accelerator.is_available()
    strategy = prepare_strategy()
    assert isinstance(strategy, SingleDevice)
    assert (strategy.device.type == "cpu") is not present
    # A torch built for CUDA names it also where there is none.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda")
    )
    assert prepare_strategy("auto").device == torch.device("cpu")
    with pytest.raises(
        ConfigError, match='Device "cuda" is not available: torch sees no accelerator'
    ):
        prepare_strategy("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert prepare_strategy("auto").device == torch.device("cuda")
    assert prepare_strategy("cuda:1").device == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="torch sees 2 x cuda"):
        prepare_strategy("cuda:2")
    with pytest.raises(ConfigError, match='"auto"'):
        prepare_strategy("mps")


def test_a_strategy_is_returned_as_it_is() -> None:
    strategy = SingleDevice("cpu")
    assert prepare_strategy(strategy) is strategy

    own: Any = SimpleNamespace(**dict.fromkeys(MEMBERS))  # any object with the members
    assert prepare_strategy(own) is own


def test_a_strategy_that_lacks_members_is_refused_by_their_names() -> None:
    members = dict.fromkeys(MEMBERS)
    del members["state_dict"], members["sum_counts"]
    own: Any = SimpleNamespace(**members)
    with pytest.raises(ConfigError, match=r"SimpleNamespace lacks .*: sum_counts, state_dict"):
        prepare_strategy(own)
    with pytest.raises(ConfigError, match="lacks"):
        train_loop(Net(), make_batches([4]), strategy=own, progress_bar=False)
    module: Any = Net()  # it has an apply, a state_dict and more, and means to be no strategy
    with pytest.raises(ConfigError, match="neither"):
        prepare_strategy(module)


@pytest.mark.parametrize("spec", ["gpu", "cpu:x", "", 3, None, object()])
def test_what_is_no_device(spec: Any) -> None:
    with pytest.raises(ConfigError, match="auto"):
        prepare_strategy(spec)


@pytest.mark.parametrize("spec", ["auto", "cpu", SingleDevice()])
def test_an_unknown_precision(spec: Any) -> None:
    precision: Any = "fp8"
    with pytest.raises(ConfigError, match="'fp8' is none of \"no\""):
        prepare_strategy(spec, mixed_precision=precision)


def test_automatic_precision() -> None:
    strategy = prepare_strategy("cpu", mixed_precision="auto")
    assert isinstance(strategy, SingleDevice)
    assert strategy.precision == "bf16"


def test_a_precision_beside_a_strategy_that_has_its_own() -> None:
    for spec in (Accelerator(cpu=True), SingleDevice("cpu")):
        with pytest.raises(ConfigError, match="has its own precision"):
            prepare_strategy(spec, mixed_precision="bf16")


def test_several_processes_are_refused_by_a_strategy_of_one_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match=r"2 processes.*auto"):
        prepare_strategy("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    prepare_strategy("cpu")


def test_an_accelerator_that_divides_losses_is_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=2.*train_loop"):
        prepare_strategy(accelerator)


def test_a_launcher_of_accelerate_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision in ("no", "auto"):
        strategy = prepare_strategy(mixed_precision=precision)  # type: ignore[arg-type]
        assert isinstance(strategy, Accelerated)
        assert strategy.accelerator.mixed_precision == "bf16"
        assert "bf16" in repr(strategy)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    strategy = prepare_strategy(mixed_precision="bf16")  # what the script says counts
    assert isinstance(strategy, Accelerated)
    assert strategy.accelerator.mixed_precision == "bf16"


# Whose model is it? -------------------------------------------------------------------------------


def test_the_strategy_of_a_model_is_found_again() -> None:
    for strategy in (SingleDevice("cpu"), Accelerated(Accelerator(cpu=True))):
        model = Net()
        assert strategy_for(model, None) is not strategy
        prepared = strategy.prepare_model(model)
        assert strategy_for(model, None) is strategy
        assert strategy_for(prepared, None) is strategy
        other = SingleDevice("cpu")
        assert strategy_for(model, other) is other


def test_a_strategy_may_be_given_as_what_it_is_made_of() -> None:
    batches, model = make_batches([4, 4]), Net()
    accelerator = Accelerator(cpu=True)
    for spec in ("cpu", accelerator):
        given: Any = spec
        train_loop(model, batches, max_steps=2, strategy=given, progress_bar=False)
        evaluate_loop(model, batches, strategy=given)
    found = strategy_for(model, None)
    assert isinstance(found, Accelerated)
    assert found.accelerator is accelerator
    wrong: Any = 3
    with pytest.raises(ConfigError, match="strategy=3"):
        evaluate_loop(model, batches, strategy=wrong)


def test_nothing_is_kept_alive() -> None:
    def use(strategy: Any) -> weakref.ref[nn.Module]:
        model = Net()
        train_loop(model, make_batches([4]), max_steps=1, strategy=strategy, progress_bar=False)
        return weakref.ref(model)

    references = [use(SingleDevice("cpu")), use(Accelerator(cpu=True))]
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_preparing_twice_gives_the_same_objects() -> None:
    accelerator = Accelerator(cpu=True)
    assert prepare_strategy(accelerator) is prepare_strategy(accelerator)
    for strategy in (SingleDevice("cpu"), prepare_strategy(accelerator)):
        model = Net()
        prepared = strategy.prepare_model(model)
        assert strategy.prepare_model(prepared) is prepared
        assert strategy.prepare_model(model) is prepared
        own = prepare_optimizer(prepared)
        _, optimizer = strategy.prepare(model, own)
        assert strategy.prepare(prepared, optimizer) == (prepared, optimizer)
        assert strategy.prepare(model, own) == (prepared, optimizer)
    assert accelerator._models == [prepared]
    assert accelerator._optimizers == [optimizer]


def test_batches_are_moved_whatever_they_are_made_of() -> None:
    Pair = type("Pair", (tuple,), {})  # noqa: N806
    x = torch.ones(2)
    nest = {"x": x, "more": [x, (x, "text")], "number": 3}
    moved = move(nest, torch.device("meta"))
    assert moved["x"].device.type == moved["more"][0].device.type == "meta"
    assert moved["more"][1][0].device.type == "meta"
    assert (moved["more"][1][1], moved["number"]) == ("text", 3)
    assert isinstance(moved["more"], list)
    assert isinstance(move(Pair((x,)), torch.device("meta")), Pair)
    packed = torch.nn.utils.rnn.pack_sequence([x])
    assert SingleDevice("cpu").to_device(packed) is packed
    assert SingleDevice("meta").to_device(nest)["x"].device.type == "meta"


# accelerate: the same bits ------------------------------------------------------------------------


def train(strategy: Any, **options: Any) -> tuple[list[Tensor], list[float], list[float]]:
    torch.manual_seed(7)
    model, losses, norms = make_net(), [], []
    optimizer = prepare_optimizer(model, lr=1e-2)
    scheduler = prepare_scheduler(optimizer, num_training_steps=20)
    state = TrainState(model, optimizer, scheduler)
    batches = make_batches([4, 4, 3, 4, 1, 4, 4])
    for step in train_steps(state, batches, num_epochs=2, strategy=strategy, **options):
        losses.append(step.loss.item())
        norms.append(-1.0 if step.grad_norm is None else step.grad_norm.item())
    return [parameter.detach().clone() for parameter in model.parameters()], losses, norms


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate_gives_the_weights_of_plain_torch(
    max_grad_norm: float | None, accumulation: int
) -> None:
    options = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulation}
    plain = train(SingleDevice("cpu"), **options)
    accelerated = train(prepare_strategy(Accelerator(cpu=True)), **options)
    assert plain[1:] == accelerated[1:]
    assert all(torch.equal(one, other) for one, other in zip(plain[0], accelerated[0], strict=True))
    if max_grad_norm:
        assert max(plain[2]) > max_grad_norm  # it did clip
    other = train(SingleDevice("cpu"), **{**options, "gradient_accumulation_steps": 2})
    assert not torch.equal(plain[0][0], other[0][0])  # a difference would show


def test_accelerate_in_bf16_gives_the_weights_of_plain_torch() -> None:
    plain = train(SingleDevice("cpu", mixed_precision="bf16"))
    accelerated = train(prepare_strategy(Accelerator(cpu=True, mixed_precision="bf16")))
    assert plain[1] == accelerated[1]
    assert all(torch.equal(one, other) for one, other in zip(plain[0], accelerated[0], strict=True))
    assert plain[1] != train(SingleDevice("cpu"))[1]


def test_an_accelerator_that_already_holds_model_and_optimizer() -> None:
    torch.manual_seed(7)
    accelerator, model = Accelerator(cpu=True), make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    data = [{"x": row["x"][0], "labels": row["labels"][0]} for row in make_batches([1] * 12)]
    loader = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    held_model, held_optimizer, held_loader = accelerator.prepare(model, optimizer, loader)
    result = train_loop(
        held_model,
        held_loader,
        held_optimizer,
        lr_scheduler=None,
        num_epochs=2,
        strategy=prepare_strategy(accelerator),
        progress_bar=False,
    )
    assert result.state.model is held_model
    assert result.state.optimizer is held_optimizer
    assert accelerator._models == [held_model]
    assert accelerator._optimizers == [held_optimizer]

    torch.manual_seed(7)
    plain = make_net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    plain.train()
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            plain(**batch)["loss"].backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), held_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_going_on_with_a_state_under_accelerate() -> None:
    strategy, model = prepare_strategy(Accelerator(cpu=True)), make_net()
    state = TrainState(model, prepare_optimizer(model))
    for num_epochs in (1, 2):
        for _ in train_steps(
            state,
            make_batches([4] * 3),
            num_epochs=num_epochs,
            max_grad_norm=1.0,
            strategy=strategy,
        ):
            pass
    assert state.progress.num_steps == 6
    assert isinstance(strategy, Accelerated)
    assert strategy.accelerator._optimizers == [state.optimizer]


def test_a_scheduler_that_accelerate_prepared_is_stepped_once_an_update() -> None:
    accelerator, model = Accelerator(cpu=True), make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = prepare_scheduler(optimizer, num_training_steps=4)
    held = accelerator.prepare(model, optimizer, scheduler)
    rates: list[float] = []
    train_loop(
        held[0],
        make_batches([4] * 4),
        held[1],
        held[2],
        num_epochs=1,
        strategy=prepare_strategy(accelerator),
        on_step=lambda step: rates.append(step.lr),
        progress_bar=False,
    )
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_loaders_that_accelerate_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    strategy, model = prepare_strategy(accelerator), make_net()
    data = [{"x": row["x"][0], "labels": row["labels"][0]} for row in make_batches([1] * 10)]
    loaders: list[Any] = [
        DataLoader(data, batch_size=4, shuffle=shuffle)  # type: ignore[arg-type]
        for shuffle in (False, True)
    ]
    prepared = [accelerator.prepare(loader) for loader in loaders]

    def mse(predictions: Any, references: Any) -> float:
        return float(((predictions - references) ** 2).mean())

    expected = evaluate_loop(model, loaders[0], mse)
    for loader in prepared:
        got = evaluate_loop(model, loader, mse, strategy=strategy)
        assert got == pytest.approx(expected, rel=1e-6)
    table = predict_loop(model, prepared[0], strategy=strategy)
    assert table.references is not None
    assert table.references.tolist() == [row["labels"].item() for row in data]
    with pytest.raises(DataError, match="order"):
        predict_loop(model, prepared[1], strategy=strategy)


# Half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_forward_passes_run_under_autocast(precision: Any, dtype: torch.dtype) -> None:
    model, seen = make_net(), []
    model.hidden.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    strategy = prepare_strategy("cpu", mixed_precision=precision)
    accumulate_gradients(model, make_batches([4]), strategy=strategy)
    evaluate_loop(model, make_batches([4]), strategy=strategy)
    assert set(seen) == {dtype}  # the first evaluation tries whether rows may be split
    del seen[1:]
    evaluate_loop(model, make_batches([4]), strategy=strategy)
    predict_loop(model, make_batches([4]), strategy=strategy)
    assert seen == [dtype] * 3
    assert model.hidden.weight.dtype == torch.float32
    assert model.hidden.weight.grad is not None
    assert model.hidden.weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def fp16() -> SingleDevice:
    """A scale at which gradients of 1 do not overflow; the default one begins by some skips."""
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return strategy


def overflowing(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make gradients that do not fit into float16."""
    return {**batch, "labels": batch["labels"] + 1e4}


def adamw(fused: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


OPTIMIZERS = {
    "fused": adamw(True),
    "unfused": adamw(False),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_skips_the_update_and_nothing_moves(
    kind: str, max_grad_norm: float | None
) -> None:
    model = make_net()
    optimizer = OPTIMIZERS[kind](model)
    scheduler = prepare_scheduler(optimizer, num_training_steps=10)
    state = TrainState(model, optimizer, scheduler)
    strategy = fp16()
    assert strategy.scaler is not None
    batches = make_batches([4] * 5)
    batches[2] = overflowing(batches[2])
    weights: list[list[Tensor]] = []
    seen: list[Step] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        loss: Tensor = model(**batch)["loss"]
        return loss

    for step in train_steps(
        state,
        batches,
        num_epochs=1,
        max_grad_norm=max_grad_norm,
        loss_fn=loss_fn,
        strategy=strategy,
    ):
        seen.append(step)
        assert state.progress.num_steps == step.index
    # Weights as they were before batch 2 are those before batch 3: nothing moved.
    assert all(torch.equal(one, other) for one, other in zip(*weights[2:4], strict=True))
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert not torch.equal(weights[before][0], weights[after][0])
    assert [step.index for step in seen] == [1, 2, 3, 4]
    assert [step.lr for step in seen] == pytest.approx([1e-2, 0.9e-2, 0.8e-2, 0.7e-2])
    assert scheduler.last_epoch == 4
    assert (state.progress.num_steps, state.progress.num_skipped) == (4, 1)
    assert (state.progress.epoch, state.progress.num_samples) == (1, 0)
    assert strategy.scaler.get_scale() == 2**9
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for values in state.optimizer.state_dict()["state"].values():
        if "step" in values:
            assert values["step"] == 4
            assert values["exp_avg"].isfinite().all()
    if max_grad_norm is not None:
        norms = [float(step.grad_norm) for step in seen if step.grad_norm is not None]
        assert len(norms) == 4
        assert all(0 < norm < 100 for norm in norms)  # unscaled: not 65536 times as large


def test_a_skipped_last_update_still_ends_the_run() -> None:
    batches = make_batches([4] * 3)
    batches[2] = overflowing(batches[2])
    result = train_loop(
        make_net(),
        batches,
        num_epochs=1,
        evaluate=lambda: {"score": 1.0},
        strategy=fp16(),
        progress_bar=False,
    )
    assert (result.state.progress.num_steps, result.state.progress.num_skipped) == (2, 1)
    assert result.metrics == {"score": 1.0}


def test_max_steps_counts_applied_updates() -> None:
    batches = make_batches([4] * 3)
    batches[1] = overflowing(batches[1])
    result = train_loop(
        make_net(),
        batches,
        max_steps=3,
        strategy=fp16(),
        progress_bar=False,
    )
    assert (result.state.progress.num_steps, result.state.progress.num_skipped) == (3, 1)


def test_fp16_scales_gradients_and_the_update_takes_it_out() -> None:
    batches = make_batches([4] * 3)
    models = []
    for strategy in (SingleDevice("cpu"), fp16()):
        model = make_net()
        model.dropout.p = 0.0
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in train_steps(state, batches, num_epochs=1, strategy=strategy):
            pass
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)
    assert not torch.equal(models[0].hidden.weight, models[1].hidden.weight)


def test_gradients_accumulated_by_hand_are_those_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_net()
    assert isinstance(strategy_in_place(model), SingleDevice)
    assert strategy_in_place(model).device == torch.device("cpu")
    assert strategy_in_place(nn.Linear(1, 1, device="meta")).device == torch.device("meta")
    prepared = SingleDevice("cpu")
    prepared.prepare_model(model)
    assert strategy_in_place(model) is prepared
    # Under a launcher a model alone would train on each rank for itself.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert isinstance(strategy_in_place(make_net()), Accelerated)
    assert strategy_in_place(model) is prepared
