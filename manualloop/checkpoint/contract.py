"""The contract of a run: all that its numbers depend on, compared when it is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from manualloop.checkpoint.facts import (
    Facts,
    described,
    held_models,
    model_facts,
    optimizer_facts,
    plain,
    schedule_class,
    schedule_facts,
)
from manualloop.data.kept import inner_collate
from manualloop.data.transform import transform_of
from manualloop.errors import CheckpointError
from manualloop.notices import say
from manualloop.optimizers.together import class_of
from manualloop.passing import steady
from manualloop.randomness import seed_of
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.types import LoaderFacts, Plan

Contract = dict[str, Any]
"""Facts about a run by their names, grouped by what a difference means; see ``describe_run``."""

LIBRARIES = ("torch", "numpy", "transformers", "datasets", "accelerate", "safetensors")

# The arguments of train_loop and train_steps that are described by the objects they make, or on
# which nothing depends. Every other one is described by its value, also one that is added later.
_DESCRIBED_BY_OBJECTS = {
    *("state", "model", "optimizer", "lr_scheduler", "extras", "train_dataloader", "strategy"),
    *("num_epochs", "max_steps", "patience", "num_warmup_steps"),
}
_WITHOUT_EFFECT = {
    *("checkpoint_dir", "checkpoint_every", "keep_checkpoints", "resume", "max_time"),
    *("log_every", "on_step", "trackers", "progress_bar", "preflight"),
}
_OVERRIDDEN = ("groups", "schedule", "seeds")  # of these groups the checkpoint's values count
_OF_LOSS = ("loss_fn", "terms")
_OBSERVING = {"evaluate", "evaluated rows", "evaluate_every", "best_metric"}


def _is_observing(name: str) -> bool:
    return name in _OBSERVING or name.endswith(" of evaluate")


def describe_state(state: TrainState) -> Contract:
    """Describe model, optimizer and schedule as the script has built them.

    That is done once, before a step or a checkpoint has changed them.
    """
    if state.built is None:
        kind, schedule = schedule_facts(state.lr_scheduler)
        state.built = {
            "same": {
                "optimizer": class_of(state.optimizer),
                "class of lr_scheduler": schedule_class(state.lr_scheduler),
            },
            "settings": {**model_facts(state.model), "lr_scheduler": kind},
            "groups": optimizer_facts(state.optimizer),
            "schedule": schedule,
        }
    return state.built


def describe_run(
    state: TrainState,
    loader: LoaderFacts,
    plan: Plan,
    strategy: Strategy,
    arguments: Mapping[str, Any],
) -> Contract:
    """Describe a run: what goes into the manifest of its checkpoints.

    Args:
        state: The state of the run.
        loader: Facts about the loader that gives its batches.
        plan: Length of the run.
        strategy: The strategy of the run.
        arguments: All arguments of the call, by name.

    Returns:
        Groups of facts. A difference in "same" is refused. One in "settings" is logged, and the new
        value counts; one in "observed" is, too, but the updates stay the same. One in "groups" and
        "schedule" is logged, and the value of the checkpoint counts, as do its random states
        instead of other "seeds". One in "exact" is logged: the
        surroundings are others, and so are the last bits. One in "ends" makes the run longer or
        shorter.
    """
    built = describe_state(state)
    others = arguments.keys() - _DESCRIBED_BY_OBJECTS - _WITHOUT_EFFECT
    train_dataloader = arguments["train_dataloader"]
    collate_fn = inner_collate(getattr(train_dataloader, "collate_fn", None))
    transform = transform_of(train_dataloader)
    given: dict[str, Any] = {}
    for name, value in sorted(
        {
            **{k: arguments[k] for k in others},
            "collate_fn": collate_fn,
            "transform": transform,
        }.items()
    ):
        given |= described(name, value)
    of_loss = {name: arguments[name] for name in _OF_LOSS if arguments.get(name) is not None}
    in_loader = dict(loader.exact)
    num_workers = in_loader.pop("num_workers", 0)
    seeds = {"torch": seed_of(torch.default_generator), **in_loader.pop("seeds", {})}
    contract = {
        "same": {**loader.same, **built["same"]},
        "settings": {
            **{name: value for name, value in given.items() if not _is_observing(name)},
            **held_models(of_loss, {"model": state.model, "extras": state.extras}),
            **in_loader,
            **built["settings"],
            "mixed_precision": strategy.precision,
        },
        "observed": {name: value for name, value in given.items() if _is_observing(name)},
        "ends": {
            "num_epochs": plan.num_epochs,
            "max_steps": plan.num_steps if plan.num_epochs is None else None,
            "num_steps": plan.num_steps,
            "patience": plain(arguments.get("patience")),
        },
        "groups": built["groups"],
        "schedule": built["schedule"],
        "seeds": {f"seed of {name}": seed for name, seed in seeds.items() if seed is not None},
        "exact": {
            "num_workers": num_workers,
            "world_size": strategy.world_size,
            "device": strategy.device.type,
            "compile": bool(strategy.compile),
            "num_threads": torch.get_num_threads() if strategy.device.type == "cpu" else None,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "python": platform.python_version(),
            **{name: version_of(name) for name in LIBRARIES},
        },
    }
    return _as_read(contract)


def _as_read(contract: Contract) -> Contract:
    """Return a contract as it will be read from a manifest."""
    read: Contract = json.loads(json.dumps(contract))
    return read


class Difference(NamedTuple):
    """A fact that is another one now.

    Attributes:
        group: Group of the fact in the contract.
        name: Name of the fact.
        old: Its value in the checkpoint.
        new: Its value now.
    """

    group: str
    name: str
    old: Any
    new: Any

    @property
    def is_passing(self) -> bool:
        """Whether two texts differ only by what is another in each run, such as a date."""
        both = isinstance(self.old, str) and isinstance(self.new, str)
        return both and steady(self.old) == steady(self.new)

    def __str__(self) -> str:
        line = f"{self.name}: {_shown(self.old)} -> {_shown(self.new)}"
        return f"{line} (only a time, or a temporary name)" if self.is_passing else line


def differences(saved: Contract, now: Contract) -> list[Difference]:
    """List what differs between two runs.

    What only one of them knows is left out, except of the data: the other was written by an older
    release, or with other versions of the libraries.
    """
    old, new = _flat(saved), _flat(now)
    versions = [[facts.get(name, ("", None))[1] for name in _VERSIONS] for facts in (old, new)]
    has_same_versions = versions[0] == versions[1]
    if "settings" not in saved:  # release 0.1.0 knew the class of a schedule, and not its kind
        old.pop("lr_scheduler", None)
    if not has_same_versions:
        new.pop("places of modules", None)
    _drop_names(old, new)
    found = []
    for name in dict.fromkeys((*old, *new)):
        is_nested = name.partition(".")[0] in _NESTED
        group = (new.get(name) or old[name])[0]
        must_be_known = group == "same" or (is_nested and has_same_versions)
        if (name in old and name in new) or (must_be_known and name not in _OPTIONAL):
            values = [facts.get(name, ("", None))[1] for facts in (old, new)]
            if not has_same_versions:  # code is compiled otherwise
                values = [_CODE.sub("", v) if isinstance(v, str) else v for v in values]
            if values[0] != values[1]:
                found.append(Difference(group, name, *values))
    return _without_repetition(found + _group_differences(saved, now))


_VERSIONS = ("python", *LIBRARIES)
_NESTED = ("config", "adapters", "modules", "schedule")
_OPTIONAL = ("all rows", "class of lr_scheduler")
_CODE = re.compile(r" \(code [0-9a-f]+\)|, code [0-9a-f]+(?=\))|(?<=\()code [0-9a-f]+(?=\))")


def _drop_names(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Drop the names of the classes where only one of two runs has some: they change no number."""
    start, num_named = "config.id2label.", 0
    for facts in (old, new):
        names = {n.removeprefix(start): v for n, (_, v) in facts.items() if n.startswith(start)}
        num_named += any(value not in (n, f"LABEL_{n}") for n, value in names.items())
    dropped = "config.label2id." if num_named == 2 else ("config.label2id.", start)
    for facts in (old, new):
        for name in [name for name in facts if name.startswith(dropped)]:
            del facts[name]


