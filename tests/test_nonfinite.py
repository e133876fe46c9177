"""A loss or norm that is NaN or infinite: never in the weights, never hidden, its row named."""

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from manualloop import (
    Accelerated,
    DataError,
    NonFiniteError,
    SingleDevice,
    TrainState,
    internals,
    train_loop,
    train_steps,
    update,
)
from manualloop.data.sampler import OrderedBatchSampler, order

NUM_ROWS, BATCH_SIZE = 24, 3
BAD_ROW = order(NUM_ROWS, seed=1, epoch=0)[14]  # in the third of four windows of two batches


def collate(rows):
    x, labels = map(torch.stack, zip(*rows, strict=True))
    return {"x": x, "labels": labels}


def loader_with(value, row=BAD_ROW):
    x = torch.randn(NUM_ROWS, 4, generator=torch.Generator().manual_seed(0))
    x[row, 2] = value
    labels = torch.arange(NUM_ROWS) % 2
    sampler = OrderedBatchSampler(NUM_ROWS, BATCH_SIZE, shuffle=True, seed=1)
    return DataLoader(TensorDataset(x, labels), batch_sampler=sampler, collate_fn=collate)


def step_of(row):
    """Return the update, from 1, whose window of two batches of the first epoch holds a row."""
    rows = OrderedBatchSampler(NUM_ROWS, BATCH_SIZE, shuffle=True, seed=1).rows()
    return rows.index(row) // (2 * BATCH_SIZE) + 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2)
        )

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def new_state(fused=False):
    model = Model()
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused))


def steps_of(state, loader, **changes):
    options = {"num_epochs": 2, "gradient_accumulation_steps": 2} | changes
    return train_steps(state, loader, **options)


def weights(state):
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def is_equal(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_raise_leaves_the_weights_and_names_step_epoch_batch_and_row(value, max_grad_norm):
    state, before = new_state(), None
    torch.manual_seed(3)
    with pytest.raises(NonFiniteError) as caught:
        for step in steps_of(state, loader_with(value), max_grad_norm=max_grad_norm):
            before, moments = weights(state), str(state.optimizer.state_dict())
            last = step.index
    assert last == step_of(BAD_ROW) - 1
    assert is_equal(weights(state), before)
    assert str(state.optimizer.state_dict()) == moments
    assert state.progress.num_steps == last
    rows = loader_with(0).batch_sampler.rows()
    assert "The loss is nan" in str(caught.value)
    assert f"at step {step_of(BAD_ROW)} (epoch 0)" in str(caught.value)
    assert f"train batch {rows.index(BAD_ROW) // BATCH_SIZE} (row id {BAD_ROW})" in str(
        caught.value
    )
    assert "and 1 more" not in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)


def test_the_rows_before_the_bad_one_train_as_if_it_were_not_there():
    """The checks change no bit: up to the bad step the run is the one with clean data."""
    clean, broken = new_state(), new_state()
    torch.manual_seed(3)
    clean_losses = [float(step.loss) for step in steps_of(clean, loader_with(0.0))]
    torch.manual_seed(3)
    losses = []
    with pytest.raises(NonFiniteError):
        for step in steps_of(broken, loader_with(math.nan)):
            losses.append(float(step.loss))
    assert losses == clean_losses[: step_of(BAD_ROW) - 1]


def test_skip_goes_on_and_counts(caplog):
    state, indices = new_state(), []
    with caplog.at_level("INFO", logger="manualloop"):
        for step in steps_of(state, loader_with(math.nan), on_nonfinite="skip"):
            indices.append((step.index, step.num_skipped))
            assert math.isfinite(step.loss)
    bad = step_of(BAD_ROW)
    assert len(indices) == 8 - 2  # one of the four windows of both epochs
    assert [skipped for _, skipped in indices][:bad] == [0] * (bad - 1) + [1]
    assert state.progress.num_skipped == 2
    assert all(torch.isfinite(parameter).all() for parameter in state.model.parameters())
    assert caplog.text.count("skipped an update") == 1
    assert f"(row id {BAD_ROW})" in caplog.text


def test_skip_moves_nothing():
    state = new_state()
    state.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda n: 1 / (1 + n))
    seen = {}
    for step in steps_of(state, loader_with(math.nan), on_nonfinite="skip", num_epochs=1):
        assert state.lr_scheduler.last_epoch == step.index
        seen[step.index] = step.lr
    assert seen == pytest.approx({1: 0.1, 2: 0.1 / 2, 3: 0.1 / 3})


def test_ignore_makes_the_update_and_nan_is_reported_as_nan():
    state = new_state()
    result = train_loop(
        state.model,
        loader_with(math.nan),
        state.optimizer,
        num_epochs=1,
        on_nonfinite="ignore",
        log_every=1,
        progress_bar=False,
    )
    losses = [record["loss"] for record in result.history]
    first = losses.index(next(loss for loss in losses if math.isnan(loss)))
    assert all(math.isnan(loss) for loss in losses[first:])
    assert not torch.isfinite(next(state.model.parameters())).all()


