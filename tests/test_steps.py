"""train_steps and train_loop: what is yielded when, what lasts, and how a run ends."""

import copy
import itertools
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert
from peft import LoraConfig, get_peft_model

import manualloop
from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    SingleDevice,
    TrainState,
    Update,
    apply_update,
    load_checkpoint,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.data.sampler import OrderedBatchSampler
from manualloop.strategy.transfer import LateTensor

NUM_ROWS = 22


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


def new_state(num_steps=8, **extras):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return TrainState(
        model, optimizer, prepare_scheduler(optimizer, num_training_steps=num_steps), extras=extras
    )


def new_loader(batch_size=3):
    """22 rows: 8 batches of 3, the last of 1 row; windows of 2: 4 an epoch."""
    rows = torch.randn(NUM_ROWS, 2, generator=torch.Generator().manual_seed(5))
    sampler = OrderedBatchSampler(NUM_ROWS, batch_size, shuffle=True, seed=7)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows),
        batch_sampler=sampler,
        collate_fn=lambda rows: {"x": torch.stack([row for (row,) in rows])},
    )


def options(**changes):
    return {"num_epochs": 2, "gradient_accumulation_steps": 2, "loss_fn": loss_fn} | changes


def weights(state):
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def test_what_a_step_tells():
    state = new_state()
    steps = list(train_steps(state, new_loader(), **options()))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4
    assert [step.num_steps for step in steps] == [8] * 8
    assert [step.num_items for step in steps] == [6, 6, 6, 4] * 2
    assert [step.ends_epoch for step in steps] == [False, False, False, True] * 2
    assert [step.is_last for step in steps] == [False] * 7 + [True]
    assert [step.every(3) for step in steps] == [False, False, True] * 2 + [False] * 2
    assert [step.lr for step in steps] == pytest.approx([0.1 * (1 - n / 8) for n in range(8)])
    assert all(step.grad_norm is None for step in steps)
    assert all(step.loss.shape == () and not step.loss.requires_grad for step in steps)
    assert repr(steps[3]) == "Step(4/8, epoch=0, lr=0.0625, ends_epoch)"
    assert state.lr_scheduler.last_epoch == 8


@pytest.mark.parametrize("cut", range(1, 9))
def test_leaving_anywhere_and_entering_again_is_the_same_run(cut):
    whole = new_state()
    losses = [float(step.loss) for step in train_steps(whole, new_loader(), **options())]

    first = new_state()
    parts = []
    for step in train_steps(first, new_loader(), **options()):
        parts.append(float(step.loss))
        if step.index == cut:
            break
    saved = copy.deepcopy(first.state_dict())
    second = new_state()
    second.load_state_dict(saved)
    parts += [float(step.loss) for step in train_steps(second, new_loader(), **options())]
    assert parts == losses
    assert all(map(torch.equal, weights(whole), weights(second)))
    assert second.progress == whole.progress
    assert not list(train_steps(second, new_loader(), **options())), "a finished run trained"


def test_a_place_that_nothing_tells_but_the_rows_used_is_read_up_to_and_said(caplog):
    batches = list(new_loader())
    first = new_state()
    losses = [float(step.loss) for step in train_steps(first, batches, **options())]
    state = new_state()
    next(train_steps(state, batches, **options()))
    saved = copy.deepcopy(state.state_dict())
    del saved["position"]
    state = new_state()
    state.load_state_dict(saved)
    with caplog.at_level("INFO", logger="manualloop"):
        rest = [float(step.loss) for step in train_steps(state, batches, **options())]
    assert "the remaining batches may repeat rows" in caplog.text
    assert rest == losses[1:]
    assert state.progress.num_steps == 8


def test_max_steps_runs_over_as_many_epochs_as_it_takes_and_can_be_raised():
    state = new_state()
    epochs = [
        step.epoch
        for step in train_steps(state, new_loader(), **options(num_epochs=None, max_steps=6))
    ]
    assert epochs == [0, 0, 0, 0, 1, 1]
    rest = list(train_steps(state, new_loader(), **options(num_epochs=None, max_steps=9)))
    assert [(step.index, step.epoch, step.is_last) for step in rest] == [
        (7, 1, False),
        (8, 1, False),
        (9, 2, True),
    ]


