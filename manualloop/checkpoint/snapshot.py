"""Take a training state apart into tensors and JSON, and write them as the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualloop.checkpoint.changes import changes_of
from manualloop.checkpoint.nested import take_apart
from manualloop.checkpoint.parts import (
    PREFIX,
    AdaptedModel,
    ShardedModel,
    ShardedOptimizer,
    saved_part,
    take_shards,
)
from manualloop.checkpoint.pretrained import save_pretrained
from manualloop.checkpoint.tensors import pack, require_places, save_tensors
from manualloop.errors import CheckpointError
from manualloop.models import is_sharded, tied_names, unwrap_model
from manualloop.optimizers.together import class_of, each
from manualloop.randomness import generator_states, get_random_state
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy

STATE = "state.json"
STEMS = ("model", "optimizer", "extras", "rng")
TRAINED = "trained"
"""Stem of the trained weights, where those of the model are the scored ones."""


class Snapshot(NamedTuple):
    """A state as it goes into files.

    Attributes:
        tensors: Tensors by name, for each file. No tensor is listed twice.
        num_bytes: Size of all of them on this rank.
        state: Everything else, as JSON.
        model: The model, whose config is saved beside its weights.
        is_whole: Whether the weights are all of the model: no frozen base is left out.
        shards: Tensors that are sharded over the ranks: see ``manualloop.checkpoint.parts``.
        unsaved: What changes in the run and cannot be saved.
        tokenizer: Tokenizer that is saved beside the weights; None for none.
        class_names: Names of the classes, which are saved beside the weights; None for none.
    """

    tensors: dict[str, dict[str, Tensor]]
    num_bytes: int
    state: dict[str, Any]
    model: nn.Module
    is_whole: bool
    shards: dict[str, Tensor]
    unsaved: list[str]
    tokenizer: Any
    class_names: tuple[str, ...] | None

    def write(self, folder: Path) -> Iterator[Path]:
        """Write the files and yield each one that is complete, including existing shards."""
        own, aliases = self.tensors["model"], self.state["aliases"]["model"]
        weights = own | {name: own[other] for name, other in aliases.items() if other in own}
        names, is_whole = self.class_names, self.is_whole
        return chain(
            sorted(folder.glob(f"{PREFIX}*")),
            *(save_tensors(tensors, folder, stem) for stem, tensors in self.tensors.items()),
            save_pretrained(self.model, weights, self.tokenizer, names, folder, is_whole=is_whole),
            self._write_state(folder / STATE),
        )

    def _write_state(self, path: Path) -> Iterator[Path]:
        path.write_text(json.dumps(self.state, allow_nan=False))
        yield path


def take_state_apart(
    state: TrainState,
    strategy: Strategy,
    run: Mapping[str, Any],
    scored: Callable[[], Mapping[str, Any]] | None = None,
) -> Snapshot:
    """Take a snapshot of a state, of each rank's random states and of ``run``.

    Call on every rank. The weights that ``scored`` returns are saved as the model's, and those of
    the state beside them where they differ.
    """
    model, holders = unwrap_model(state.model, adapters=False), state.all_holders()
    parts = parts_of(state, strategy)
    values = {name: _state_of(name, part) for name, part in parts.items()}
    weights = values.pop("model")
    tensors: dict[str, dict[str, Tensor]] = {stem: {} for stem in STEMS}
    tensors["model"] = {k: v.detach() for k, v in weights.items() if isinstance(v, Tensor)}
    if scored is not None:
        tensors["model"], tensors[TRAINED] = _beside(scored(), tensors["model"])
    more = {key: value for key, value in weights.items() if key not in tensors["model"]}
    changes, unsaved = changes_of(state, weights.keys())
    values |= {
        "model": more,
        "changes": changes,
        "optimizer_class": class_of(state.optimizer),
        "progress": asdict(state.progress),
        "run": dict(run),
    }
    of_main, *of_others = strategy.gather(_of_this_rank(state, holders))
    values |= of_main
    if of_others:
        values["ranks"] = of_others
    stem_of = {"optimizer": "optimizer", "rng": "rng", "generators": "rng", "ranks": "rng"}
    apart = {
        name: take_apart(value, name, tensors[stem_of.get(name, "extras")])
        for name, value in values.items()
    }
    shards = take_shards(tensors)
    packed = pack(tensors, tied_names(model), models=("model", TRAINED))
    apart |= {"shards": sorted(shards), "aliases": packed.aliases, "strides": packed.strides}
    return Snapshot(
        packed.groups,
        packed.num_bytes + sum(shard.nbytes for shard in shards.values()),
        apart,
        model,
        not isinstance(parts["model"], AdaptedModel) and not hasattr(model, "peft_config"),
        shards,
        unsaved,
        state.tokenizer,
        state.class_names,
    )


def _of_this_rank(state: TrainState, holders: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every rank has of its own: its place in the data, and its random states."""
    own: dict[str, Any] = {
        "position": state.place(),
        "max_batch_rows": state.max_batch_rows,
        "weighs_equally": state.weighs_equally,
    }
    waiting = {path: saved for path, saved in (state.generators or {}).items() if saved is not None}
    # Last: what was asked above may still have drawn, as a sampler does at the end of its pass.
    own["rng"] = get_random_state()
    own["generators"] = waiting | generator_states(**holders)
    return own


def rehearse(state: TrainState, strategy: Strategy, run: Mapping[str, Any]) -> None:
    """Refuse a state that cannot be saved. Call on every rank.

    Raises:
        CheckpointError: The message names the part.
    """
    for tensors in take_state_apart(state, strategy, run).tensors.values():
        require_places(tensors)


def _state_of(name: str, part: Any) -> Any:
    if not all(callable(getattr(part, m, None)) for m in ("state_dict", "load_state_dict")):
        raise CheckpointError(
            f"{name} is a {type(part).__name__}, which cannot be saved: it has no state_dict() and "
            "load_state_dict(). Leave it out, or pass an object that has them, or a random "
            "generator."
        )
    return part.state_dict()


def _beside(
    scored: Mapping[str, Any], trained: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scored weights by the names of the trained ones, and the trained that differ."""
    found = {name: value for name, value in scored.items() if isinstance(value, Tensor)}
    if found.keys() != trained.keys():
        return trained, {}
    model = {name: found[name].detach() for name in trained}
    return model, {
        name: weight for name, weight in trained.items() if not _is_same(model[name], weight)
    }


def _is_same(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    # Bits: -0.0 is not 0.0, and NaN is itself.
    return same_kind and torch.equal(_bits(one.to(other.device)), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def parts_of(state: TrainState, strategy: Strategy) -> dict[str, Any]:
    """Return what is saved by its own ``state_dict``."""
    parts = state.parts()
    if is_sharded(state.model):
        parts["model"] = ShardedModel(state.model)
        parts["optimizer"] = ShardedOptimizer(state.model, each(state.optimizer))
    else:
        parts["model"] = saved_part(state.model)
    return parts | {"strategy": strategy}