def _flat(contract: Contract) -> dict[str, tuple[str, Any]]:
    """Return group and value of each fact by its name, "config.dropout" for those in a dict."""
    found: dict[str, tuple[str, Any]] = {}
    for group, facts in contract.items():
        if group not in ("groups", "asked", "kept"):
            path = "schedule." if group == "schedule" else ""
            found |= {name: (group, value) for name, value in _flat_facts(facts, path)}
    return found


def _flat_facts(facts: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat_facts(value, f"{path}{name}.")
        else:
            yield path + name, value


def _group_differences(saved: Contract, now: Contract) -> list[Difference]:
    """Compare the groups of the optimizers: in one line, if a setting of all has changed alike."""
    new: list[Facts] = now["groups"]
    old: list[Facts] = saved.get("groups") or [
        # Release 0.1.0 knew the defaults alone.
        {name: v for name, v in saved.get("kept", {}).items() if len(_values(new, name)) == 1}
    ] * len(new)
    found: list[Difference] = []
    for name in dict.fromkeys(name for group in new for name in group):
        pairs = {
            number: (a[name], b[name])
            for number, (a, b) in enumerate(zip(old, new, strict=False))
            if name in a and name in b
        }
        changed = {number: pair for number, pair in pairs.items() if pair[0] != pair[1]}
        if changed and len(pairs) == len(new) and len(set(map(repr, pairs.values()))) == 1:
            found.append(Difference("groups", name, *pairs[0]))
        else:
            found += [
                Difference("groups", f"{name} of group {number}", *pair)
                for number, pair in changed.items()
            ]
    return found


def _values(groups: list[Facts], name: str) -> set[str]:
    return {repr(group.get(name)) for group in groups}


def _without_repetition(found: list[Difference]) -> list[Difference]:
    """Leave out what follows from another difference: modules from their config, digests."""
    names = {difference.name for difference in found}
    if any(name.startswith(("config.", "adapters.")) for name in names):
        found = [d for d in found if not d.name.startswith("modules.")]
    if any(name.startswith(("config.", "adapters.", "modules.")) for name in names):
        found = [d for d in found if d.name != "places of modules"]
    if "frozen parameters" in names:
        found = [d for d in found if d.name != "names of frozen parameters"]
    if "rows" in names:
        found = [d for d in found if d.name != "all rows"]
    if "lr_scheduler" in names:
        found = [d for d in found if d.group != "schedule"]
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def contract_differences(a: Contract, b: Contract) -> list[str]:
    """List the settings in which two runs differ: ``"seed: 1 -> 2"``."""
    return [str(difference) for difference in differences(a, b)] if a and b else []


def check_contract(saved: Contract, now: Contract) -> None:
    """Refuse to resume a run on other data, or with an optimizer or a schedule of another class.

    Args:
        saved: The contract of the checkpoint.
        now: The contract of the run that resumes.

    Raises:
        CheckpointError: They differ; the message lists how.
    """
    _refuse([d for d in differences(saved, now) if d.group == "same" and not _is_missing(d)])


def check_state(saved: Contract | None, state: TrainState) -> None:
    """Refuse to load the state of a schedule into one of another class.

    Raises:
        CheckpointError: As in ``check_contract``.
    """
    built = _as_read(describe_state(state))
    found = [] if saved is None else differences(saved, built)
    _refuse([d for d in found if d.name == _SCHEDULE_CLASS and not _is_missing(d)])


_SCHEDULE_CLASS = "class of lr_scheduler"


def _is_missing(difference: Difference) -> bool:
    # That a schedule is missing is told when the parts of the state are compared.
    return difference.name == _SCHEDULE_CLASS and None in (difference.old, difference.new)


def _refuse(found: list[Difference]) -> None:
    if found:
        raise CheckpointError(
            "The checkpoint is of another run, and nothing was trained:\n"
            + "\n".join(f"- {difference}" for difference in found)
            + "\nResume with what it was begun with, or begin anew in another checkpoint_dir, with "
            "the weights of the checkpoint if you like: see docs/resume.md."
        )


def check_finished(
    saved: Contract, now: Contract, folder: object, *, was_finished: bool, is_extended: bool
) -> None:
    """Refuse another run in the folder of one that is over: its result is not this one's.

    Args:
        saved: The contract of the checkpoint.
        now: The contract of the run at hand.
        folder: The folder, for the message.
        was_finished: Whether it was over for the run that wrote it, too.
        is_extended: Whether there is something left to do, since the run at hand is longer.

    Raises:
        CheckpointError: It is another run.
    """
    asked = saved | {k: v for k, v in saved.get("asked", {}).items() if k in _OVERRIDDEN}
    groups = {"same", "settings", "groups", "seeds"}
    groups |= set() if is_extended else {"observed", "ends", "schedule"}
    # Of epochs the number of steps follows from what is compared, and from the number of ranks.
    found = [d for d in differences(asked, now) if d.group in groups and d.name != "num_steps"]
    # What the run was made with, although another value was asked for at last, is no difference.
    made_with = {d.name for d in differences(saved, now)}
    found = [d for d in found if d.name in made_with or d.group not in _OVERRIDDEN]
    if is_extended:  # a schedule of the user's own is a function of the length
        found = [d for d in found if d.name != "lr_scheduler" or _has_other_name(d)]
    found = _without_sizes(found, saved, now)
    for difference in found:
        if difference.is_passing:
            say(f"{difference}: it is taken for the same run.")
    found = [d for d in found if not d.is_passing]
    if found:
        state = "is finished" if was_finished else "was trained for longer than this one asks for"
        raise CheckpointError(
            f"{folder} holds a run that {state}, and this is another run. Nothing was loaded or "
            "trained. Run in the folder -> this run:\n"
            + "\n".join(f"- {difference}" for difference in found)
            + "\nGive this run another checkpoint_dir, or repeat the command of the run in the "
            "folder. To train on from its weights, see docs/resume.md."
        )


def _without_sizes(found: list[Difference], saved: Contract, now: Contract) -> list[Difference]:
    """Leave out accumulation that other ranks make up for: the updates are the same."""
    sizes = [
        (c["exact"].get("world_size") or 1) * (c["settings"]["gradient_accumulation_steps"] or 1)
        for c in (saved, now)
        if "gradient_accumulation_steps" in c.get("settings", {}) and "exact" in c
    ]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        return [d for d in found if d.name != "gradient_accumulation_steps"]
    return found


def _has_other_name(difference: Difference) -> bool:
    return _CODE.sub("", str(difference.old)) != _CODE.sub("", str(difference.new))


def log_differences(saved: Contract, now: Contract, *, workers_matter: bool) -> None:
    """Log what differs from the run that is resumed, and counts from now on: a line each.

    Args:
        saved: The contract of the checkpoint.
        now: The contract of the run that resumes.
        workers_matter: Whether batches depend on the number of processes that read them: they
            draw random numbers there, or read a stream.
    """
    follows_plan = _follows_plan(now["settings"]["lr_scheduler"])
    for difference in _without_sizes(differences(saved, now), saved, now):
        group, name, _, _ = difference
        if group == "exact" and (name != "num_workers" or workers_matter):
            say(f"not bit-exact, because {difference}.")
        elif difference.is_passing:
            say(f"{difference}; the new value counts from now on.")
        elif group == "settings" or (name == "num_steps" and follows_plan):
            say(f"not bit-exact, because {difference}; the new value counts from now on.")
        elif group == "seeds":
            say(f"{difference}; the random states of the checkpoint count.")
        elif group == "observed" or (group == "ends" and name != "num_steps"):
            say(f"{difference}; the new value counts from now on.")


def _follows_plan(schedule: str | None) -> bool:
    """Tell whether rates depend on the number of updates of the run, by the names of schedules."""
    names = set(re.findall(r"(?:^|, )([a-z_]+)(?=\(|,|$)", schedule or ""))
    return bool(names - _OF_ANY_LENGTH)


_OF_ANY_LENGTH = {"constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant"}


def log_kept(saved: Contract | None, state: TrainState) -> None:
    """Log the settings of optimizer and schedule that a checkpoint just loaded has overridden.

    Args:
        saved: The contract of the checkpoint.
        state: The state, which was described before it was loaded.
    """
    now = _as_read(describe_state(state))
    found = [] if saved is None else differences(saved, now)
    found = [difference for difference in found if difference.group in ("groups", "schedule")]
    if saved is None or not found:
        return
    _, schedule = schedule_facts(state.lr_scheduler)
    loaded: Contract = _as_read({"schedule": schedule, "groups": optimizer_facts(state.optimizer)})
    counts = {d.name: d for d in differences({**saved, **loaded}, now)}
    for difference in found:
        if difference.name in counts:
            say(
                f"{difference}; the checkpoint's {counts[difference.name].old} counts. "
                "docs/resume.md shows how to change it."
            )


def carried_on(saved: Contract | None, now: Contract) -> Contract:
    """Return the contract of a run that resumes: what the checkpoint has overridden stays."""
    kept: Contract = {
        name: saved[name]
        for name in _OVERRIDDEN
        if saved and name in saved and saved[name] != now[name]
    }
    return {**now, **kept, "asked": {name: now[name] for name in kept}} if kept else now


@cache  # each is read from a file
def version_of(library: str) -> str | None:
    """Return the installed version of a library; None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