def test_three_epochs_unless_said_otherwise():
    steps = list(train_steps(new_state(num_steps=24), new_loader(), loss_fn=loss_fn))
    assert (len(steps), steps[-1].epoch) == (24, 2)


def test_accumulation_longer_than_the_data_still_updates():
    steps = list(train_steps(new_state(), new_loader(), **options(gradient_accumulation_steps=99)))
    assert [(step.num_items, step.ends_epoch) for step in steps] == [(22, True)] * 2


def test_a_stream_trains_by_max_steps():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ({"x": torch.ones(2) * n} for n in range(5))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    steps = list(train_steps(new_state(), loader, max_steps=5, loss_fn=loss_fn))
    assert [(step.epoch, step.num_items, step.ends_epoch) for step in steps] == [
        (0, 2, False),
        (0, 2, False),
        (0, 1, True),
        (1, 2, False),
        (1, 2, False),
    ]


def test_arguments_are_checked_at_the_call_and_all_at_once():
    with pytest.raises(ConfigError) as caught:
        train_steps(
            new_state(), new_loader(), num_epochs=0, gradient_accumulation_steps=0, max_grad_norm=-1
        )
    assert str(caught.value).splitlines() == [
        "num_epochs must be a whole number of at least 1, got 0.",
        "gradient_accumulation_steps must be a whole number of at least 1, got 0.",
        "max_grad_norm must be above 0, got -1; None does not clip.",
    ]


def test_step_fn_beside_what_it_replaces_is_refused():
    with pytest.raises(ConfigError, match="step_fn replaces the whole update"):
        train_steps(new_state(), new_loader(), step_fn=apply_update, max_grad_norm=1.0)


def test_two_open_loops_on_one_state_are_refused():
    state = new_state()
    first = train_steps(state, new_loader(), **options())
    next(first)
    with pytest.raises(ConfigError, match="Another train_steps is still open"):
        next(train_steps(state, new_loader(), **options()))
    first.close()
    assert len(list(train_steps(state, new_loader(), **options()))) == 7


def test_a_generator_that_was_read_before_is_an_error_not_an_endless_loop():
    batches = list(new_loader())
    with pytest.raises(DataError, match="gave no batch in epoch 1"):
        list(train_steps(new_state(100), iter(batches), loss_fn=loss_fn, max_steps=100))


def test_stop_iteration_in_the_users_code_is_loud():
    def loss_of_an_empty_iterator(model, batch):
        return next(iter([]))

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(train_steps(new_state(), new_loader(), **options(loss_fn=loss_of_an_empty_iterator)))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_no_torch_context_is_open_in_the_loop_body(mixed_precision):
    strategy = SingleDevice("cpu", mixed_precision=mixed_precision)
    for _ in train_steps(new_state(), new_loader(), **options(strategy=strategy)):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_gradients_stay_until_the_next_step():
    state = new_state()
    for step in train_steps(state, new_loader(), **options(max_grad_norm=0.5)):
        norm = torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm()
        assert norm <= 0.5 * (1 + 1e-6)
        assert step.grad_norm.shape == ()


def test_train_is_called_only_when_it_is_off_so_frozen_layers_stay_frozen():
    state = new_state()
    state.model = torch.nn.Sequential(state.model, torch.nn.Dropout())
    state.model[1].eval()  # as one freezes a layer; the model itself is in train mode
    for _ in train_steps(state, new_loader(), **options()):
        assert state.model.training
        assert not state.model[1].training


