"""Records as metrics that MLflow reads back from its file store."""

import pytest
from tracked_runs import KilledAt, kill_here, killed, killed_at_step, train

pytest.importorskip("mlflow")
from mlflow import MlflowClient
from mlflow.store.tracking.file_store import FileStore

from manualloop.tracking import mlflow


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow wants a database
    return (tmp_path / "mlruns").as_uri()


def read(store):
    """Return the only run of a store, and its metrics: values by name and step."""
    client = MlflowClient(tracking_uri=store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    (run,) = client.search_runs([experiment.experiment_id])
    points = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            points.setdefault((name, metric.step), []).append(metric.value)
    return run, points


def expected_of(history):
    points = {}
    for record in history:
        of_training = "lr" in record
        for name, value in record.items():
            if name == "step" or isinstance(value, str) or (name == "epoch" and not of_training):
                continue
            name = "learning_rate" if name == "lr" else name
            path = f"train/{name}" if of_training else name.replace("eval_", "eval/")
            points[path, record["step"]] = [value]
    return points


def tracker(store, **options):
    return mlflow("tests", tracking_uri=store, **options)


def test_metrics_params_tags_and_status_are_read_back(store, tmp_path):
    given = tracker(store, name="mine", config={"data": {"name": "mrpc"}}, tags={"team": "nlp"})
    result = train(tmp_path / "run", [given], max_grad_norm=1.0)
    run, points = read(store)
    assert points == expected_of(result.history)
    assert run.info.run_name == "mine"
    assert run.info.status == "FINISHED"
    assert run.data.tags["team"] == "nlp"
    params = run.data.params
    assert params["data.name"] == "mrpc"
    assert params["num_parameters"] == "3"
    assert params["optimizer"] == "SGD"


@pytest.mark.parametrize(("number", "is_after"), [(7, False), (10, True)])
def test_a_killed_run_has_each_metric_once(number, is_after, store, tmp_path):
    killed(train, tmp_path / "run", [KilledAt(tracker(store), number, is_after=is_after)])
    result = train(tmp_path / "run", [tracker(store)])
    run, points = read(store)
    assert points == expected_of(result.history)
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("number", [3, 9])
def test_a_record_that_was_half_written_is_completed(number, store, tmp_path, monkeypatch):
    write, count = FileStore._log_run_metric, []

    def write_and_die(*args):
        count.append(1)
        if len(count) == number:
            kill_here()
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "_log_run_metric", write_and_die)
        killed(train, tmp_path / "run", [tracker(store)])
    assert len(read(store)[1]) == number - 1
    result = train(tmp_path / "run", [tracker(store)])
    assert read(store)[1] == expected_of(result.history)


def test_a_record_that_failed_half_way_is_completed_when_it_is_sent_again(
    store, tmp_path, monkeypatch
):
    write, count = FileStore._log_run_metric, []

    def write_or_fail(*args):
        count.append(1)
        if len(count) == 7:
            raise ConnectionError("gone for a moment")
        write(*args)

    monkeypatch.setattr(FileStore, "_log_run_metric", write_or_fail)
    result = train(tmp_path / "run", [tracker(store)])
    assert read(store)[1] == expected_of(result.history)


def test_nothing_of_lost_steps_is_sent(store, tmp_path):
    killed(train, tmp_path / "run", [tracker(store)], killed_at_step(8), log_every=1)
    result = train(tmp_path / "run", [tracker(store)], log_every=3)
    assert read(store)[1] == expected_of(result.history)


def test_a_run_that_is_interrupted_is_not_finished(store, tmp_path):
    def on_step(step):
        if step.index == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", [tracker(store)], on_step)
    assert read(store)[0].info.status == "KILLED"
    train(tmp_path / "run", [tracker(store)])
    assert read(store)[0].info.status == "FINISHED"


def test_names_that_mlflow_refuses_are_changed(store, tmp_path):
    train(None, [tracker(store)], evaluate=lambda: {"f1/C++": 0.5, "é@2": 1, "nan": float("nan")})
    names = {name for name, _ in read(store)[1]}
    assert {"eval/f1/C__", "eval/é_2", "eval/nan"} <= names


def test_names_that_mlflow_refuses_or_would_confuse(store, tmp_path):
    long = "n" * 300
    values = {"C+": 1.0, "C#": 2.0, "a//b": 3.0, "../x": 4.0, f"{long}a": 5.0, f"{long}b": 6.0}
    train(tmp_path / "run", [tracker(store)], evaluate=lambda: values, max_steps=1, num_epochs=None)
    _, points = read(store)
    found = {name: value for (name, _), (value,) in points.items() if name.startswith("eval/")}
    assert sorted(found.values()) == [*values.values()]
    assert {"eval/C_", "eval/C__", "eval/a/_/b", "eval/.._/x"} < found.keys()
