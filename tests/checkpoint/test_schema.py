"""Every field that is saved is one that the schema knows: it refuses another thing in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from manualloop import CheckpointError, SingleDevice, train_loop
from manualloop.checkpoint import restore
from manualloop.checkpoint.schema import MANIFEST, STATE

# What only the user's objects read, or what is compared with the run at hand afterwards.
LET_THROUGH = {
    *("model.*", "optimizer.*.*", "optimizer.*", "strategy.*", "lr_scheduler", "extras.ema"),
    *("position.dataset", "position.pending.*", "position.workers.*.dataset"),
    *("changes.buffers.*", "changes.attributes.*"),
    *("run.evaluations.last.*", "run.evaluations.best.*"),
    *("metrics.*", "contract.*.*", "contract.groups.*.*"),
    "sha256",  # the manifest's own, by which it was read
}


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 12:
            self.at += 1
            yield torch.full((3,), float(self.at))
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Counting(nn.Module):
    """Changes what no state_dict has: a buffer, an attribute, modes and requires_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.num_calls = nn.Linear(3, 1), nn.Dropout(0.1), 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        self.num_calls += 1
        self.seen += 1
        self.drop.training = self.layer.bias.requires_grad = False
        return self.drop(self.layer(x))


def rows(**options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(36.0).reshape(12, 3) / 36)
    return DataLoader(data, 2, generator=torch.Generator().manual_seed(1), **options)


LOADERS = {
    "rows": lambda: rows(shuffle=True),
    "rows with workers": lambda: rows(shuffle=True, num_workers=1),
    "a stream": lambda: DataLoader(Stream(), 2),
    "a stream with workers": lambda: DataLoader(Stream(), 2, num_workers=1),
    "batches": lambda: [torch.ones(2, 3)] * 6,
}


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    x = batch[0] if isinstance(batch, list | tuple) else batch
    return model(x).square().mean()


def save(folder: Path, loader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save inside an epoch; return the state and the manifest, as the schema sees them."""
    torch.manual_seed(0)

    def end(step: Any) -> None:
        if step.index == 4:
            raise KeyboardInterrupt

    def run(**options: Any) -> None:
        model = Counting()
        train_loop(
            model,
            loader,
            torch.optim.AdamW(model.parameters(), lr=0.01),
            max_steps=5,
            loss_fn=loss_fn,
            extras={"ema": nn.Linear(1, 1), "noise": torch.Generator()},
            evaluate=lambda: {"f1": 1.0},
            evaluate_every=2,
            best_metric="f1",
            checkpoint_dir=folder,
            checkpoint_every=3,
            strategy=SingleDevice("cpu", mixed_precision="fp16"),
            progress_bar=False,
            **options,
        )

    with pytest.raises(KeyboardInterrupt):
        run(on_step=end)
    seen: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "check_state", lambda values, *_: seen.append(dict(values)))
        run()
    manifest = json.loads((folder / "step-00000003" / "manifest.json").read_text())
    return seen[0], manifest


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the paths of all entries of nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in entries:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def is_let_through(path: tuple[Any, ...]) -> bool:
    """Tell whether an entry, or one that it is in, is among those that are let through."""
    names = [str(part) for part in path]
    if names[0] in LET_THROUGH:  # its name has a dot
        return True
    return any(
        len(known) <= len(names) and all(k in ("*", n) for k, n in zip(known, names, strict=False))
        for known in (entry.split(".") for entry in LET_THROUGH)
    )


def with_entry(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    """Return a copy of nested dicts and lists with another entry at a path."""
    if not path:
        return entry
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = with_entry(changed[path[0]], path[1:], entry)
    return changed


@pytest.mark.parametrize("name", LOADERS)
def test_every_saved_field_is_known(name: str, tmp_path: Path) -> None:
    state, manifest = save(tmp_path, LOADERS[name]())
    unknown = []
    for schema, values in ((STATE, state), (MANIFEST, manifest)):
        schema(values, "")
        for path in places(values):
            if is_let_through(path):
                continue
            try:
                schema(with_entry(values, path, object()), "")
            except CheckpointError:
                continue
            unknown.append(".".join(map(str, path)))
    assert unknown == []
