"""Read the files of a checkpoint, check all of it, and load it into a state that is built alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from manualloop.checkpoint.changes import count_as_changed, restore_changes
from manualloop.checkpoint.files import read_json
from manualloop.checkpoint.manifest import metric_name
from manualloop.checkpoint.nested import UNREADABLE, put_together, take_apart
from manualloop.checkpoint.parts import BASE, is_shard, read_shards, saved_part, take_shards
from manualloop.checkpoint.pretrained import saved_names
from manualloop.checkpoint.schema import (
    anything,
    by_name,
    check_like,
    check_state,
    fields,
    items,
    maybe,
    text,
    whole,
)
from manualloop.checkpoint.snapshot import STATE, STEMS, TRAINED, parts_of
from manualloop.checkpoint.tensors import (
    Aliases,
    describe,
    find_aliases,
    load_tensors,
    with_stride,
)
from manualloop.errors import CheckpointError
from manualloop.models import is_sharded, tied_names
from manualloop.notices import say
from manualloop.optimizers.loading import load_together
from manualloop.optimizers.schedules import follow_functions
from manualloop.optimizers.states import OptimizerStates
from manualloop.optimizers.together import Schedules, class_of
from manualloop.randomness import (
    find_generators,
    restore_generators,
    search,
    set_random_state,
)
from manualloop.state import Progress, TrainState, differences
from manualloop.strategy.base import Strategy
from manualloop.tasks.names import load_names

_ALIASES = fields(dict.fromkeys(STEMS, by_name(text)), {TRAINED: by_name(text)})
_CONTAINER = fields(
    {"aliases": _ALIASES, "model": by_name(anything)},
    {"shards": items(text), "strides": by_name(by_name(items(whole())))},
)
_NUM_NAMED = 5


class Saved(NamedTuple):
    """What a folder holds, read and put together.

    Attributes:
        values: State of each part, by name.
        run: What was saved beside the state.
        aliases: Aliases among the model's tensors.
    """

    values: dict[str, Any]
    run: dict[str, Any]
    aliases: Aliases


def read_snapshot(
    folder: Path, manifest: Mapping[str, Any], state: TrainState, strategy: Strategy
) -> Saved:
    """Read the files of a snapshot, and check everything in them that the library reads.

    Args:
        folder: Folder that holds the files.
        manifest: Content of its manifest, which names the files that may be read.
        state: The state, whose weights tell how tensors are sharded.
        strategy: The strategy of the run.

    Raises:
        CheckpointError: A file is missing, or was not written by a checkpoint.
    """
    files = manifest["files"]
    if STATE not in files:
        raise CheckpointError(f"{folder.name} has no {STATE}.")
    stems = [*STEMS, TRAINED] if any(name.startswith(TRAINED) for name in files) else STEMS
    tensors = {stem: load_tensors(folder, stem, files) for stem in stems}
    try:
        saved = read_json(folder / STATE)
        _CONTAINER(saved, f"{STATE}:")
        aliases, strides = saved.pop("aliases"), saved.pop("strides", {})
        if (names := saved.pop("shards", ())) or is_sharded(state.model):
            for name, tensor in _read_shards(folder, files, names, state, strategy).items():
                stem, _, own = name.partition("/")
                tensors[stem][own] = tensor
        for stem, group in tensors.items():
            for name, stride in strides.get(stem, {}).items():
                group[name] = with_stride(group[name], stride)
            group |= {name: group[own] for name, own in aliases[stem].items()}
        nested = tensors["optimizer"] | tensors["extras"] | tensors["rng"]
        values = {name: put_together(value, nested) for name, value in saved.items()}
        values["model"] |= tensors["model"] | tensors.get(TRAINED, {})
        values.setdefault("strategy", values.pop("scaler", {}))  # the name in older checkpoints
        check_state(values, manifest["step"], f"{STATE}:")
        _check_notes(values["run"], manifest["contract"])
        return Saved(values, values.pop("run"), aliases["model"])
    except CheckpointError:
        raise
    except (*UNREADABLE, OSError, MemoryError) as error:
        raise CheckpointError(f"{STATE} cannot be read: {error!r:.200}.") from error


def _check_notes(notes: Mapping[str, Any], contract: Mapping[str, Any] | None) -> None:
    """Refuse notes of ``train_loop`` with numbers by which it could not have continued itself.

    Raises:
        CheckpointError: The best score is no number, or a sum of losses is not finite although the
            run would have ended.
    """
    evaluations = notes.get("evaluations")
    if isinstance(evaluations, Mapping) and evaluations["best_metric"] and evaluations["best"]:
        name = metric_name(evaluations["best_metric"])
        if not isinstance(value := evaluations["best"].get(name), Real):
            raise CheckpointError(
                f"{STATE}: run.evaluations.best.{name} is {value!r:.40}, not a number"
            )
    settings = {} if contract is None else contract.get("settings", {})
    if settings.get("on_nonfinite") in ("raise", "skip"):
        for name in ("interval", "since"):
            total = notes.get("report", {}).get(name, {}).get("total", 0.0)
            if not math.isfinite(total):
                raise CheckpointError(
                    f"{STATE}: run.report.{name}.total is {total}, not a finite number"
                )


def _read_shards(
    folder: Path,
    files: Mapping[str, Any],
    names: Sequence[str],
    state: TrainState,
    strategy: Strategy,
) -> dict[str, Tensor]:
    here: dict[str, Tensor] = {}
    if is_sharded(state.model):
        parts = parts_of(state, strategy)
        nested: dict[str, Tensor] = {}
        take_apart(parts["optimizer"].state_dict(), "optimizer", nested)
        here = take_shards({"model": parts["model"].state_dict(), "optimizer": nested})
    if sorted(here) != list(names):
        raise CheckpointError(
            f"{len(names)} of its tensors were spread over ranks (FSDP), and {len(here)} of this "
            "run's are, or others: resume with the model sharded as it was when it was saved"
        )
    unlisted = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    if unlisted:  # all of them would be read
        raise CheckpointError(f"the manifest does not list {min(unlisted)}")
    return read_shards(folder, here)


def put_state_back(saved: Saved, state: TrainState, strategy: Strategy) -> None:
    """Load a snapshot into a state, and into this process's random generators.

    Raises:
        CheckpointError: It does not fit. Nothing was loaded.
    """
    parts = parts_of(state, strategy)
    if differences := _differences(saved, state, parts):
        more = len(differences) - _NUM_NAMED
        raise CheckpointError(
            "The checkpoint does not fit this run, and nothing was loaded:\n"
            + "\n".join(f"- {difference}" for difference in differences[:_NUM_NAMED])
            + (f"\n- and {more} more" if more > 0 else "")
            + "\nBuild model, optimizer, lr_scheduler, extras and strategy as for the saved run."
        )
    _check_parts(saved, parts)
    # Optimizers keep what was read for them.
    load_together(parts, saved.values, CheckpointError, copies=False)
    follow_functions(state.lr_scheduler)
    changes = saved.values.get("changes", {})
    restore_changes(state.model, changes)
    count_as_changed(state, changes)
    state.progress = Progress(**saved.values["progress"])
    of_ranks = [saved.values, *saved.values.get("ranks", ())]
    is_known = strategy.rank < len(of_ranks)  # else there were fewer, and this one has no state
    own = of_ranks[strategy.rank if is_known else 0]
    state.position, state.reader = own["position"], None
    state.max_batch_rows, state.has_failed = own["max_batch_rows"], None
    state.weighs_equally = own.get("weighs_equally")  # 0.1.0 has none
    saved_generators = own.get("generators", {}) if is_known else {}
    state.holders = {}  # those of the run before: the next one may have others by these names
    problems = restore_generators(saved_generators, **state.all_holders())
    state.generators = {
        path: value if path in problems else None for path, value in saved_generators.items()
    }
    if is_known:
        set_random_state(own["rng"])


def take_generators(state: TrainState, loader: Iterable[Any], **holders: Any) -> None:
    """Note what may hold random generators, and restore those that were loaded before it was known.

    What cannot be saved or restored is printed.

    Args:
        state: The state of the run.
        loader: The loader that is trained on.
        holders: Functions of the run by name; None where there is none.
    """
    state.holders |= {name: holder for name, holder in holders.items() if holder is not None}
    found, unsaved = search(state.all_holders())
    for path, reason in (unsaved | search({"train_dataloader": loader}).unsaved).items():
        say(f"a resumed run will draw other random numbers at {path}: {reason}.")
    if getattr(loader, "num_workers", 0):
        own = {id(generator) for generator in find_generators(loader=loader).values()}
        for path in [path for path, part in found.items() if id(part.value) in own]:
            if not path.startswith(("evaluate", "on_step")):
                say(
                    f"a resumed run may draw other random numbers at {path}: the loader, which "
                    "reads ahead, draws from it too. Give each a generator of its own."
                )
    if state.generators is None:
        return
    waiting = {path: saved for path, saved in state.generators.items() if saved is not None}
    for path, reason in restore_generators(waiting, **state.all_holders()).items():
        say(f"not bit-exact, because the random generator {path} was not restored: {reason}.")
    for path in sorted(found.keys() - state.generators.keys()):
        if not path.startswith(("evaluate", "on_step")):  # no update draws from those
            say(f"not bit-exact, because the checkpoint has no state of the generator {path}.")
    state.generators = None


def _check_parts(saved: Saved, parts: Mapping[str, Any]) -> None:
    """Refuse states whose values are not of the kinds that the parts have now."""
    for name, part in parts.items():
        state = saved.values[name]
        if isinstance(part, OptimizerStates):
            continue  # their differences were found above
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{name} is {state!r:.60} in the checkpoint, not a state")
        if isinstance(part, LRScheduler):
            _check_schedule(name, part, state)
        elif isinstance(part, Schedules):
            fields({"schedules": items(maybe(by_name(anything)))})(state, name)
            if [own is None for own in part] != [one is None for one in state["schedules"]]:
                raise CheckpointError(f"{name} is of other optimizers in the checkpoint")
            for number, (own, one) in enumerate(zip(part, state["schedules"], strict=True)):
                if own is not None:
                    _check_schedule(f"{name}[{number}]", own, one)
        elif name == "strategy":
            check_like(state, part.state_dict(), name, strict=True, counts=_COUNTS_OF_SCALERS)
        elif isinstance(part, nn.Module) and name != "model":
            _check_module(name, part.state_dict(), state)
        if name == "model" or name.startswith("extras."):
            check_like(state, part.state_dict(), name)


def _check_module(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    ours, theirs = describe(own), describe(saved)
    for key in dict.fromkeys((*own, *saved)):
        if ours.get(key) != theirs.get(key) or (key in own) != (key in saved):
            raise CheckpointError(
                f"{name}.{key} is {theirs.get(key, 'missing or no tensor')} in the checkpoint, "
                f"{ours.get(key, 'missing or no tensor')} here"
            )


def _check_schedule(name: str, part: LRScheduler, saved: Mapping[str, Any]) -> None:
    own = part.state_dict()
    for key in own.keys() - saved.keys():
        # These come and go with the versions of torch.
        if not key.startswith("_") and key != "verbose":
            raise CheckpointError(f"{name}.{key} is missing in the checkpoint")
    for key in saved.keys() - own.keys():
        if hasattr(part, key):  # it would take the place of a method
            raise CheckpointError(f"{name}.{key} is no state of a {type(part).__name__}")
    inner = list(vars(part).get("_schedulers", ()))
    for key in own.keys() & saved.keys():
        path = f"{name}.{key}"
        # Those of torch have lists of settings; one of the user's may keep a list that grows.
        is_ours = type(part).__module__.startswith(("torch.", "manualloop."))
        is_fixed = type(part).__module__.startswith("torch.") or key in _PER_GROUP
        if key == "_schedulers" and len(inner) == len(own[key]):
            items(by_name(anything))(saved[key], path)
            if (number := len(saved[key])) != len(inner):
                raise CheckpointError(f"{path} are {number} in the checkpoint, {len(inner)} here")
            for number, one in enumerate(inner):
                _check_schedule(f"{path}.{number}", one, saved[key][number])
        else:
            check_like(
                saved[key],
                own[key],
                path,
                strict=True,
                has_fixed_lists=is_fixed,
                takes_tensors=not is_ours or key == "_last_lr",
                counts=_COUNTS if is_ours else _COUNTS[:2],
            )


_COUNTS = ("last_epoch", "_step_count", "T_cur", "T_i", "total_steps")
_COUNTS_OF_SCALERS = ("scale", "growth_interval")
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "base_momentums", "max_momentums")


_NO_PARTS = {
    *("optimizer_class", "progress", "position", "max_batch_rows", "ranks", "rng", "generators"),
    *("weighs_equally", "run", "changes"),
}


def load_weights(folder: Path, files: Mapping[str, Any], model: nn.Module) -> None:
    """Load the weights of a snapshot into a model, and nothing else.

    Raises:
        CheckpointError: They do not fit. Nothing was loaded.
        DataError: They were trained on the model's classes in another order.
    """
    part = saved_part(model)
    try:
        saved = read_json(folder / STATE)
        _CONTAINER(saved, f"{STATE}:")
        tensors, aliases = load_tensors(folder, "model", files), saved["aliases"]["model"]
        values = put_together(saved["model"], {}) | tensors
        values |= {name: tensors[own] for name, own in aliases.items()}
        num_shards = len(saved.get("shards", ()))
    except CheckpointError:
        raise
    except (*UNREADABLE, OSError, MemoryError) as error:
        raise CheckpointError(f"{STATE} cannot be read: {error!r:.200}.") from error
    if num_shards or is_sharded(model):
        raise CheckpointError(
            f"{num_shards} of its tensors are spread over ranks (FSDP): load it into a TrainState "
            "with the model sharded as it was when it was saved"
        )
    if differences := _weight_differences(values, aliases, part, model):
        raise CheckpointError(
            "its weights do not fit this model, and nothing was loaded:\n- "
            + "\n- ".join(differences[:_NUM_NAMED])
        )
    if (names := saved_names(model, folder, files)) is not None:
        load_names(model, names, str(folder))
    load_together({"model": part}, {"model": values}, CheckpointError)


def _weight_differences(
    values: Mapping[str, Any], aliases: Aliases, part: Any, model: nn.Module
) -> list[str]:
    found = []
    own_state = part.state_dict()
    if own_state.get(BASE) != values.get(BASE):
        found.append("model: its frozen weights are not those that it was trained with")
    ours, theirs = describe(own_state), describe(values)
    found += [
        f"model: {key} is {theirs.get(key, 'missing')} in the checkpoint, "
        f"{ours.get(key, 'missing')} here"
        for key in dict.fromkeys((*theirs, *ours))
        if ours.get(key) != theirs.get(key)
    ]
    whole = {key: own_state[key] for key in ours if not is_shard(own_state[key])}
    own_aliases = find_aliases(whole, tied_names(model))
    found += [
        f"model: {key} is {'tied' if key in aliases else 'not tied'} to another weight in "
        "the checkpoint, and here it is otherwise"
        for key in sorted(set(own_aliases) ^ set(aliases))
        if key in ours and key in theirs
    ]
    return found


def _differences(saved: Saved, state: TrainState, parts: Mapping[str, Any]) -> list[str]:
    values = saved.values
    found = [
        f"{name} is in the {'run' if name in parts else 'checkpoint'} only"
        for name in sorted(set(parts) ^ (set(values) - _NO_PARTS))
    ]
    if bool(values["strategy"]) != (has_state := bool(parts["strategy"].state_dict())):
        found.append(
            f"strategy: the {type(parts['strategy']).__name__} of this run has "
            f"{'a state, such as a loss scale,' if has_state else 'no state'} and the one of the "
            f"checkpoint has {'none' if has_state else 'one, such as the loss scale of fp16'}"
        )
    found += _weight_differences(values["model"], saved.aliases, parts["model"], state.model)
    own_class = class_of(state.optimizer)
    if (saved_class := values["optimizer_class"]) != own_class:
        found.append(f"optimizer: {saved_class} in the checkpoint, {own_class} here")
    # Their names are those of the weights, which come first.
    return found or differences(dict(parts), values)
