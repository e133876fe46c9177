"""Arguments are checked at the call, all at once, before anything is touched."""

import math
import os
import traceback
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manualloop import (
    ConfigError,
    DataError,
    ManualLoopError,
    TrainState,
    evaluate_loop,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.arguments import all_at_once, check_arguments, is_count, is_positive


def loss_fn(model, batch):
    return model(batch["x"]).mean()


def untouched_after(call, folder, /, **options):
    """Return the lines of the error, after looking whether the call has left anything behind."""
    model = nn.Linear(1, 1)
    model.eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = dict(optimizer.param_groups[0])
    random_state = torch.get_rng_state()
    with pytest.raises(ManualLoopError) as caught:
        call(model, optimizer, **options)
    assert not os.listdir(folder)
    assert not model.training
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert optimizer.param_groups[0] == group
    assert torch.equal(random_state, torch.get_rng_state())
    return caught.value


def call_train_loop(model, optimizer, *, data=None, **options):
    data = [{"x": torch.ones(2, 1)}] * 4 if data is None else data
    options = {"loss_fn": loss_fn, "progress_bar": False, **options}
    train_loop(model, data, optimizer, **options)


def call_train_steps(model, optimizer, *, data=None, **options):
    data = [{"x": torch.ones(2, 1)}] * 4 if data is None else data
    train_steps(TrainState(model, optimizer), data, **{"loss_fn": loss_fn, **options})


# One argument of each group, and a part of what is said of it.
WRONG = {
    "num_epochs": (0, "num_epochs must be a whole number of at least 1, got 0."),
    "gradient_accumulation_steps": (1.5, "gradient_accumulation_steps must be a whole number"),
    "max_grad_norm": ("1.0", "max_grad_norm must be above 0, got '1.0'"),
    "step_fn": (3, "step_fn is a int. Pass a function"),
    "on_nonfinite": ("stop", "on_nonfinite='stop' is none of"),
    "log_every": ("2 moons", "log_every='2 moons' is not a cadence"),
    "evaluate_every": (0, "evaluate_every=0 is not a cadence"),
    "checkpoint_every": (None, "checkpoint_every=None is not a cadence"),
    "max_time": ("soon", "max_time='soon' is not a time"),
    "best_metric": ("f1", "best_metric='f1' needs evaluate="),
    "patience": (0, "patience must be a whole number of at least 1, got 0."),
    "on_step": (3, "on_step is a int. Pass a function"),
    "resume": ("yes", "resume='yes' is none of"),
    "keep_checkpoints": (math.nan, "keep_checkpoints must be a whole number of at least 1"),
    "num_warmup_steps": (-1, "num_warmup_steps=-1 is neither a number of updates"),
}


def test_every_argument_in_one_error(tmp_path):
    wrong = {name: value for name, (value, _) in WRONG.items()}
    error = untouched_after(call_train_loop, tmp_path, checkpoint_dir=tmp_path / "run", **wrong)
    lines = str(error).splitlines()
    assert type(error) is ConfigError
    for _, text in WRONG.values():
        assert sum(text in line for line in lines) == 1, text
    assert len(lines) == len(set(lines)) == len(WRONG) + 1  # step_fn beside loss_fn


@pytest.mark.parametrize("name", WRONG)
def test_one_argument_alone(name, tmp_path):
    value, text = WRONG[name]
    more = {"checkpoint_dir": tmp_path / "run"}
    if name == "step_fn":
        more["loss_fn"] = None
    if name == "patience":
        more |= {"best_metric": "f1", "evaluate": dict}
    error = untouched_after(call_train_loop, tmp_path, **more, **{name: value})
    assert text in str(error)
    assert "\n" not in str(error)


def test_five_from_five_groups(tmp_path):
    error = untouched_after(
        call_train_loop,
        tmp_path,
        checkpoint_dir=tmp_path / "run",
        max_steps=-3,
        evaluate=4,
        checkpoint_every="never",
        lr_scheduler="liner",
        keep_checkpoints=0,
    )
    assert type(error) is ConfigError
    assert [line.split(maxsplit=1)[0] for line in str(error).splitlines()] == [
        "max_steps",
        "checkpoint_every='never'",
        "evaluate",
        "keep_checkpoints",
        "lr_scheduler='liner'",
    ]


def test_a_wrong_count_brings_no_complaint_of_what_depends_on_it(tmp_path):
    """Without a plan nobody knows the length of an epoch, nor of the schedule."""
    options = {"log_every": "0.5 epoch", "num_warmup_steps": 2, "lr_scheduler": "cosine"}
    error = untouched_after(call_train_loop, tmp_path, num_epochs=0, **options)
    assert str(error) == "num_epochs must be a whole number of at least 1, got 0."


def test_what_is_no_loader_is_named_beside_the_rest(tmp_path):
    error = untouched_after(
        call_train_loop, tmp_path, data={"train": [], "test": []}, num_epochs=0, patience=0
    )
    assert type(error) is DataError
    assert "splits train, test" in str(error)
    assert "patience must be a whole number" in str(error)


def test_an_optimizer_by_name(tmp_path):
    def call(model, optimizer, **options):
        call_train_loop(model, "adamw", **options)

    error = untouched_after(call, tmp_path, log_every=0)
    assert str(error).splitlines() == [
        'log_every=0 is not a cadence. Write a number of updates (200), "epoch", "0.25 epoch", or '
        'a time ("10 min").',
        "optimizer is a str. Pass an optimizer of the model: prepare_optimizer(model, lr=5e-5).",
    ]


def test_a_model_without_trainable_weights_is_named_beside_the_rest(tmp_path):
    def call(model, optimizer, **options):
        call_train_loop(model.requires_grad_(False), None, **options)

    error = untouched_after(call, tmp_path, checkpoint_dir=tmp_path / "run", max_time=-1)
    assert [line.split()[0] for line in str(error).splitlines()] == ["max_time=-1", "Linear"]


def test_train_steps_lists_all_as_well(tmp_path):
    error = untouched_after(
        call_train_steps, tmp_path, num_epochs=True, max_grad_norm=-1, on_nonfinite=None, loss_fn=1
    )
    assert [line.split()[0] for line in str(error).splitlines()] == [
        "num_epochs",
        "max_grad_norm",
        "loss_fn",
        "on_nonfinite=None",
    ]


def test_the_learning_rate_of_a_refused_call_is_that_of_the_next(tmp_path):
    """A notebook's cell, run again after its mistake is corrected."""
    model = nn.Linear(1, 1)
    optimizer, rates = torch.optim.SGD(model.parameters(), lr=0.5), []
    options = {"num_epochs": 1, "num_warmup_steps": 2, "on_step": lambda s: rates.append(s.lr)}
    with pytest.raises(ConfigError):
        call_train_loop(model, optimizer, **options, keep_checkpoints=0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    call_train_loop(model, optimizer, **options)
    assert rates == [0.0, 0.25, 0.5, 0.25]


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2)])
def test_whole_numbers_of_numpy_are_taken(number, tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"num_epochs": number, "gradient_accumulation_steps": number}
    call_train_loop(
        model, optimizer, **options, checkpoint_dir=tmp_path, keep_checkpoints=number,
        evaluate=lambda: {"f1": 1.0}, best_metric="f1", patience=number,
    )  # fmt: skip
    save_checkpoint(tmp_path / "other", TrainState(model, optimizer), keep=number)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, math.nan, "2", None, [2], np.float64(2)])
