"""Records as scalars that TensorBoard reads."""

import os
import time

import pytest
from tracked_runs import KilledAt, killed, killed_at_step, train

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manualloop.tracking import tensorboard


def read(folder):
    """Return the scalars of a folder as TensorBoard shows them: value by name and step."""
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    found.Reload()
    points = {}
    for name in found.Tags()["scalars"]:
        events = found.Scalars(name)
        steps = [event.step for event in events]
        assert len(steps) == len(set(steps)), f"{name} has two values at a step"
        points |= {(name, event.step): event.value for event in events}
    return points, found


def expected_of(history):
    names = {"lr": "train/learning_rate"}
    points = {}
    for record in history:
        of_training = "lr" in record
        for name, value in record.items():
            if name == "step" or isinstance(value, str) or (name == "epoch" and not of_training):
                continue
            if of_training:
                points[names.get(name, f"train/{name}"), record["step"]] = value
            else:
                points[name.replace("eval_", "eval/"), record["step"]] = value
    return points


def check(folder, history):
    assert read(folder)[0] == pytest.approx(expected_of(history), rel=1e-6)


def test_scalars_settings_and_hyperparameters_are_read_back(tmp_path):
    tracker = tensorboard(tmp_path / "events", config={"data": "mrpc"})
    result = train(None, [tracker], max_grad_norm=1.0)
    check(tmp_path / "events", result.history)
    points, found = read(tmp_path / "events")
    assert {name for name, _ in points} == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/epoch",
        "train/num_items",
        "eval/f1",
    }
    (event,) = found.Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert '"data": "mrpc"' in text
    assert '"num_parameters": 3' in text
    assert (
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    )


@pytest.mark.parametrize(("number", "is_after"), [(6, False), (10, True)])
def test_a_killed_run_has_each_scalar_once(number, is_after, tmp_path):
    events = tmp_path / "events"
    tracker = KilledAt(tensorboard(events), number, is_after=is_after)
    killed(train, tmp_path / "run", [tracker])
    check(events, train(tmp_path / "run", [tensorboard(events)]).history)


def test_events_that_were_on_the_disk_and_are_behind_the_checkpoint_are_gone(tmp_path):
    events = tmp_path / "events"
    tracker = tensorboard(events)

    def on_step(step):
        tracker._writer.flush()
        killed_at_step(8)(step)

    killed(train, tmp_path / "run", [tracker], on_step, log_every=1)
    steps = {step for _, step in read(events)[0]}
    assert {5, 7} <= steps
    result = train(tmp_path / "run", [tensorboard(events)], log_every=3)
    check(events, result.history)
    assert not {5, 7} & {step for _, step in read(events)[0]}
    train(tmp_path / "run", [tensorboard(events)], log_every=3, num_epochs=3)
    assert len(list(events.iterdir())) == 2  # the newest and the one before


def test_the_times_of_events_stay_when_a_run_is_resumed(tmp_path):
    events = tmp_path / "events"
    tracker = tensorboard(events)

    def on_step(step):
        if step.index == 6:
            tracker._writer.flush()
            killed_at_step(6)(step)

    killed(train, tmp_path / "run", [tracker], on_step)
    killed_at = time.time()
    train(tmp_path / "run", [tensorboard(events)])
    found = read(events)[1]
    assert {e.step for e in found.Scalars("train/loss") if e.wall_time < killed_at} == {1, 2, 4}


def test_a_running_tensorboard_drops_what_was_lost(tmp_path):
    events = tmp_path / "events"
    tracker = tensorboard(events)

    def on_step(step):
        tracker._writer.flush()
        killed_at_step(8)(step)

    killed(train, tmp_path / "run", [tracker], on_step, log_every=1)
    found = EventAccumulator(str(events), {"scalars": 0})
    found.Reload()
    assert 7 in [event.step for event in found.Scalars("train/loss")]
    result = train(tmp_path / "run", [tensorboard(events)], log_every=3)
    found.Reload()
    steps = [event.step for event in found.Scalars("train/loss")]
    assert steps == [record["step"] for record in result.history if "loss" in record]


def test_files_of_other_runs_stay(tmp_path):
    events = tmp_path / "events"
    train(tmp_path / "a", [tensorboard(events)])
    (before,) = events.iterdir()
    content = before.read_bytes()
    train(tmp_path / "b", [tensorboard(events)])
    assert before.read_bytes() == content
    assert len(list(events.iterdir())) == 2


def test_texts_are_left_out_and_reported_once(tmp_path, caplog):
    train(None, [tensorboard(tmp_path)])
    told = [record.message for record in caplog.records if "takes numbers alone" in record.message]
    assert told == [
        "tensorboard takes numbers alone: eval_text is left out there, and kept in the history."
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX paths")
def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    from manualloop import ConfigError

    (tmp_path / "events").touch()
    with pytest.raises(ConfigError, match=r"tensorboard\('.*events'\) cannot be opened: .*exists"):
        train(None, [tensorboard(tmp_path / "events")])