def test_weights_that_are_nan_already_are_named():
    state = new_state()
    with torch.no_grad():
        state.model.layers[2].bias[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"weights were not finite before it: layers\.2\.bias"):
        next(steps_of(state, loader_with(0.0)))


def test_a_gradient_of_nan_with_a_finite_loss_is_seen_with_a_norm_and_explained_without_one():
    torch.manual_seed(0)
    rows = [{"x": torch.ones(4, 2)}, {"x": torch.zeros(4, 2)}, {"x": torch.ones(4, 2)}]

    def loss_fn(model, batch):
        return model(batch["x"]).abs().sqrt().mean()  # its slope at 0 is infinite

    for norm, wrong_at in ((1.0, 2), (None, 3)):
        model = torch.nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"num_epochs": 1, "loss_fn": loss_fn, "progress_bar": False}
        with pytest.raises(NonFiniteError, match=f"at step {wrong_at} ") as error:
            train_loop(model, rows, optimizer, None, max_grad_norm=norm, **options)
        assert bool(torch.isfinite(model.weight).all()) == (norm is not None)
        assert ("max_grad_norm=1.0 looks at the gradient" in str(error.value)) == (norm is None)
        assert ("on_nonfinite=" in str(error.value)) == (norm is not None)


@pytest.mark.parametrize("reaction", ["raise", "skip"])
def test_running_means_that_a_bad_batch_has_spoilt_are_named(reaction, caplog):
    caplog.set_level("INFO", logger="manualloop")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    rows = [{"x": torch.randn(4, 2)}, {"x": torch.full((4, 2), math.nan)}]
    text = ""
    try:
        train_loop(
            model,
            rows,
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            on_nonfinite=reaction,
            progress_bar=False,
        )
    except NonFiniteError as error:
        text = str(error)
    told = "has left NaN in buffers: 0.running_mean, 0.running_var."
    assert told in (text if reaction == "raise" else caplog.text)


def test_a_norm_that_overflows_is_watched_where_there_is_one():
    def loss_of_steep_gradient(model, batch):
        return (model(**batch)["logits"] * 1e30).square().mean().clamp(max=1.0) + sum(
            (p - p.detach()).sum() * 1e38 * 1e2 for p in model.parameters()
        )

    with pytest.raises(NonFiniteError, match="the gradient norm inf"):
        next(
            steps_of(
                new_state(), loader_with(0.0), loss_fn=loss_of_steep_gradient, max_grad_norm=1.0
            )
        )


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_on_an_accelerator_the_kernel_guards_and_the_host_learns_late(monkeypatch, max_grad_norm):
    """The path of accelerators, on the CPU: flags are not read at once, AdamW is fused."""
    landed: list[bool] = []
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    monkeypatch.setattr(
        "manualloop.strategy.transfer.LateTensor.has_landed", lambda self: bool(landed)
    )
    reference, state = new_state(fused=True), new_state(fused=True)
    bad = step_of(BAD_ROW)
    torch.manual_seed(3)
    for step in steps_of(reference, loader_with(0.0), max_grad_norm=max_grad_norm):
        if step.index == bad - 1:
            break
    torch.manual_seed(3)
    with pytest.raises(NonFiniteError, match=rf"at step {bad} .*\(row id {BAD_ROW}\)"):
        for step in steps_of(state, loader_with(math.nan), max_grad_norm=max_grad_norm):
            if step.index == bad + 2:
                landed.append(True)
    assert step.index == bad + 2
    assert is_equal(weights(state), weights(reference))
    for ours, theirs in zip(
        state.optimizer.state.values(), reference.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_kernel_that_does_not_look_at_the_flag_is_not_relied_on(monkeypatch):
    """As those of mps before torch 2.13: they take ``found_inf``, and make the update."""
    kernel = torch._fused_adamw_

    def blind(*args, found_inf, **kwargs):
        kernel(*args, found_inf=None, **kwargs)

    monkeypatch.setattr(
        internals, "_kernel_heeds_found_inf", internals._kernel_heeds_found_inf.__wrapped__
    )
    monkeypatch.setattr(torch, "_fused_adamw_", blind)
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    reference, state = new_state(fused=True), new_state(fused=True)
    bad = step_of(BAD_ROW)
    torch.manual_seed(3)
    for step in steps_of(reference, loader_with(0.0)):
        if step.index == bad - 1:
            break
    torch.manual_seed(3)
    with pytest.raises(NonFiniteError, match=f"at step {bad} "):
        list(steps_of(state, loader_with(math.nan)))
    assert is_equal(weights(state), weights(reference))


@pytest.mark.parametrize("kind", ["Adagrad", "Adam", "AdamW", "SGD"])
def test_the_fused_kernels_of_the_cpu_look_at_the_flag(kind):
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(1))], fused=True)
    assert internals.heeds_found_inf(optimizer, torch.device("cpu"))
    plain = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(1))], fused=False)
    assert not internals.heeds_found_inf(plain, torch.device("cpu"))


