"""``evaluate`` beside training: what it may return, and that nothing is lost if it is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import whole_and_resumed
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    CheckpointError,
    ConfigError,
    ManualLoopError,
    ModelError,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    train_loop,
)
from manualloop.checkpoint.manifest import is_lower_better
from manualloop.run.evaluations import read_metrics


def train(folder, evaluate, steps=None, optimizer=None, model=None, **options):
    model = model or nn.Linear(1, 1)
    steps = [] if steps is None else steps
    return train_loop(
        model,
        [{"x": torch.ones(2, 1)}] * 3,
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        evaluate=evaluate,
        checkpoint_dir=folder,
        on_step=lambda step: steps.append(step.index),
        progress_bar=False,
        **{"num_epochs": 3, "lr_scheduler": None, **options},
    )


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    return lambda: [record.getMessage() for record in caplog.records]


# The direction -----------------------------------------------------------------------------------

LOWER = [
    *("loss", "eval_loss", "log_loss", "perplexity", "mse", "mae", "rmse", "wer", "cer"),
    *("matched_mse", "val/loss", "mean_squared_error", "word_error_rate", "LOSS", "-f1"),
    *("loss_low", "loss_high", "matched_mse_low", "-f1_low"),
    *("val_nll", "ppl", "mape", "symmetric_mape", "ECE", "ter", "brier_score", "cross_entropy"),
    *("mean_poisson_deviance", "hamming_distance", "kl_divergence", "translation_edit_rate"),
]
HIGHER = [
    *("f1", "accuracy", "bleu", "+loss", "neg_mean_squared_error", "lossless", "r2", "terror"),
    *("matthews_correlation", "glossary", "powers", "neg_log_loss", "better", "piece", "supple"),
    *("explained_deviance_share", "distances_right", "neg_hamming_distance"),
    *("accuracy_low", "f1_high", "+loss_low", "neg_mse_high", "loss_lower"),
]


@pytest.mark.parametrize("name", LOWER)
def test_losses_and_errors_are_better_lower(name):
    assert is_lower_better(name)


@pytest.mark.parametrize("name", HIGHER)
def test_all_others_are_better_higher(name):
    assert not is_lower_better(name)


@pytest.mark.parametrize(
    ("best_metric", "best", "line"),
    [
        ("loss", 0.2, "the best evaluation is the one with the lowest loss"),
        ("+loss", 0.9, None),
        ("-f1", 0.2, None),
        ("f1", 0.9, "the best evaluation is the one with the highest f1"),
    ],
)
def test_the_direction_is_logged_once_and_holds_everywhere(
    best_metric, best, line, tmp_path, lines
):
    values = iter([0.9, 0.2, 0.5])

    def evaluate():
        value = next(values)
        return {"loss": value, "f1": value}

    result = train(tmp_path, evaluate, best_metric=best_metric, keep_checkpoints=1)
    assert result.best_metrics["loss"] == best
    assert result.best_step == {0.9: 3, 0.2: 6}[best]
    assert result.best_checkpoint == find_checkpoint(tmp_path, "best")
    assert result.best_checkpoint.name == f"step-{result.best_step:08}"
    assert result.last_checkpoint == find_checkpoint(tmp_path)
    assert result.last_checkpoint.name == "step-00000009"
    found = [text for text in lines() if "the best evaluation" in text]
    assert [text.split(" (")[0] for text in found] == ([line] if line else [])


def test_without_a_folder_or_a_best_metric_there_is_no_checkpoint(tmp_path):
    result = train(None, lambda: {"f1": 1.0}, best_metric="f1")
    assert (result.best_checkpoint, result.last_checkpoint, result.best_step) == (None, None, 3)
    result = train(tmp_path, lambda: {"f1": 1.0})
    assert (result.best_checkpoint, result.best_step) == (None, None)
    assert result.last_checkpoint.name == "step-00000009"


def test_a_direction_that_was_noted_otherwise_is_looked_up_in_the_history(tmp_path):
    from manualloop.run.evaluations import Evaluations

    evaluations = Evaluations("loss")
    notes = {"best_metric": "loss", "number": 2, "num_since_best": 1}  # of release 0.1.0
    notes |= {"last": {"loss": 0.2}, "best": {"loss": 0.9}}
    records = [{"step": 3, "eval_loss": 0.9}, {"step": 6, "eval_loss": 0.2}]
    evaluations.restore(notes, records)
    assert (evaluations.best, evaluations.best_step) == ({"loss": 0.2}, 6)


def test_the_best_is_never_rotated_away(tmp_path):
    values = iter([0.1, 0.9, *[0.5] * 20])
    train(tmp_path, lambda: {"f1": next(values)}, best_metric="f1", keep_checkpoints=1,
          evaluate_every=1, checkpoint_every=1)  # fmt: skip
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000002", "step-00000009"]


# Names -------------------------------------------------------------------------------------------


def test_a_name_that_evaluate_does_not_return_loses_nothing(tmp_path):
    steps, values = [], iter([0.3, 0.9, 0.5])
    with pytest.raises(ConfigError, match="returned no 'F1': f1"):
        train(tmp_path, lambda: {"f1": next(values)}, steps, best_metric="F1")
    assert steps == [1, 2, 3]
    info = load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert (info.step, info.metrics) == (3, {"f1": 0.3})
    result = train(tmp_path, lambda: {"f1": next(values)}, steps, best_metric="f1")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (result.best_step, result.best_metrics) == (6, {"f1": 0.9})


def test_the_first_evaluation_can_be_the_best_one_after_the_name_was_corrected(tmp_path):
    values = iter([0.9, 0.3, 0.5])
    with pytest.raises(ConfigError):
        train(tmp_path, lambda: {"f1": next(values)}, best_metric="F1")
    result = train(tmp_path, lambda: {"f1": next(values)}, best_metric="f1")
    assert (result.best_step, result.best_metrics) == (3, {"f1": 0.9})
    assert result.best_checkpoint.name == "step-00000003"


@pytest.mark.parametrize("best_metric", ["", "-", "+", 3, ["f1"]])
def test_what_is_no_name_is_refused_at_once(best_metric):
    with pytest.raises(ConfigError, match="is not a name"):
        train(None, lambda: {"f1": 1.0}, best_metric=best_metric)


# What evaluate returns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "evaluate returned None"),
        (0.9, "evaluate returned a float"),
        ([0.9], "evaluate returned a list"),
        (torch.tensor(0.9), "evaluate returned a Tensor"),
        ({"figure": object()}, "as 'figure', which no history can hold"),
        ({"a": {"b": 1}, "a_b": 2}, "two metrics of the name 'a_b'"),
    ],
)
@pytest.mark.parametrize("best_metric", [None, "f1"])
def test_what_is_no_metric_is_refused_and_nothing_is_lost(returned, message, best_metric, tmp_path):
    steps = []
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, lambda: returned, steps, best_metric=best_metric)
    assert load_checkpoint(tmp_path, nn.Linear(1, 1)).step == len(steps) == 3
    result = train(tmp_path, lambda: {"f1": 0.5}, steps, best_metric="f1")
    assert [r["step"] for r in result.history if "eval_f1" in r] == [3, 6, 9]
    assert steps == list(range(1, 10))


def test_metrics_of_all_kinds_are_kept(tmp_path):
    scores = {
        "accuracy": np.float32(0.5),
        "count": np.int64(3),
        "zero_d": torch.tensor(0.25),
        "one": torch.tensor([0.75]),
        "matrix": np.eye(2, dtype=int),
        "by_class": {"a": {"f1": 0.5}, 1: {"f1": 1.0}},
        "text": "fine",
        "nothing": None,
        "is_good": True,
        "nan": float("nan"),
    }
    expected = {
        "accuracy": 0.5,
        "count": 3,
        "zero_d": 0.25,
        "one": 0.75,
        "matrix": [[1, 0], [0, 1]],
        "by_class_a_f1": 0.5,
        "by_class_1_f1": 1.0,
        "text": "fine",
        "nothing": None,
        "is_good": True,
        "nan": float("nan"),
    }
    result = train(tmp_path, lambda: scores, best_metric="by_class_a_f1")
    assert repr(result.metrics) == repr(expected)
    assert "accuracy=0.5" in repr(result)
    assert repr(load_checkpoint(tmp_path, nn.Linear(1, 1)).metrics) == repr(expected)
    again = train(tmp_path, lambda: scores, best_metric="by_class_a_f1")
    assert repr(again.history) == repr(result.history)
    result.plot()
    result.to_pandas()


@pytest.mark.parametrize("name", ["text", "matrix", "nothing"])
def test_a_best_metric_that_is_no_number_is_refused(name, tmp_path):
    scores = {"text": "fine", "matrix": [[1]], "nothing": None}
    with pytest.raises(ConfigError, match=f"best_metric='{name}', and evaluate returned a"):
        train(tmp_path, lambda: scores, best_metric=name)
    assert load_checkpoint(tmp_path, nn.Linear(1, 1)).step == 3


def test_read_metrics_copies():
    scores = {"f1": 1.0}
    assert read_metrics(scores) is not scores


# What cannot be saved ----------------------------------------------------------------------------


class Late(torch.optim.SGD):
    """Has a state that cannot be saved, from its first step on."""

    def step(self, closure=None):
        super().step(closure)
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["path"] = Path("table.csv")


class Meta:
    def state_dict(self):
        return {"mean": torch.empty(3, device="meta")}

    def load_state_dict(self, state):
        pass


class Half:
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"level": 3}, "extras.level is a int, which cannot be saved"),
        ({"half": Half()}, "extras.half is a Half"),
        ({"table": [1, 2]}, "extras.table is a list"),
        ({"mean": Meta()}, "on meta"),
    ],
)
def test_extras_that_cannot_be_saved_are_refused_before_the_first_update(extras, message, tmp_path):
    steps = []
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, None, steps, extras=extras)
    assert steps == []
    train(None, None, steps, extras=extras)  # nothing is saved without a folder
    assert len(steps) == 9


def test_an_optimizer_whose_state_cannot_be_saved_ends_the_run_after_one_update(tmp_path):
    steps, model = [], nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"path holds a (Posix|Windows)Path"):
        train(tmp_path, None, steps, Late(model.parameters(), lr=0.1), model)
    assert steps == [1]


def test_a_rehearsal_changes_nothing(tmp_path):
    def run(folder):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        return train(folder, None, model=model, optimizer=torch.optim.AdamW(model.parameters()))

    one, other = run(None), run(tmp_path)
    assert one.history == other.history
    assert {p.name for p in tmp_path.glob("*.tmp*")} == set()


# In a new process --------------------------------------------------------------------------------


def test_a_bare_model_that_does_not_fit_is_refused_with_the_list(tmp_path):
    train(tmp_path, None)
    for other in (nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1).double()):
        before = [weight.clone() for weight in other.parameters()]
        with pytest.raises(CheckpointError, match="do not fit this model, and nothing was loaded"):
            load_checkpoint(tmp_path, other)
        assert all(map(torch.equal, before, other.parameters()))


def test_a_bare_model_changes_no_random_state(tmp_path):
    train(tmp_path, None)
    model, state = nn.Linear(1, 1), torch.get_rng_state()
    info = load_checkpoint(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert info.step == 9


def test_there_is_no_best_without_a_best_metric(tmp_path):
    train(tmp_path, lambda: {"f1": 1.0})
    for call in (find_checkpoint, lambda folder, which: load_checkpoint(folder, nn.Linear(1, 1), which=which)):  # fmt: skip  # noqa: E501
        with pytest.raises(CheckpointError, match="saved with a best_metric"):
            call(tmp_path, "best")
    with pytest.raises(ManualLoopError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "nowhere")


def test_save_checkpoint_knows_losses(tmp_path):
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step, loss in enumerate([0.9, 0.2, 0.5]):
        state.progress.num_steps = step
        save_checkpoint(tmp_path, state, metrics={"loss": loss}, best_metric="loss", keep=1)
    assert find_checkpoint(tmp_path, "best").name == "step-00000001"


def test_lazy_modules_are_refused_before_a_checkpoint_would_hold_them(tmp_path):
    for make in (lambda: nn.LazyLinear(1), lambda: nn.Sequential(nn.LazyBatchNorm1d())):
        for optimizer in (None, torch.optim.SGD([torch.zeros(1, requires_grad=True)])):
            with pytest.raises(ModelError, match="is lazy"):
                train(tmp_path, None, model=make(), optimizer=optimizer)
    model = nn.LazyLinear(1)
    model(torch.ones(1, 1))
    assert train(tmp_path, None, model=model).state.progress.num_steps == 9


def test_the_generator_of_an_evaluation_by_hand_is_saved(tmp_path):
    def run(folder, on_step):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        rows = torch.arange(8.0)[:, None]
        loader = DataLoader(rows, 2, shuffle=True, generator=torch.Generator().manual_seed(1))

        def evaluate():
            first = next(iter(loader))
            return {"first": first[0].item(), "noise": torch.rand(()).item()}

        return train_loop(
            model,
            [{"x": torch.ones(2, 1)}] * 3,
            torch.optim.SGD(model.parameters(), lr=0.1),
            None,
            num_epochs=4,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            evaluate=evaluate,
            checkpoint_dir=folder,
            checkpoint_every=1,
            on_step=on_step,
            progress_bar=False,
        )

    whole, resumed = whole_and_resumed(run, tmp_path, dies_after=7)
    assert len({record["eval_first"] for record in whole.history if "eval_first" in record}) > 1
    assert resumed.history == whole.history
