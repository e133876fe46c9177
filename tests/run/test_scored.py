"""The weights that a checkpoint's metrics are of are those that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import logging
import pickle
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import tiny_bert, whole_and_resumed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertForMaskedLM, BertForSequenceClassification

from manualloop import (
    TrainState,
    evaluate_loop,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    train_loop,
    train_steps,
)

BATCHES = [
    {"input_ids": torch.tensor([[2, 4 + i, 3], [2, 9 + i, 3]]), "labels": torch.tensor([0, 1])}
    for i in range(4)
]


def bits(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


class ScheduleFree(torch.optim.SGD):
    """Defazio et al., 2024: trains at y, evaluates at x. The way back is rounded."""

    def __init__(self, parameters, lr, beta=0.9):
        super().__init__(parameters, lr)
        self.param_groups[0] |= {"beta": beta, "count": 0, "train_mode": False}

    def _move(self, weight_of_z):
        for weight in self.param_groups[0]["params"]:
            if "z" in self.state[weight]:
                weight.data.lerp_(self.state[weight]["z"], weight_of_z)

    def eval(self):
        group = self.param_groups[0]
        if group["train_mode"]:
            self._move(1 - 1 / group["beta"])
        group["train_mode"] = False

    def train(self):
        group = self.param_groups[0]
        if not group["train_mode"]:
            self._move(1 - group["beta"])
        group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        assert group["train_mode"], "call train() before step()"
        group["count"] += 1
        share = 1 / group["count"]
        for y in group["params"]:
            z = self.state[y].setdefault("z", y.clone())
            y.lerp_(z, share)
            y.add_(y.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
            z.sub_(y.grad, alpha=group["lr"])


class Stored:
    """An average that is copied into the model for an evaluation, as torch_ema's."""

    def __init__(self, model):
        self.model, self.shadow = model, bits(model)

    def update(self):
        for name, weight in self.model.state_dict().items():
            if weight.is_floating_point():
                self.shadow[name].lerp_(weight, 0.1)

    @contextmanager
    def applied(self):
        kept = bits(self.model)
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values):
        for name, weight in self.model.state_dict().items():
            weight.data.copy_(values[name])

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state):
        self.shadow = {name: value.clone() for name, value in state.items()}


