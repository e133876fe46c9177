"""What an accelerator could do otherwise: on the best device that is here, which may be the CPU.

`test_far_device.py` runs all of it once more on `far_device`.
"""

import math
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import rows, tiny_bert, tiny_tokenizer, whole_and_resumed

from manualloop import (
    NonFiniteError,
    SingleDevice,
    TrainState,
    accumulate_gradients,
    evaluate_loop,
    load_checkpoint,
    prepare_dataloaders,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.strategy.transfer import _copy_stream, move

DEVICE = prepare_strategy("auto").device
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
tells_of_waits = pytest.mark.skipif(
    DEVICE.type not in ("cuda", "far"), reason="needs a device that tells when the host waits"
)
PRECISIONS = ["no", "bf16", *(["fp16"] if DEVICE.type in ("cuda", "far") else [])]


def loaders(**options):
    return prepare_dataloaders(
        {"train": rows(24), "validation": rows(13)}, tiny_tokenizer(), batch_size=4, **options
    )


def new_state(num_steps, **config):
    torch.manual_seed(0)
    model = tiny_bert(**config).to(DEVICE)
    optimizer = new_optimizer(model)
    return TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=num_steps))


def new_optimizer(model):
    # As prepare_optimizer makes it for a device whose name it knows.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def loss_without_mask(model, batch):
    """Leave out the mask of padding, which transformers reads in every forward pass."""
    return model(
        **{name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    ).loss


NUM_UPDATES = 11  # the host asks once in eight for what an event cannot tell


def steps_after_the_first(**options):
    """Begin so many updates and two more; the first copies the weights and makes the moments."""
    number = NUM_UPDATES + 2
    steps = train_steps(new_state(number), loaders()["train"], max_steps=number, **options)
    next(steps)
    return steps


@contextmanager
def waits_of_the_host():
    """Collect the source files that let the host wait for the device."""
    files = []
    if DEVICE.type == "far":
        from far_device import WAITS

        WAITS.clear()
        yield files
        files += WAITS
        return
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield files
        files += [w.filename for w in caught if "synchronizing" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_eleven_updates_and_the_host_never_waits(precision, max_grad_norm):
    steps = steps_after_the_first(
        loss_fn=loss_without_mask,
        max_grad_norm=max_grad_norm,
        strategy=SingleDevice(DEVICE, mixed_precision=precision),
    )
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(NUM_UPDATES):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(1 for _ in steps) == 1


@tells_of_waits
@pytest.mark.parametrize(("accumulation", "max_grad_norm"), [(1, None), (3, 1.0)])
def test_the_host_waits_for_what_the_model_reads_only(accumulation, max_grad_norm):
    steps = steps_after_the_first(
        gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm, strategy=DEVICE
    )
    of_each_step = []
    for _ in range(NUM_UPDATES):
        with waits_of_the_host() as files:
            next(steps)
        of_each_step.append([Path(file).name for file in files])
    steps.close()
    # One in a forward pass, for its mask. On cuda an event tells what has landed; elsewhere the
    # host asks once in eight updates.
    assert all("masking_utils.py" in names for names in of_each_step)
    own = [name for names in of_each_step for name in names if name != "masking_utils.py"]
    assert own == ([] if DEVICE.type == "cuda" else ["nonfinite.py"])


@tells_of_waits
def test_fp16_waits_twice_an_update():
    steps = steps_after_the_first(
        loss_fn=loss_without_mask, strategy=SingleDevice(DEVICE, mixed_precision="fp16")
    )
    with waits_of_the_host() as files:
        for _ in range(NUM_UPDATES):
            next(steps)
    steps.close()
    assert len(files) == 2 * NUM_UPDATES  # is the loss finite, and was the update made?


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_weights_are_those_of_the_loop_written_by_hand(precision):
    model = tiny_bert().to(DEVICE)
    optimizer = new_optimizer(model)
    schedule = prepare_scheduler(optimizer, num_training_steps=12)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    data = loaders()["train"]
    torch.manual_seed(1)
    model.train()
    for epoch in range(2):
        data.batch_sampler.set_epoch(epoch)
        for batch in data:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
                loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    state = new_state(12)
    torch.manual_seed(1)
    strategy = SingleDevice(DEVICE, mixed_precision=precision)
    for _ in train_steps(state, loaders()["train"], num_epochs=2, strategy=strategy):
        pass
    for ours, theirs in zip(state.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_to_the_last_bit(precision, tmp_path):
    def run(folder, on_step):
        torch.manual_seed(0)
        return train_loop(
            tiny_bert(),
            loaders()["train"],
            num_epochs=2,
            strategy=SingleDevice(DEVICE, mixed_precision=precision),
            checkpoint_dir=folder,
            checkpoint_every=3,
            on_step=on_step,
            progress_bar=False,
        )

    whole, resumed = whole_and_resumed(run, tmp_path, dies_after=7)
    assert resumed.state.progress.num_steps == whole.state.progress.num_steps == 12


def test_what_was_trained_on_the_cpu_goes_on_here():
    def train(*devices):
        state = new_state(22, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        for number, device in enumerate(devices, start=1):
            for _ in train_steps(
                state, loaders()["train"], max_steps=3 * number, strategy=SingleDevice(device)
            ):
                pass
        return state

    moved, at_home = train("cpu", DEVICE, "cpu"), train("cpu", "cpu", "cpu")
    for ours, theirs in zip(moved.model.parameters(), at_home.model.parameters(), strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "NAdam", "SGD", "LBFGS"])
def test_the_state_of_an_optimizer_comes_along_as_it_is(kind):
    model = torch.nn.Linear(2, 1)
    make = {"AdamW": partial(torch.optim.AdamW, fused=False, foreach=False)}.get(kind)
    if kind == "fused AdamW":
        make = partial(torch.optim.AdamW, fused=True)
    make = make or getattr(torch.optim, kind)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = make(model.parameters(), lr=0.1, **options)
    data = torch.randn(3, 2)

    def update():
        optimizer.zero_grad()
        loss = model(data.to(model.weight.device)).square().mean()
        loss.backward()
        return loss

    optimizer.step(update)
    group = optimizer.param_groups[0]
    optimizer.state[model.weight]["master"] = torch.ones(2, dtype=torch.float64, device="cpu")
    SingleDevice(DEVICE).prepare(model, optimizer)
    optimizer.step(update)
    assert optimizer.param_groups[0] is group
    assert optimizer.state[model.weight]["master"].dtype == torch.float64
    assert optimizer.state[model.weight]["master"].device.type == DEVICE.type


def test_the_first_update_with_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        steps = train_steps(new_state(22), loaders()["train"], max_steps=2, strategy=DEVICE)
        assert [step.index for step in steps] == [1, 2]
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_are_accumulated_where_the_model_is():
    model, batch = tiny_bert().to(DEVICE), next(iter(loaders()["train"]))
    update = accumulate_gradients(model.eval(), [batch, batch])
    assert update.num_items == 8
    assert all(p.grad.device.type == DEVICE.type for p in model.parameters())


def test_a_bad_row_ends_the_run_and_the_weights_are_those_from_before():
    state, seen = new_state(22), []
    data = loaders()["train"]

    def loss_fn(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(**batch).loss * (math.nan if len(seen) == 6 else 1.0)

    with pytest.raises(NonFiniteError, match="step 6"):
        for _ in train_steps(state, data, num_epochs=2, loss_fn=loss_fn, strategy=DEVICE):
            pass
    for ours, before in zip(state.model.parameters(), seen[5], strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_bad_row_ends_a_run_that_saves_and_is_named(checkpoint_every, tmp_path):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return model(**batch).loss * (math.nan if len(calls) == 6 else 1.0)

    with pytest.raises(NonFiniteError, match="step 6"):
        train_loop(
            tiny_bert(),
            loaders()["train"],
            num_epochs=2,
            loss_fn=loss_fn,
            strategy=DEVICE,
            checkpoint_dir=tmp_path,
            checkpoint_every=checkpoint_every,
            progress_bar=False,
            preflight=False,
        )
    saved = sorted(path.name for path in tmp_path.glob("step-*"))
    assert saved[-1] == f"step-{5 if checkpoint_every == 1 else 4:08}"


def two_optimizers(model, *, fused=True):
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    first = torch.optim.SGD(matrices, lr=1e-3, momentum=0.9, fused=fused, foreach=False)
    return [first, torch.optim.AdamW(others, lr=1e-3, fused=True)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_bad_row_reaches_neither_of_two_optimizers(fused, on_nonfinite):
    seen = []

    def loss_fn(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(**batch).loss * (math.nan if len(seen) == 6 else 1.0)

    model = tiny_bert().to(DEVICE)
    state = TrainState(model, two_optimizers(model, fused=fused))
    options = {"max_steps": 8, "loss_fn": loss_fn, "strategy": DEVICE, "on_nonfinite": on_nonfinite}
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="step 6"):
            for _ in train_steps(state, loaders()["train"], **options):
                pass
        assert all(map(torch.equal, state.model.parameters(), seen[5]))
        return
    for _ in train_steps(state, loaders()["train"], **options):
        pass
    assert state.progress.num_skipped == 1
    assert all(map(torch.equal, seen[6], seen[5]))
    assert all(bool(weight.isfinite().all()) for weight in state.model.parameters())


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.skipif("fp16" not in PRECISIONS, reason="needs a device that knows fp16")
def test_one_loss_scale_holds_for_two_optimizers(max_grad_norm):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return model(**batch).loss * (1e36 if len(calls) == 4 else 1.0)

    model = tiny_bert().to(DEVICE)
    state = TrainState(model, two_optimizers(model))
    strategy = SingleDevice(DEVICE, mixed_precision="fp16")
    before = []
    for step in train_steps(
        state,
        loaders()["train"],
        max_steps=5,
        loss_fn=loss_fn,
        strategy=strategy,
        max_grad_norm=max_grad_norm,
    ):
        before.append(strategy.scaler.get_scale())
        assert step.index == len(before)
    assert state.progress.num_skipped == 1
    assert before == [2.0**16] * 3 + [2.0**15] * 2  # it falls once


@pytest.mark.parametrize("kind", ["fused AdamW", "AdamW", "NAdam", "SGD"])
def test_the_state_of_an_optimizer_comes_back_where_it_was(kind, tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).to(DEVICE)
        model.weight = torch.nn.Parameter(model.weight.detach().t().contiguous().t())
        options = {"momentum": 0.9} if kind == "SGD" else {}
        options |= {"fused": True} if kind == "fused AdamW" else {"foreach": False}
        make = getattr(torch.optim, kind.split()[-1])
        return TrainState(model, make(model.parameters(), lr=0.1, **options))

    def train(state, max_steps):
        def loss_fn(model, batch):
            return model(batch["x"]).square().mean()

        data = [{"x": torch.ones(2, 3)}] * 4
        for _ in train_steps(
            state, data, max_steps=max_steps, loss_fn=loss_fn, strategy=SingleDevice(DEVICE)
        ):
            pass
        return state

    def layout(state):
        return [
            {
                name: (value.device.type, value.dtype, value.stride(), value.cpu().tolist())
                for name, value in entry.items()
                if isinstance(value, torch.Tensor)
            }
            for entry in state.optimizer.state.values()
        ]

    whole, half, resumed = train(build(), 4), train(build(), 2), build()
    save_checkpoint(tmp_path, half, strategy=SingleDevice(DEVICE))
    load_checkpoint(tmp_path, resumed, strategy=SingleDevice(DEVICE))
    assert layout(resumed) == layout(half)
    assert layout(train(resumed, 4)) == layout(whole)


def test_an_evaluation_is_that_of_the_cpu():
    model, data = tiny_bert(), loaders()["validation"]
    expected = evaluate_loop(model, data, "accuracy", strategy=SingleDevice("cpu"))
    found = evaluate_loop(model, data, "accuracy", strategy=SingleDevice(DEVICE))
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("num_numbers", [10, 100_000])
def test_what_is_moved_is_equal(num_numbers):
    tensor = torch.randn(num_numbers)
    moved = move({"x": [tensor, (tensor, 3)]}, DEVICE)
    assert moved["x"][0].device.type == DEVICE.type
    assert torch.equal(moved["x"][1][0].cpu(), tensor)
    assert moved["x"][1][1] == 3


def test_batches_of_a_class_of_their_own_are_moved():
    class Batch:
        def __init__(self, x):
            self.x = x

        def to(self, device):
            return Batch(self.x.to(device))

    moved = move([Batch(torch.ones(3))], DEVICE)
    assert moved[0].x.device.type == DEVICE.type
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    assert move(packed, DEVICE).data.device.type == DEVICE.type


@needs_cuda
@pytest.mark.parametrize("pins", [True, False])
def test_a_large_batch_arrives_while_the_device_computes(pins):
    tensor = torch.randn(1_000_000)
    tensor = tensor.pin_memory() if pins else tensor
    move({"x": tensor}, DEVICE)  # the stream is made
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    busy = torch.cuda.Event()
    busy.record()
    before = torch.cuda.Event()
    moved = move({"x": tensor}, DEVICE)
    before.record(_copy_stream(DEVICE))
    before.synchronize()
    assert not busy.query()  # the copy is done, and what was begun before it is not
    assert torch.equal(moved["x"].cpu(), tensor.cpu())