def test_what_is_no_count(value):
    assert not is_count(value)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), math.inf, Fraction(1, 2)])
def test_what_is_positive(value):
    assert is_positive(value)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, True, "1", None, Decimal(1), 1j])
def test_what_is_not_positive(value):
    assert not is_positive(value)


def test_other_errors_pass_and_one_error_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError), all_at_once() as check:
        check(lambda: 1 // 0)
    own = ConfigError("lr")

    def fail():
        raise own

    with pytest.raises(ConfigError) as caught, all_at_once() as check:
        assert check(fail) is None
        assert check(max, 1, 2) == 2
    assert caught.value is own
    with pytest.raises(KeyError), all_at_once() as check:
        check(fail)
        raise KeyError  # what fails inside the block is not hidden


WRONG_CALLS = {
    "on_step": lambda: None,
    "evaluate": lambda model: {},
    "loss_fn": lambda batch: 0,
    "terms": lambda outputs: [],
    "step_fn": lambda state, batches: None,
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_function_that_cannot_be_called_is_refused_before_the_first_update(name: str) -> None:
    """An evaluation may be due after hours."""
    seen: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Any:
        seen.append(1)
        return model(batch["x"]).mean()

    options = {} if name in ("terms", "step_fn") else {"loss_fn": loss_fn}
    with pytest.raises(ConfigError, match=f"^{name} will be called as {name}\\("):
        train_loop(
            torch.nn.Linear(1, 1),
            [{"x": torch.ones(2, 1)}],
            num_epochs=1,
            progress_bar=False,
            **{**options, name: WRONG_CALLS[name]},
        )
    assert seen == []


def test_functions_of_every_kind_can_be_called() -> None:
    class Function:
        def __call__(self, model: Any, batch: Any, weight: float = 1.0) -> None:
            pass

        def method(self, *arguments: Any) -> None:
            pass

    functions = [
        *(Function(), Function().method, torch.nn.Identity(), torch.add, max),
        *(partial(lambda model, batch, scale: None, scale=2), lambda *arguments, **options: None),
    ]
    for function in functions:
        check_arguments(loss_fn=function)
    with pytest.raises(ConfigError, match=r"transform will be called as transform\(row, generator"):
        check_arguments(transform={"train": lambda row, generator: row, "dev": lambda row: row})


def test_a_cadence_without_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    train_loop(
        torch.nn.Linear(1, 1),
        [{"x": torch.ones(2, 1)}],
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        checkpoint_every=3,
        evaluate_every="0.5 epoch",
        progress_bar=False,
    )
    assert [line for line in caplog.messages if "no effect" in line] == [
        "evaluate_every='0.5 epoch' has no effect without evaluate=.",
        "checkpoint_every=3 has no effect without checkpoint_dir=.",
    ]


@pytest.mark.parametrize("note", ["", " See the dataset card."])
def test_a_traceback_has_each_problem_once(note):
    def refuse(text):
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise DataError(text) from cause

    with pytest.raises(DataError) as caught, all_at_once(note) as check:
        check(refuse, "one problem: dataset.filter(f)")
        check(refuse, "another problem")
    printed = "".join(traceback.format_exception(caught.value))
    assert [printed.count(text) for text in ("one problem", "another problem")] == [1, 1]
    assert "the cause" in printed


def test_two_ways_of_predicting_are_refused():
    def function(one, other):
        return one, other

    with pytest.raises(ConfigError, match="Give postprocess or decode, not both"):
        check_arguments(postprocess=function, decode=function)
    check_arguments(postprocess=None, decode=function)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (nn.functional.mse_loss, "mse_loss"),
        (partial(nn.functional.cross_entropy, label_smoothing=0.1), "cross_entropy"),
    ],
)
def test_a_loss_of_torch_is_no_loss_fn(loss, name):
    batches = [(torch.ones(2, 3), torch.ones(2, 2))]
    for run in (partial(train_loop, num_epochs=1, progress_bar=False), evaluate_loop):
        with pytest.raises(ConfigError, match=f"loss_fn is torch's {name}, which takes") as error:
            run(nn.Linear(3, 2), batches, loss_fn=loss)
        line = str(error.value).rpartition("loss_fn=")[2].removesuffix(".")
        run(nn.Linear(3, 2), batches, loss_fn=eval(line, {"loss": loss}))