def by_hand(model):
    """An evaluation without a function of ours."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        loss = sum(model(**batch).loss.item() for batch in BATCHES) / len(BATCHES)
    for module, mode in modes:
        module.training = mode
    return {"loss": loss}


def ours(model):
    return {"loss": evaluate_loop(model, BATCHES)["loss"]}


def train(folder, kind, evaluates, on_step=None, scored=None, make=tiny_bert, **options):
    torch.manual_seed(0)
    model = make()
    scored = {} if scored is None else scored
    optimizer = (ScheduleFree if kind == "schedule-free" else torch.optim.SGD)(
        model.parameters(), lr=0.5
    )
    extras, update = {}, lambda step: None
    if kind == "average":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        extras, update = {"average": average}, lambda step: average.update_parameters(model)
    elif kind == "stored":
        stored = Stored(model)
        extras, update = {"stored": stored}, lambda step: stored.update()

    def evaluate():
        if kind == "average":
            scores, weights = evaluates(average.module), bits(average.module)
        elif kind == "stored":
            with stored.applied():
                scores, weights = evaluates(model), bits(model)
        else:
            scores, weights = evaluates(model), bits(model)
        scored[scores["loss"]] = weights
        return scores

    def on_each(step):
        update(step)
        if on_step is not None:
            on_step(step)

    return train_loop(
        model,
        BATCHES,
        optimizer,
        None,
        **{"num_epochs": 2, "evaluate": evaluate, "best_metric": "loss", **options},
        extras=extras,
        on_step=on_each,
        checkpoint_dir=folder,
        progress_bar=False,
    )


KINDS = ["plain", "average", "schedule-free", "stored"]


@pytest.mark.parametrize("evaluates", [ours, by_hand])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_holds_the_weights_that_were_scored(kind, evaluates, tmp_path):
    scored = {}
    result = train(tmp_path, kind, evaluates, scored=scored)
    best = scored[min(scored)]
    assert min(scored) == result.best_metrics["loss"]
    assert find_checkpoint(tmp_path, "best") == result.best_checkpoint
    loaded = BertForSequenceClassification.from_pretrained(result.best_checkpoint)
    assert same(bits(loaded), best)
    bare = tiny_bert().train()
    info = load_checkpoint(tmp_path, bare, which="best")
    assert (info.path, info.step) == (result.best_checkpoint, result.best_step)
    assert same(bits(bare), best)
    assert bare.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_with_the_weights_that_were_trained(kind, tmp_path):
    def run(folder, on_step):
        options = {"evaluate_every": 2, "checkpoint_every": 2}
        return train(folder, kind, ours, on_step=on_step, **options)

    whole, resumed = whole_and_resumed(run, tmp_path, dies_after=5)
    assert same(bits(resumed.state.model), bits(whole.state.model))
    assert resumed.history == whole.history


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_and_without_evaluations(kind, tmp_path):
    with_them = train(tmp_path, kind, ours, evaluate_every=1)
    without = train(None, kind, ours, evaluate=None, best_metric=None)
    assert same(bits(with_them.state.model), bits(without.state.model))


def test_tied_weights_stay_tied(tmp_path):
    def make():
        return tiny_bert(kind=BertForMaskedLM)

    batches = [{**batch, "labels": batch["input_ids"]} for batch in BATCHES]

    def run(folder, on_step):
        torch.manual_seed(0)
        model = make()
        stored = Stored(model)

        def evaluate():
            with stored.applied():
                return {"loss": evaluate_loop(model, batches)["loss"]}

        def on_each(step):
            stored.update()
            if on_step is not None:
                on_step(step)

        return train_loop(
            model,
            batches,
            torch.optim.SGD(model.parameters(), lr=0.5),
            num_epochs=2,
            extras={"stored": stored},
            evaluate=evaluate,
            best_metric="loss",
            checkpoint_dir=folder,
            on_step=on_each,
            progress_bar=False,
        )

    whole, resumed = whole_and_resumed(run, tmp_path, dies_after=5)
    assert same(bits(resumed.state.model), bits(whole.state.model))
    loaded = BertForMaskedLM.from_pretrained(whole.best_checkpoint)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    return lambda: [record.getMessage() for record in caplog.records]


def simple_run(folder, evaluate, on_step=None, extras=None, model=None, **options):
    model = model or nn.Linear(1, 1)
    return train_loop(
        model,
        [{"x": torch.ones(2, 1)}] * 2,
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        num_epochs=2,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        evaluate=evaluate,
        on_step=on_step,
        extras=extras,
        checkpoint_dir=folder,
        progress_bar=False,
        **options,
    )


def test_the_module_of_an_average_in_the_extras_is_saved_however_it_is_evaluated(tmp_path, lines):
    model = nn.Linear(1, 1)
    average = AveragedModel(model)
    batches = [{"x": torch.ones(1, 1)}]
    evaluate = partial(
        evaluate_loop,
        average.module,
        batches,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        progress_bar=False,
    )
    extras = {"average": average}
    simple_run(tmp_path, evaluate, lambda step: average.update_parameters(model), extras, model)
    assert [line for line in lines() if "is scored and not saved" in line] == []


def test_an_average_that_is_scored_and_not_saved_is_logged_once(tmp_path, lines):
    model = nn.Linear(1, 1)
    average = AveragedModel(model)

    def evaluate():
        return {"score": average(torch.ones(1, 1)).item()}

    simple_run(tmp_path, evaluate, lambda step: average.update_parameters(model), model=model)
    (line,) = [line for line in lines() if "is scored and not saved" in line]
    assert line.startswith("evaluate.__closure__.average.module is scored")


def test_scores_of_two_sets_of_weights_are_logged(tmp_path, lines):
    model = nn.Linear(1, 1)
    average, x = AveragedModel(model), torch.ones(1, 1)

    def evaluate():
        return {"score": model(x).item(), "average_score": average.module(x).item()}

    simple_run(tmp_path, evaluate, extras={"average": average}, model=model)
    assert sum("model.safetensors has the trained weights" in line for line in lines()) == 1


@pytest.mark.parametrize("returns_average", [True, False])
def test_what_evaluate_loop_returned_tells_which_of_two_was_scored(
    returns_average, tmp_path, lines
):
    model = tiny_bert()
    average = AveragedModel(model)
    seen = {}

    def evaluate():
        scores = [evaluate_loop(one, BATCHES) for one in (model, average.module)]
        seen["model"], seen["average"] = bits(model), bits(average.module)
        return scores[returns_average]

    train_loop(
        model,
        BATCHES,
        torch.optim.SGD(model.parameters(), lr=0.5),
        num_epochs=1,
        evaluate=evaluate,
        extras={"average": average},
        checkpoint_dir=tmp_path,
        progress_bar=False,
    )
    bare = tiny_bert()
    load_checkpoint(tmp_path, bare)
    assert same(bits(bare), seen["average" if returns_average else "model"])
    assert not [line for line in lines() if "trained weights" in line]


def test_a_frozen_teacher_is_no_average(tmp_path, lines):
    model = nn.Linear(1, 1)
    teacher = copy.deepcopy(model)

    def evaluate():
        return {"score": model(torch.ones(1, 1)).item()}

    def on_step(step):
        teacher(torch.ones(1, 1))

    simple_run(tmp_path, evaluate, on_step, model=model)
    assert not [line for line in lines() if "trained weights" in line or "not saved" in line]


def test_weights_that_a_failed_evaluation_left_are_not_saved(tmp_path, lines):
    model, calls = nn.Linear(1, 1), []

    def evaluate():
        calls.append(1)
        if len(calls) == 2:
            model.weight.data.fill_(7.0)
            raise RuntimeError("out of paper")
        return {"score": model(torch.ones(1, 1)).item()}

    with pytest.raises(RuntimeError, match="out of paper"):
        simple_run(tmp_path, evaluate, model=model, checkpoint_every=1)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000002",
        "step-00000003",
    ]
    assert any("nothing was saved after step 4" in line for line in lines())
    bare = nn.Linear(1, 1)
    load_checkpoint(tmp_path, bare)
    assert bare.weight.item() != 7.0


def test_weights_that_evaluate_changes_are_logged(tmp_path, lines):
    model = nn.Linear(1, 1)

    def evaluate():
        model.weight.data.mul_(2)
        return {"score": 1.0}

    simple_run(tmp_path, evaluate, model=model)
    assert sum("evaluate has changed the weights" in line for line in lines()) == 1


def test_a_hook_stays_for_one_forward_pass_only(tmp_path):
    model, counts = nn.Linear(1, 1), []

    def evaluate():
        for _ in range(3):
            model(torch.ones(1, 1))
            counts.append(len(model._forward_pre_hooks))
        return {"score": 1.0}

    simple_run(tmp_path, evaluate, model=model)
    assert counts == [0] * 6
    assert not model._forward_pre_hooks


# A loop of one's own ------------------------------------------------------------------------------


def own_loop(folder, num_steps):
    torch.manual_seed(0)
    model = tiny_bert()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state = TrainState(model, optimizer, extras={"average": average})
    if list(folder.glob("step-*")):
        load_checkpoint(folder, state)
    scored = None
    for step in train_steps(state, BATCHES, num_epochs=3):
        average.update_parameters(model)
        if step.every(2):
            scores = evaluate_loop(average.module, BATCHES, "accuracy")
            scored = bits(average.module)
            save_checkpoint(folder, state, metrics=scores, best_metric="loss")
        if step.index == num_steps:
            break
    return state, scored


def test_a_loop_of_ones_own_saves_what_evaluate_loop_scored(tmp_path):
    whole, _ = own_loop(tmp_path / "whole", 100)
    _, scored = own_loop(tmp_path / "parts", 6)
    loaded = BertForSequenceClassification.from_pretrained(find_checkpoint(tmp_path / "parts"))
    assert same(bits(loaded), scored)
    resumed, _ = own_loop(tmp_path / "parts", 100)
    assert same(bits(resumed.model), bits(whole.model))
    assert same(bits(resumed.extras["average"]), bits(whole.extras["average"]))


def test_scores_of_weights_that_are_gone_are_logged(tmp_path, lines):
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss_fn = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    scores = evaluate_loop(model, [{"x": torch.ones(2, 1)}], loss_fn=loss_fn)
    save_checkpoint(tmp_path, state, metrics=scores)
    assert lines() == []
    model.weight.data.add_(1)
    save_checkpoint(tmp_path, state, metrics=scores)
    assert "the metrics are of other weights" in lines()[0]


def test_scores_are_a_dict_that_can_be_sent_and_copied():
    scores = evaluate_loop(tiny_bert(), BATCHES, "confusion_matrix")
    for other in (pickle.loads(pickle.dumps(scores)), copy.deepcopy(scores)):
        assert other == scores
        assert str(other.matrices) == str(scores.matrices)
        assert other.model is None  # elsewhere there is no such model
    assert type({**scores}) is dict
    assert repr(scores) == repr(dict(scores))
