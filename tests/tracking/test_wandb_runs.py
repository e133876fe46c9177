"""Records as rows of a run of W&B, read back from the files that it writes offline."""

import pytest
from tracked_runs import FORK, killed, killed_at_step, train

pytest.importorskip("wandb")
from wandb_files import read_config, read_rows

from manualloop.tracking import wandb

QUIET = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "console": "off",
    "quiet": True,
}


def tracked(folder, connection=None, on_step=None, log_every=3, **options):
    """Run with a tracker, in a process of its own: W&B leaves settings in the environment."""
    tracker = wandb("tests", settings=QUIET, mode="offline", dir=str(folder), **options)
    result = train(folder / "run", [tracker], on_step, log_every=log_every)
    connection.send(result.history)


def newest(folder):
    """The file of the newest process: that which `wandb sync` is to be given."""
    return max(
        (folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_ctime
    )


def expected_of(history):
    rows = []
    for number, record in enumerate(history):
        of_training = "lr" in record
        row = {"train/global_step": record["step"], "train/epoch": record["epoch"]}
        for name, value in record.items():
            if name not in ("step", "epoch") and not isinstance(value, str):
                name = "learning_rate" if name == "lr" else name
                path = f"train/{name}" if of_training else name.replace("eval_", "eval/")
                row[path] = value
        rows.append(row | {"_step": number})
    return rows


def test_a_killed_run_has_each_row_once_and_its_settings(tmp_path):
    killed(tracked, tmp_path, on_step=killed_at_step(8), log_every=1)
    first = newest(tmp_path)
    ours, theirs = FORK.Pipe()
    process = FORK.Process(
        target=tracked, args=(tmp_path, theirs), kwargs={"name": "mine", "config": {"data": "mrpc"}}
    )
    process.start()
    history = ours.recv()
    process.join(600)
    second = newest(tmp_path)
    assert first != second
    assert first.name == second.name  # the same run
    assert read_rows(second) == expected_of(history)
    config = read_config(second)
    assert (config["data"], config["num_parameters"], config["optimizer"]) == ("mrpc", 3, "SGD")
