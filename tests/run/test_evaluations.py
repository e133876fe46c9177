"""The best evaluation of a run is kept, not searched for."""

import json
import math
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manualloop import ConfigError, train_loop
from manualloop.run.evaluations import Evaluations

numbers = st.one_of(
    st.sampled_from([0.5, 1.0, math.nan, math.inf, -math.inf, 0, -0.0, 3]), st.floats()
)


def best_of(values, sign):
    """Which value is the best: the first of equals, and NaN is the worst."""
    keys = [-math.inf if math.isnan(value) else sign * value for value in values]
    return keys.index(max(keys))


def same(a, b):
    return repr(a) == repr(b)


@given(st.lists(numbers, min_size=1), st.sampled_from(["f1", "-f1"]), st.integers(0, 5))
def test_the_best_is_that_of_a_search_through_all(values, best_metric, cut):
    sign = -1 if best_metric == "-f1" else 1
    evaluations = Evaluations(best_metric)
    for number, value in enumerate(values, start=1):
        evaluations.add({"f1": value})
        best = best_of(values[:number], sign)
        assert same(evaluations.best, {"f1": values[best]})
        assert evaluations.num_since_best == number - 1 - best
        if number == cut:  # another process resumes
            notes, evaluations = evaluations.notes(), Evaluations(best_metric)
            evaluations.restore(notes, [])
    assert evaluations.number == len(values)
    old, records = Evaluations(best_metric), [{"f1": value} for value in values]
    old.restore(records, [])  # as 0.1.0 has noted them
    assert same(old.notes(), evaluations.notes())


def test_without_a_best_metric_the_last_is_the_best():
    evaluations = Evaluations(None)
    for f1 in (0.9, 0.1):
        evaluations.add({"f1": f1})
    assert (evaluations.best, evaluations.num_since_best) == ({"f1": 0.1}, 0)


def test_a_dict_that_evaluate_fills_again_is_not_the_best_because_it_is_the_last():
    evaluations, scores = Evaluations("f1"), {}
    for f1 in (0.9, 0.1):
        scores["f1"] = f1
        evaluations.add(scores)
    assert (evaluations.best, evaluations.last) == ({"f1": 0.9}, {"f1": 0.1})


def test_a_metric_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="returned no 'f1': loss, accuracy"):
        Evaluations("f1").add({"loss": 1.0, "accuracy": 0.5})


@pytest.mark.parametrize(
    ("best_metric", "says"),
    [
        ("+loss", "takes the highest loss for the best, which is the worst model. The lowest is"),
        ("-eval_accuracy", "takes the lowest eval_accuracy for the best, which is the worst"),
        ("-f1/macro", "The highest is best_metric='f1/macro'."),
        ("loss", "the best evaluation is the one with the lowest loss"),
        ("-gap", None),  # nobody knows
        ("-loss", None),
        ("+f1", None),
        (None, None),
    ],
)
def test_the_direction_is_told_where_it_is_not_as_one_would_expect(best_metric, says, caplog):
    with caplog.at_level("INFO", logger="manualloop"):
        Evaluations(best_metric).tell_direction()
    assert (says in caplog.text) if says else caplog.text == ""


# Runs ---------------------------------------------------------------------------------------------


def run(folder, scores, steps, **options):
    model = nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    values = iter(scores)
    return train_loop(
        model,
        [{"x": torch.ones(2, 1)}] * 400,
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        evaluate=lambda: dict(next(values)),
        checkpoint_dir=folder,
        progress_bar=False,
        **{"max_steps": steps, "evaluate_every": 1, "checkpoint_every": 1, **options},
    )


SCORES = [{"f1": 0.2, "loss": 3.0}, {"f1": 0.9, "loss": 2.0}, {"f1": 0.4, "loss": 1.0}]


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [("f1", "f1", 0.9), ("f1", "-loss", 0.4), (None, "f1", 0.9), ("-loss", "-f1", 0.2)],
)
def test_another_best_metric_looks_back_at_all_evaluations(first, then, expected, tmp_path):
    run(tmp_path, SCORES, 3, best_metric=first)
    result = run(tmp_path, [{"f1": 0.3, "loss": 4.0}], 4, best_metric=then)
    assert result.best_metrics["f1"] == expected
    assert result.metrics == {"f1": 0.3, "loss": 4.0}


