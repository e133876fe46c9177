"""The folder of a run: which one it is, and which run may use it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manualloop import (
    ConfigError,
    TrainState,
    compare_runs,
    load_checkpoint,
    save_checkpoint,
    train_loop,
)


def train(folder: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return train_loop(
        model,
        [torch.ones(2, 4)] * 6,
        torch.optim.SGD(model.parameters(), lr=0.1),
        **{"max_steps": 6, "checkpoint_every": 1} | options,
        loss_fn=lambda model, batch: model(batch).square().mean(),
        checkpoint_dir=folder,
        progress_bar=False,
    )


@pytest.mark.parametrize("where", ["on_step", "evaluate"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_stays_in_its_folder_when_the_script_leaves_its_own(
    where: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    monkeypatch.chdir(ours)

    def leave(step: Any = None) -> dict[str, float]:
        os.chdir(theirs)
        return {"f1": 1.0}

    more: dict[str, Any] = {where: leave}
    train(kind("run"), **more, evaluate_every=2) if where == "evaluate" else train(
        kind("run"), **more
    )
    assert list(theirs.iterdir()) == []
    assert (ours / "run" / "step-00000006").is_dir()
    assert (ours / "run" / "history.jsonl").is_file()
    assert not (ours / "run" / ".lock").exists()


def test_the_home_folder_and_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train("~/run")
    assert (tmp_path / "run" / "step-00000006").is_dir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    train(f"{tmp_path}/link/../beside")
    assert (tmp_path / "deep" / "beside" / "step-00000006").is_dir()


URLS = [
    "s3://bucket/run",
    "gs://bucket/run",
    "hdfs://host/run",
    "hf://datasets/a/b",
    "https://example.org/run",
    "file:///tmp/run",
    "dbfs:/mnt/run",
    "abfss://container@account.dfs.core.windows.net/run",
    Path("s3://bucket/run"),  # which pathlib makes "s3:/bucket/run"
]


@pytest.mark.parametrize("path", [*URLS, "", " ", "a\0b", b"run", 7])
@pytest.mark.parametrize("call", ["train_loop", "save_checkpoint", "load_checkpoint"])
def test_what_is_no_local_folder_is_refused_and_none_is_made(
    path: Any, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    calls: dict[str, Any] = {
        "train_loop": lambda: train(path),
        "save_checkpoint": lambda: save_checkpoint(path, state),
        "load_checkpoint": lambda: load_checkpoint(path, state),
    }
    with pytest.raises(ConfigError, match="checkpoint_dir") as error:
        calls[call]()
    if path in URLS:
        assert "is a URL" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["c:run", "a:b", "run-2026-01-01T10:00:00", "s3", "x=1,y=2:3"])
def test_names_with_a_colon_are_folders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(name)
    assert (tmp_path / name / "step-00000006").is_dir()


def test_runs_to_compare_are_local_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="b='s3://x' is a URL"):
        compare_runs(tmp_path, "s3://x")