def test_a_step_of_the_users_own_is_not_relied_on():
    class Decayed(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.mul_(0.9)

    class Same(torch.optim.AdamW):
        pass

    for kind, is_torchs in ((Decayed, False), (Same, True)):
        optimizer = kind([torch.nn.Parameter(torch.ones(1))], fused=True)
        assert internals.heeds_found_inf(optimizer, torch.device("cpu")) is is_torchs


def test_leaving_the_loop_with_flags_pending_does_not_hide_them(monkeypatch):
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    monkeypatch.setattr("manualloop.strategy.transfer.LateTensor.has_landed", lambda self: False)
    state = new_state(fused=True)
    steps = steps_of(state, loader_with(math.nan))
    with pytest.raises(NonFiniteError):
        for step in steps:
            if step.index == step_of(BAD_ROW) + 1:
                steps.close()
    before = weights(state)
    assert list(steps_of(state, loader_with(0.0), num_epochs=4)), "the state trains no more"
    assert not is_equal(weights(state), before)


@pytest.mark.parametrize("kind", ["tuples", "two lengths", "two rows at least", "step_fn"])
def test_what_cannot_be_tried_row_by_row_hides_nothing(kind):
    def loss_fn(model, batch):
        x, labels = batch[:2] if isinstance(batch, tuple) else batch.values()
        if len(x) < 2 and kind == "two rows at least":
            raise ValueError("one row only")
        return model(x=x, labels=labels)["loss"]

    batches = list(loader_with(math.nan))
    if kind in ("tuples", "two lengths"):
        more = (torch.zeros(7),) if kind == "two lengths" else ()
        batches = [(*batch.values(), *more) for batch in batches]
    changes = {"loss_fn": loss_fn}
    if kind == "step_fn":
        changes = {"step_fn": partial(update.apply_update, loss_fn=loss_fn)}
    found = "no row .* by itself"
    if kind in ("tuples", "step_fn"):
        found = "it comes from row"
    with pytest.raises(NonFiniteError, match=found):
        list(steps_of(new_state(), batches, **changes))


def test_bad_rows_do_not_eat_the_loss_scale():
    """A third of the batches is NaN: the scale falls by overflows only."""
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    state = new_state()
    good, bad = list(loader_with(0.0)), list(loader_with(math.nan))
    bad_batch = next(batch for batch in bad if batch["x"].isnan().any())
    batches = [bad_batch if number % 3 == 0 else good[number % 8] for number in range(60)]
    for _ in steps_of(
        state,
        batches,
        strategy=strategy,
        on_nonfinite="skip",
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        num_epochs=1,
    ):
        pass
    assert state.progress.num_skipped >= 20
    assert strategy.scaler.get_scale() >= 2.0**10


def test_an_unfused_optimizer_on_an_accelerator_is_waited_for(monkeypatch):
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    state, before = new_state(fused=False), None
    with pytest.raises(NonFiniteError):
        for _ in steps_of(state, loader_with(math.nan)):
            before = weights(state)
    assert is_equal(weights(state), before)


def test_fp16_overflow_is_skipped_nan_in_the_loss_is_not():
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    # The first gradients overflow, and the scale falls until they do not.
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    state = new_state()
    steps = list(
        steps_of(
            state,
            loader_with(0.0),
            strategy=strategy,
            max_grad_norm=1.0,
            max_steps=6,
            num_epochs=None,
        )
    )
    assert len(steps) == 6
    assert state.progress.num_skipped > 5
    assert all(torch.isfinite(parameter).all() for parameter in state.model.parameters())

    with pytest.raises(NonFiniteError):
        list(
            steps_of(
                new_state(), loader_with(math.nan), strategy=SingleDevice(mixed_precision="fp16")
            )
        )


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_skipped_loss_leaves_the_loss_scale_usable(max_grad_norm, accelerated):
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    if accelerated:
        strategy = Accelerated(Accelerator(cpu=True, mixed_precision="fp16"))
    state = new_state()
    steps = list(
        steps_of(
            state,
            loader_with(math.nan),
            strategy=strategy,
            on_nonfinite="skip",
            max_grad_norm=max_grad_norm,
        )
    )
    assert state.progress.num_skipped >= 2
    assert len(steps) + state.progress.num_skipped == 8
    assert all(torch.isfinite(parameter).all() for parameter in state.model.parameters())


def test_a_run_that_only_skips_ends():
    bad = [batch for batch in loader_with(math.nan) if batch["x"].isnan().any()]
    with pytest.raises(DataError, match="all updates of epoch 0 were skipped, because"):
        list(steps_of(new_state(), bad, on_nonfinite="skip", num_epochs=None, max_steps=3))


def test_a_run_that_begins_with_nan_ends_at_once():
    state = new_state()
    with torch.no_grad():
        state.model.layers[2].bias[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"not finite before it: layers\.2\.bias"):
        list(steps_of(state, loader_with(0.0), on_nonfinite="skip", num_epochs=None, max_steps=3))
    assert state.progress.num_skipped == 0
