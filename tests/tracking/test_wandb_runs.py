"""Records as rows of a run of W&B, read back from the files that it writes offline."""

import pytest
from tracked_runs import killed, killed_at_step, train

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


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def make(**options):
        return wandb("tests", settings=QUIET, **options)

    return make


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


def test_a_killed_run_has_each_row_once_and_its_settings(tracker, tmp_path):
    killed(train, tmp_path / "run", [tracker()], killed_at_step(8), log_every=1)
    first = newest(tmp_path)
    result = train(tmp_path / "run", [tracker(name="mine", config={"data": "mrpc"})], log_every=3)
    second = newest(tmp_path)
    assert first != second
    assert first.name == second.name  # the same run
    assert read_rows(second) == expected_of(result.history)
    config = read_config(second)
    assert (config["data"], config["num_parameters"], config["optimizer"]) == ("mrpc", 3, "SGD")