class KeepsNormFrozen(torch.nn.Module):
    """Keeps its normalisation in eval mode by a ``train`` of its own, as many models do."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5)
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.dropout(self.body(self.norm(x)))


@pytest.mark.parametrize("stops_at", [None, 5, 8])
def test_a_train_method_of_the_model_is_called_as_in_a_loop_by_hand(stops_at, tmp_path):
    def built():
        torch.manual_seed(0)
        model = KeepsNormFrozen()  # in training mode, without a call of its train()
        return model, torch.optim.SGD(model.parameters(), 0.1)

    def train(state):
        for step in train_steps(state, batches, num_epochs=2, loss_fn=loss_fn):
            if step.index == stops_at:
                save_checkpoint(tmp_path, state)
                return

    batches = list(new_loader())
    theirs, optimizer = built()
    for _ in range(2):
        theirs.train()
        for batch in batches:
            loss_fn(theirs, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    state = TrainState(*built())
    train(state)
    if stops_at is not None:
        state, stops_at = TrainState(*built()), None
        load_checkpoint(tmp_path, state)
        train(state)
    assert [module.training for module in state.model.children()] == [False, True, True]
    assert all(map(torch.equal, state.model.state_dict().values(), theirs.state_dict().values()))


def test_parts_in_eval_mode_stay_in_it_where_the_model_has_a_train_method():
    model = KeepsNormFrozen()
    model.body.eval()
    model.body[0].train()
    state = TrainState(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in train_steps(state, new_loader(), **options()):
        modes = {name: module.training for name, module in model.named_modules()}
        frozen = {"norm": False, "body": False, "body.1": False}
        assert modes == {"": True, "dropout": True, "body.0": True} | frozen


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("wraps", [True, False])
def test_a_wrapper_around_a_model_in_eval_mode_does_not_train_it_without_dropout(wraps):
    """The wrappers of PEFT and DDP are in training mode when they are made."""

    def built():
        torch.manual_seed(0)
        model = tiny_bert(hidden_dropout_prob=0.5).eval()  # as from_pretrained returns it
        if not wraps:
            return model
        return get_peft_model(model, LoraConfig(target_modules=["query"], init_lora_weights=False))

    rows = [{"input_ids": torch.tensor([[2, 5, 6, 3]]), "labels": torch.tensor([1])}] * 3
    ours, theirs = built(), built()
    torch.manual_seed(1)
    train_loop(ours, rows, torch.optim.SGD(ours.parameters(), 0.1), None, max_steps=3)
    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    torch.manual_seed(1)
    for batch in rows:
        theirs(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_a_part_that_is_trained_without_dropout_is_reported(caplog):
    class Wrapped(torch.nn.Module):
        def __init__(self, part):
            super().__init__()
            self.encoder = part

        def forward(self, **batch):
            return self.encoder(**batch)

    rows = [{"input_ids": torch.tensor([[2, 5, 6, 3]]), "labels": torch.tensor([1])}]
    told = "encoder is in eval mode, as from_pretrained returns a model"
    model = Wrapped(tiny_bert().eval())
    train_loop(model, rows, max_steps=1)
    assert told in caplog.text
    assert not model.encoder.training
    caplog.clear()
    train_loop(model.train(), rows, max_steps=1)
    part = Wrapped(tiny_bert().eval().requires_grad_(False))  # frozen on purpose
    part.head = torch.nn.Linear(2, 1)
    train_loop(
        part,
        rows,
        max_steps=1,
        loss_fn=lambda model, batch: model.head(model(**batch).logits).sum(),
    )
    assert told not in caplog.text


def test_an_evaluation_that_leaves_the_model_in_eval_mode_does_not_stay_in_it():
    state, modes = new_state(), []

    def watching(model, batch):
        modes.append(model.training)
        return loss_fn(model, batch)

    state.model.eval()  # as from_pretrained leaves it
    for _ in train_steps(state, new_loader(), **options(loss_fn=watching)):
        state.model.eval()
    assert modes == [True] * 16


def test_keeping_the_steps_does_not_keep_the_graph():
    outputs = []

    def remembering(model, batch):
        output = model(batch["x"])
        outputs.append(weakref.ref(output))
        return output.square().mean()

    steps = list(train_steps(new_state(), new_loader(), **options(loss_fn=remembering)))
    assert len(steps) == 8
    assert all(output() is None for output in outputs)


def test_a_skipped_update_moves_nothing_is_not_yielded_and_is_counted():
    state = new_state()

    def every_third_is_skipped(state, batches, strategy):
        progress = state.progress
        if (progress.num_steps + progress.num_skipped) % 3 == 2:
            return Update(torch.zeros(()), 0, applied=False)
        return apply_update(state, batches, strategy, loss_fn=loss_fn)

    steps = list(
        train_steps(
            state,
            new_loader(),
            num_epochs=2,
            gradient_accumulation_steps=2,
            step_fn=every_third_is_skipped,
        )
    )
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6]
    assert state.progress.num_skipped == 2
    assert state.lr_scheduler.last_epoch == 6
    assert state.progress.epoch == 2


def test_an_error_in_the_loop_body_does_not_enter_the_generator():
    state = new_state()
    with pytest.raises(KeyError):
        for step in train_steps(state, new_loader(), **options()):
            if step.index == 3:
                raise KeyError
    assert state.progress.num_steps == 3
    assert len(list(train_steps(state, new_loader(), **options()))) == 5


def test_loading_into_a_state_that_is_being_trained_is_refused():
    state = new_state()
    saved = state.state_dict()
    for _ in train_steps(state, new_loader(), **options()):
        with pytest.raises(ConfigError, match="A train_steps is open on this state"):
            state.load_state_dict(saved)
        break


def test_states_that_do_not_fit_name_the_difference():
    saved = new_state(ema=torch.nn.Linear(1, 1)).state_dict()
    with pytest.raises(ConfigError, match=r"different parts: extras\.ema"):
        new_state().load_state_dict(saved)


# train_loop ---------------------------------------------------------------------------------------


def run(evaluate=None, **changes):
    state = new_state()
    return train_loop(
        state.model,
        new_loader(),
        state.optimizer,
        **(options() | {"evaluate": evaluate, "progress_bar": False} | changes),
    )


def test_evaluates_when_due_and_at_the_end():
    seen = []

    def evaluate():
        seen.append(len(seen))
        return {"f1": float(len(seen))}

    result = run(evaluate, evaluate_every=3)
    assert [record["step"] for record in result.history if "eval_f1" in record] == [3, 6, 8]
    assert result.metrics == {"f1": 3.0}
    assert result.best_metrics == {}
    assert result.stopped_by == "num_epochs"
    assert result.state.progress.num_steps == 8


def test_the_end_is_evaluated_also_if_its_update_was_skipped():
    def last_is_skipped(state, batches, strategy):
        if state.progress.num_steps == 7:
            return Update(torch.zeros(()), 0, applied=False)
        return apply_update(state, batches, strategy, loss_fn=loss_fn)

    result = run(lambda: {"f1": 1.0}, evaluate_every=100, loss_fn=None, step_fn=last_is_skipped)
    assert [record["step"] for record in result.history if "eval_f1" in record] == [7]
    assert result.history[-1]["step"] == 7
    assert result.history[-2]["num_items"] == 34  # steps 2 to 7: nothing is lost at the end


def test_history_has_the_mean_over_the_items_of_each_interval():
    steps = []
    result = run(on_step=steps.append, log_every=3, max_grad_norm=1.0)
    records = result.history
    assert [record["step"] for record in records] == [1, 3, 6, 8]
    assert [record["epoch"] for record in records] == [0.25, 0.75, 1.5, 2.0]
    for record, (first, last) in zip(records, [(0, 1), (1, 3), (3, 6), (6, 8)], strict=True):
        part = steps[first:last]
        total = sum(float(step.loss) * step.num_items for step in part)
        assert record["num_items"] == sum(step.num_items for step in part)
        assert record["loss"] == pytest.approx(total / record["num_items"], rel=1e-15)
        assert record["lr"] == part[-1].lr
        assert record["grad_norm"] == float(part[-1].grad_norm)


def test_the_device_is_read_once_a_log_event_and_never_else(monkeypatch):
    """The count that a profile gives: no ATen read at all, and one LateTensor a record."""
    reads = []
    read = LateTensor.read
    monkeypatch.setattr(LateTensor, "read", lambda self: reads.append(self) or read(self))
    state, batches = new_state(), list(new_loader()) * 7
    optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)  # it reads nothing itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = train_loop(
            state.model,
            batches,
            optimizer,
            max_steps=50,
            loss_fn=loss_fn,
            max_grad_norm=1.0,
            log_every=10,
            progress_bar=False,
        )
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::linear"] == 50
    assert "aten::_local_scalar_dense" not in calls
    assert len(reads) == len(result.history) == 6


def test_patience_counts_evaluations_without_improvement():
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.9, 0.9])
    result = run(lambda: {"f1": next(scores)}, evaluate_every=1, best_metric="f1", patience=2)
    assert result.stopped_by == "patience"
    assert result.state.progress.num_steps == 4  # 0.7 again is no improvement
    assert result.best_metrics == {"f1": 0.7}
    assert result.metrics == {"f1": 0.7}


def test_the_best_is_the_smallest_with_a_minus_and_never_nan():
    scores = iter([math.nan, 0.7, 0.6, math.nan, 0.9, 0.8, 0.65, 0.61])
    result = run(lambda: {"loss": next(scores)}, evaluate_every=1, best_metric="-loss")
    assert result.best_metrics == {"loss": 0.6}
    assert result.metrics == {"loss": 0.61}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "f1"}, "best_metric='f1' needs evaluate="),
        ({"evaluate": dict, "patience": 2}, "patience=2 needs a best_metric"),
        ({"evaluate": dict, "best_metric": "f1"}, "evaluate returned no 'f1': nothing"),
        ({"evaluate_every": "2 moons"}, "evaluate_every='2 moons' is not a cadence"),
        ({"num_epochs": 2, "max_steps": 5}, "Give num_epochs=2 or max_steps=5, not both"),
        ({"lr_scheduler": "liner"}, "lr_scheduler='liner' is unknown"),
    ],
)
def test_what_does_not_fit_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_a_scheduler_of_ones_own_none_and_extras():
    state = new_state()
    own = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 0.5**step)
    rates = []
    ema = torch.nn.Linear(1, 1)
    result = train_loop(
        state.model, new_loader(), state.optimizer, own, extras={"ema": ema},
        on_step=lambda step: rates.append(step.lr), progress_bar=False, **options(num_epochs=1),
    )  # fmt: skip
    assert rates == [0.1, 0.05, 0.025, 0.0125]
    assert result.state.extras == {"ema": ema}

    rates.clear()
    train_loop(
        state.model, new_loader(), torch.optim.SGD(state.model.parameters(), lr=0.3), None,
        on_step=lambda step: rates.append(step.lr), progress_bar=False, **options(num_epochs=1),
    )  # fmt: skip
    assert rates == [0.3] * 4


def test_the_schedule_is_as_long_as_the_updates_made():
    for accumulation in (1, 2, 3, 8, 50):
        steps = []
        result = run(gradient_accumulation_steps=accumulation, on_step=steps.append)
        num_steps = 2 * math.ceil(8 / accumulation)
        expected = [0.1 * (1 - n / num_steps) for n in range(num_steps)]
        assert [step.lr for step in steps] == pytest.approx(expected)
        assert result.state.lr_scheduler.get_last_lr() == [0.0]


def test_warm_up_belongs_to_a_schedule_given_by_name():
    rates = []
    run(num_warmup_steps=0.25, on_step=lambda step: rates.append(step.lr))
    assert rates == pytest.approx([0, 0.05, 0.1] + [0.1 * (1 - n / 6) for n in range(1, 6)])
    with pytest.raises(ConfigError, match="num_warmup_steps=3 belongs to a schedule given by name"):
        run(lr_scheduler=None, num_warmup_steps=3)


def test_result_prints_well():
    result = run(lambda: {"loss": 0.51234, "f1": 0.81})
    assert repr(result) == "TrainResult(8 steps, stopped_by='num_epochs', loss=0.5123, f1=0.81)"
    assert repr(run()) == "TrainResult(8 steps, stopped_by='num_epochs')"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau follows a metric"),
        (lambda optimizer: "linear", r"lr_scheduler is a str, which has no step\(\)"),
        (
            lambda optimizer: torch.optim.lr_scheduler.ConstantLR(new_state().optimizer),
            "drives another optimizer than the AdamW",
        ),
    ],
)
def test_a_schedule_that_would_not_work_is_refused_before_the_first_update(build, message):
    state = new_state()
    state.lr_scheduler = build(state.optimizer)
    before = weights(state)
    with pytest.raises(ConfigError, match=message):
        train_steps(state, new_loader(), **options())
    assert all(map(torch.equal, before, weights(state)))


def test_five_batches_with_accumulation_four_are_two_updates_the_second_of_one_batch():
    """Plain torch beside it: four batches as one, then the fifth by itself."""
    rows = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batches = [{"x": part} for part in rows.split(2)]
    ours, theirs = (torch.nn.Linear(2, 1, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    state = TrainState(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    steps = train_steps(
        state, batches, num_epochs=1, gradient_accumulation_steps=4, loss_fn=loss_fn
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step, whole in zip(steps, rows.split(8), strict=True):
        optimizer.zero_grad()
        theirs(whole).square().mean().backward()
        optimizer.step()
        assert step.num_items == len(whole)
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_warned_of_once_with_the_line_that_mends_it(dtype, caplog):
    model = torch.nn.Linear(2, 1).to(dtype)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = [{"x": batch["x"].to(dtype)} for batch in new_loader()]
    with caplog.at_level("WARNING", logger="manualloop"):
        list(train_steps(state, batches, num_epochs=1, loss_fn=loss_fn))
    (record,) = caplog.records
    assert str(dtype).removeprefix("torch.") in record.getMessage()
    assert "from_pretrained(name, dtype=torch.float32)" in record.getMessage()


def test_float16_weights_under_a_loss_scale_are_refused():
    model = torch.nn.Linear(2, 1).half()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    with pytest.raises(ModelError, match=r"are float16.*dtype=torch\.float32"):
        train_steps(state, new_loader(), **options(strategy=strategy))


def test_masked_labels_are_not_blamed_for_another_error():
    class Broken(torch.nn.Linear):
        def forward(self, x, labels):
            if (labels == -100).all():
                raise RuntimeError("my own bug")
            return {"loss": super().forward(x).mean()}

    model = Broken(2, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    labels = torch.tensor([0, 1]), torch.tensor([-100, -100])
    batches = [{"x": torch.zeros(2, 2), "labels": each} for each in labels]
    with pytest.raises(RuntimeError, match="my own bug"):
        list(train_steps(state, batches, num_epochs=1))


class Walk:
    """The package's files that calls enter in the ``with`` block, one after the other."""

    def __enter__(self):
        self.files, self.num_calls = [], 0
        sys.setprofile(self._see)
        return self

    def _see(self, frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(ROOT):
            self.num_calls += 1
            if self.files[-1:] != [path]:
                self.files.append(path)

    def __exit__(self, *error):
        sys.setprofile(None)


ROOT = str(Path(manualloop.__file__).parent)


def test_a_reader_can_follow_a_steady_update():
    """Figures of docs/architecture.md, as bounds: of files, of changes of file, and of calls."""
    rows = [torch.randint(5, 11, (8,)).tolist() for _ in range(16)]
    data = Dataset.from_dict({"input_ids": rows, "label": [0, 1] * 8})
    model = tiny_bert()
    loader = prepare_dataloaders({"train": data}, model=model, batch_size=2)["train"]
    optimizer = prepare_optimizer(model, lr=1e-3)
    state = TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=4))
    steps = train_steps(
        state, loader, num_epochs=1, gradient_accumulation_steps=2, max_grad_norm=1.0
    )
    next(steps)
    with Walk() as walk:
        next(steps)
    steps.close()
    assert len(set(walk.files)) <= 14
    assert len(walk.files) - 1 <= 30
    assert walk.num_calls <= 65