def test_another_best_metric_that_older_evaluations_did_not_have(tmp_path):
    run(tmp_path, [{"f1": 0.5}, {"f1": 0.7}], 2, best_metric="f1")
    result = run(tmp_path, [{"bleu": 0.1}, {"bleu": 0.2}], 4, best_metric="bleu", patience=2)
    assert (result.best_metrics, result.stopped_by) == ({"bleu": 0.2}, "max_steps")


def test_the_best_is_known_without_the_history(tmp_path):
    run(tmp_path, SCORES, 3, best_metric="f1")
    (tmp_path / "history.jsonl").unlink()
    result = run(tmp_path, [{"f1": 0.3, "loss": 4.0}], 4, best_metric="f1", patience=3)
    assert result.best_metrics == SCORES[1]
    assert [record["step"] for record in result.history if "eval_f1" in record] == [4]


def test_patience_counts_on_where_the_other_process_stopped(tmp_path):
    run(tmp_path, SCORES, 3, best_metric="f1", patience=3)
    result = run(tmp_path, [{"f1": 0.3}] * 9, 9, best_metric="f1", patience=3)
    assert (result.stopped_by, result.state.progress.num_steps) == ("patience", 5)


def test_a_checkpoint_does_not_grow_with_the_evaluations_and_steps_before_it(tmp_path):
    sizes = {}
    for steps in (24, 64):  # the newest twenty are kept, and the best
        scores = ({"f1": 0.25} for _ in range(steps))
        run(folder := tmp_path / str(steps), scores, steps, best_metric="f1", log_every="1 h")
        (last,) = folder.glob(f"step-{steps:08}")
        state = json.loads((last / "state.json").read_bytes())["run"]
        sizes[steps] = len(json.dumps(state)) - len(str(steps))
    assert sizes[64] < sizes[24] + 200  # longer numbers


def test_records_have_the_same_bits_however_often_a_run_was_saved(tmp_path):
    def losses(folder, **options):
        torch.manual_seed(0)
        rows = [{"x": torch.rand(1 + number % 3, 1)} for number in range(40)]
        model = nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        return train_loop(
            model,
            rows,
            torch.optim.SGD(model.parameters(), lr=0.1),
            num_epochs=1,
            loss_fn=lambda model, batch: (model(batch["x"]).square().mean(), len(batch["x"]) / 3),
            checkpoint_dir=folder,
            progress_bar=False,
            log_every=13,
            **options,
        ).history

    assert losses(tmp_path / "a", checkpoint_every=1) == losses(tmp_path / "b") == losses(None)


def test_a_step_costs_the_same_after_many_evaluations():
    calls, costs = 0, []  # a list that grows: generators are looked for in what on_step holds

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    def on_step(step):
        nonlocal calls
        costs.append(calls)
        calls = 0

    scores = ({"f1": 1.0} for _ in range(300))
    sys.setprofile(count)
    try:
        run(None, scores, 300, best_metric="f1", patience=1000, on_step=on_step)
    finally:
        sys.setprofile(None)
    assert sum(costs[250:]) / 50 < 1.1 * sum(costs[50:100]) / 50


def test_a_folder_that_was_moved_goes_on_with_its_best(tmp_path):
    run(tmp_path / "a", SCORES, 3, best_metric="f1", keep_checkpoints=1)
    shutil.move(tmp_path / "a", tmp_path / "b")
    result = run(
        tmp_path / "b", [{"f1": 0.3, "loss": 4.0}], 4, best_metric="f1", keep_checkpoints=1
    )
    assert result.best_metrics == SCORES[1]
    assert {path.name for path in (tmp_path / "b").glob("step-*")} == {
        "step-00000002",
        "step-00000004",
    }