class Squares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def test_the_order_of_an_epoch_is_made_once(monkeypatch):
    """Also where the first window is checked: a batch is named for a message alone."""
    made, order = [], OrderedBatchSampler._order

    def noted(sampler, settings, epoch):
        made.append(epoch)
        return order(sampler, settings, epoch)

    monkeypatch.setattr(OrderedBatchSampler, "_order", noted)
    model = Squares()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(list(train_steps(state, new_loader(), **options(loss_fn=None)))) == 8
    assert made == [0, 1]


@pytest.mark.parametrize("cut", [2, 5])
def test_loops_that_are_made_before_the_first_is_run_keep_their_own_contracts(cut, tmp_path):
    def steps_of(state):
        calls = [
            train_steps(state, new_loader(), **options(max_steps=3, num_epochs=None)),
            train_steps(state, [{"x": torch.ones(2, 2)}] * 4, max_steps=6, loss_fn=loss_fn),
        ]
        return itertools.chain(*calls)

    whole = new_state()
    for step in steps_of(whole):
        save_checkpoint(tmp_path / str(step.index), whole)
    state = new_state()
    load_checkpoint(tmp_path / str(cut), state)
    assert [step.index for step in steps_of(state)] == list(range(cut + 1, 7))
    assert all(map(torch.equal, weights(whole), weights(state)))
