"""What a checkpoint may hold: types, ranges and shapes, checked before anything of it is used.

A checkpoint may come from somebody else, and its checksums with it. So nothing in it is believed:
``MANIFEST`` and ``STATE`` describe every field that the library itself reads, and a field that is
missing or not as described is named by its path. What only the user's objects read, such as the
state of a dataset, is theirs to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch

from manualloop.errors import CheckpointError
from manualloop.randomness import check_generator_state, check_random_state

Check: TypeAlias = Callable[[Any, str], None]
"""``check(value, path)`` raises a ``CheckpointError`` that names a wrong value by its path."""

_MOST = 2**62


def _at(path: str, key: object) -> str:
    return f"{path} {key}" if path.endswith(":") else f"{path}.{key}" if path else str(key)


def _refuse(value: Any, path: str, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path or 'it'} is {value!r:.60}, not {wanted}")


def whole(least: int = 0, most: int = _MOST) -> Check:
    """Return a check for a whole number from ``least`` to ``most``.

    >>> whole(1)(3, "batch_size")
    >>> whole(1)(True, "batch_size")
    Traceback (most recent call last):
    manualloop.errors.CheckpointError: batch_size is True, not a whole number of at least 1
    """

    def check(value: Any, path: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _refuse(value, path, f"a whole number of at least {least}")

    return check


def number(value: Any, path: str) -> None:
    """Refuse what is not a number; NaN and the infinities are numbers."""
    if type(value) not in (int, float):
        raise _refuse(value, path, "a number")


def finite(value: Any, path: str) -> None:
    """Refuse what is not a finite number of at least 0."""
    number(value, path)
    if not 0 <= value < _MOST:
        raise _refuse(value, path, "a finite number of at least 0")


def flag(value: Any, path: str) -> None:
    """Refuse what is neither True nor False."""
    if type(value) is not bool:
        raise _refuse(value, path, "true or false")


def text(value: Any, path: str) -> None:
    """Refuse what is not a text."""
    if type(value) is not str:
        raise _refuse(value, path, "a text")


def anything(value: Any, path: str) -> None:
    """Refuse nothing: only the user's objects read it."""


def one_of(*values: str) -> Check:
    """Return a check for one of some texts."""

    def check(value: Any, path: str) -> None:
        if type(value) is not str or value not in values:
            raise _refuse(value, path, f"one of {', '.join(values)}")

    return check


def maybe(check: Check) -> Check:
    """Return a check that also takes None."""
    return lambda value, path: None if value is None else check(value, path)


def items(check: Check) -> Check:
    """Return a check for a list whose items pass another one."""

    def check_items(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple):
            raise _refuse(value, path, "a list")
        for place, item in enumerate(value):
            check(item, _at(path, place))

    return check_items


def by_name(check: Check) -> Check:
    """Return a check for a dict whose keys are texts and whose values pass another check."""

    def check_values(value: Any, path: str) -> None:
        if not isinstance(value, dict) or not all(type(key) is str for key in value):
            raise _refuse(value, path, "a dict")
        for key, item in value.items():
            check(item, _at(path, key))

    return check_values


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Return a check for a dict with certain keys. Others, of a later version, are let through.

    >>> point = fields({"x": number}, {"name": text})
    >>> point({"x": 0.5}, "point")
    >>> point({"name": "A"}, "point")
    Traceback (most recent call last):
    manualloop.errors.CheckpointError: point.x is missing
    """

    def check(value: Any, path: str) -> None:
        by_name(anything)(value, path)
        for key, check_value in required.items():
            if key not in value:
                raise CheckpointError(f"{_at(path, key)} is missing")
            check_value(value[key], _at(path, key))
        for key, check_value in (optional or {}).items():
            if key in value:
                check_value(value[key], _at(path, key))

    return check


def _tried(function: Callable[[Any], None]) -> Check:
    """Return a check from a function that raises a ``ValueError`` with the reason."""

    def check(value: Any, path: str) -> None:
        try:
            function(value)
        except ValueError as error:
            raise CheckpointError(f"{path} is not a random state: {error}") from error

    return check


def _metric(value: Any, path: str) -> None:
    if type(value) is int and abs(value) > 2**1000:  # beyond any float, and compared with some
        raise _refuse(value, path, "a number")


_MAX_DEPTH = 30


def _facts(value: Any, path: str, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path} is nested too deeply")
    by_name(anything)(value, path)
    for key, part in value.items():
        if isinstance(part, dict):
            _facts(part, _at(path, key), depth + 1)


_GROUPS = {"groups": items(_facts), "schedule": _facts}
_ENDS = fields(
    {},
    dict.fromkeys(("num_epochs", "max_steps", "num_steps", "patience"), maybe(whole())),
)
_CONTRACT = fields(
    {"same": _facts, "exact": _facts},
    {
        "settings": _facts,
        "ends": _ENDS,
        "seeds": _facts,
        "asked": fields({}, {**_GROUPS, "seeds": _facts}),
        **_GROUPS,
    },
)


def _contract(value: Any, path: str) -> None:
    _CONTRACT(value, path)
    for key in value.keys() - _GROUPS:
        _facts(value[key], _at(path, key))
    for group, key in (("exact", "world_size"), ("settings", "gradient_accumulation_steps")):
        if key in value.get(group, {}):
            whole(1)(value[group][key], _at(_at(path, group), key))


MANIFEST = fields(
    {
        "format": whole(1, 1),
        "step": whole(),
        "metrics": by_name(_metric),
        "best_metric": maybe(text),
        "contract": maybe(_contract),
        "files": by_name(fields({"size": whole(), "sha256": text})),
    },
    {"release": text},
)
"""``manifest.json``, once its numbers are read."""

_RANDOM = _tried(check_random_state)
_GENERATORS = by_name(_tried(check_generator_state))

_WORKER = fields(
    {},
    {
        "base_seed": whole(-(2**63), 2**64),
        "random": _RANDOM,
        "generators": _GENERATORS,
        "dataset": anything,
        "is_at_end": flag,
    },
)


def _workers(value: Any, path: str) -> None:
    by_name(_WORKER)(value, path)
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 9):
            raise _refuse(key, path, "the number of a worker")


_KNOWN_BATCHES = {"num_batches": whole(), "batch_size": maybe(whole(1))}
_POSITION = fields(
    {},
    {
        "kind": one_of("prepared", "dataloader", "stream", "stateful", "iterable"),
        "data": text,
        "num_samples": whole(),
        "num_workers": whole(0, 10**6),
        "seed": whole(-(2**63), 2**64),
        "max_tokens": maybe(whole(1)),
        "num_ranks": whole(1),
        "num_parts": whole(1),
        "random": _RANDOM,
        "generators": _GENERATORS,
        "reuses_workers": flag,
        "row_generators": _GENERATORS,
        "dataset": anything,
        "workers": _workers,
        "last_worker": maybe(whole(0, 10**6)),
        "loader": anything,
        "pending": items(anything),
        "is_at_end": flag,
        **_KNOWN_BATCHES,
    },
)


def _position(value: Any, path: str) -> None:
    _POSITION(value, path)
    if "kind" in value:
        fields(_KNOWN_BATCHES)(value, path)
    if value.get("is_at_end") and "pending" not in value:
        raise CheckpointError(f"{path}.pending is missing")
    if value.get("last_worker") is not None:
        whole(0, value.get("num_workers", 0) - 1)(value["last_worker"], f"{path}.last_worker")


_OF_A_RANK = {
    "position": maybe(_position),
    "max_batch_rows": maybe(whole(1)),
    "rng": _RANDOM,
}
_LATER_OF_A_RANK = {"generators": _GENERATORS, "weighs_equally": maybe(flag)}

PROGRESS = fields(
    dict.fromkeys(("num_steps", "num_skipped", "epoch", "num_samples"), whole()),
)

_EVALUATIONS = fields(
    {
        "best_metric": maybe(text),
        "number": whole(),
        "num_since_best": whole(),
        "last": by_name(_metric),
        "best": by_name(_metric),
    },
    {"best_step": maybe(whole()), "is_lower_better": flag},
)
_INTERVAL = fields({"num_steps": whole(), "num_items": finite, "total": number})
_LOSSES = fields({"losses": items(number), "num_items": items(finite)})


def _either(if_key: str, then: Check, otherwise: Check) -> Check:
    def check(value: Any, path: str) -> None:
        (then if isinstance(value, dict) and if_key in value else otherwise)(value, path)

    return check


def _evaluations(value: Any, path: str) -> None:
    # Release 0.1.0 kept all of them.
    (items(by_name(_metric)) if isinstance(value, list) else _EVALUATIONS)(value, path)


def _row(value: Any, path: str) -> None:
    """Check an evaluation in the table: step, loss of the training, learning rate."""
    items(maybe(number))(value, path)
    if len(value) != 3 or type(value[0]) is not int:
        raise _refuse(value, path, "a step, a loss and a learning rate")


_NOTES = fields(
    {
        "evaluations": _evaluations,
        "evaluated_step": whole(),
        "is_pending": flag,
        "report": fields(
            {"interval": _either("losses", _LOSSES, _INTERVAL), "epoch": finite},
            {"since": _INTERVAL, "rows": items(_row), "lr": maybe(number)},
        ),
        "num_records": whole(),
    }
)


def _run(value: Any, path: str) -> None:
    """Check the notes of ``train_loop``; ``save_checkpoint`` leaves none."""
    (_NOTES if value != {} else by_name(anything))(value, path)


def _optimizers(value: Any, path: str) -> None:
    # Release 0.1.0 had one, and shards are kept together: their names differ.
    (items(by_name(anything)) if isinstance(value, list) else by_name(anything))(value, path)


_CHANGES = fields(
    {},
    {
        "requires_grad": by_name(flag),
        "training": by_name(flag),
        "buffers": by_name(anything),
        "attributes": by_name(anything),
        "on device": by_name(anything),
    },
)

STATE = fields(
    {
        **_OF_A_RANK,
        "progress": PROGRESS,
        "optimizer_class": text,
        "model": by_name(anything),
        "optimizer": _optimizers,
        "strategy": by_name(anything),
        "run": _run,
    },
    {
        **_LATER_OF_A_RANK,
        "changes": _CHANGES,
        "ranks": items(fields(_OF_A_RANK, _LATER_OF_A_RANK)),
    },
)
"""``state.json`` and its tensors, put together."""


def check_state(values: Mapping[str, Any], step: int, path: str) -> None:
    """Refuse a state that is not as described, or that contradicts itself or its manifest.

    Args:
        values: What ``state.json`` and its tensors were put together to.
        step: Number of updates, as the manifest has it.
        path: Name of the file, with a colon.

    Raises:
        CheckpointError: The message names the field.
    """
    STATE(values, path)
    progress = values["progress"]
    if progress["num_steps"] != step:
        raise CheckpointError(
            f"{path} progress.num_steps is {progress['num_steps']}, and the manifest says {step}"
        )
    for own in (values, *values.get("ranks", ())):
        position = own["position"] or {}
        num_samples = position.get("num_samples", progress["num_samples"])
        if num_samples != progress["num_samples"]:
            raise CheckpointError(
                f"{path} position.num_samples is {num_samples}, and progress.num_samples "
                f"{progress['num_samples']}"
            )
    if (notes := values["run"]) and notes["evaluated_step"] > step:
        raise CheckpointError(
            f"{path} run.evaluated_step is {notes['evaluated_step']}, and the step is {step}"
        )


def check_like(
    saved: Any,
    own: Any,
    path: str,
    *,
    strict: bool = False,
    has_fixed_lists: bool = False,
    takes_tensors: bool = False,
    counts: Collection[str] = (),
) -> None:
    """Refuse a part's state whose values are of other kinds than those the part has now.

    Only what both have is compared. Numbers, tensors and arrays are of one kind, and None of any.

    Args:
        saved: The state that was saved.
        own: What the part's ``state_dict`` returns now.
        path: Name of the part.
        strict: Whether finite numbers must stay finite, and no number may turn into None or a
            tensor.
        has_fixed_lists: Whether lists keep their lengths.
        takes_tensors: Whether a number may turn into a tensor all the same.
        counts: Names of numbers that are never negative.

    Raises:
        CheckpointError: The message names the value.
    """
    kind, own_kind = (_kind(value, strict and not takes_tensors) for value in (saved, own))
    if own_kind == "none" or (kind == "none" and not strict):
        return
    if kind != own_kind:
        raise _refuse(saved, path, f"a {own_kind}")
    if strict and isinstance(saved, int | float) and isinstance(own, int | float):
        if math.isfinite(own) and not (abs(saved) < _MOST and math.isfinite(saved)):
            raise _refuse(saved, path, "a finite number")
        name = path.rpartition(".")[2]
        # A part of a SequentialLR that has not begun counts from -1.
        least = -1 if name == "last_epoch" and "._schedulers." in path else 0
        if name in counts and saved < least:
            raise _refuse(saved, path, f"a number of at least {least}")
    check = partial(
        check_like,
        strict=strict,
        has_fixed_lists=has_fixed_lists,
        takes_tensors=takes_tensors,
        counts=counts,
    )
    if isinstance(saved, Mapping):
        for key in saved.keys() & own.keys():
            check(saved[key], own[key], _at(path, key))
    elif isinstance(saved, list | tuple):
        if has_fixed_lists and len(saved) != len(own):
            raise _refuse(saved, path, f"a list of {len(own)}")
        for place, (item, own_item) in enumerate(zip(saved, own, strict=False)):
            check(item, own_item, _at(path, place))


def _kind(value: Any, strict: bool) -> str:
    if value is None:
        return "none"
    for kind, types in _KINDS.items():
        if isinstance(value, types):
            return kind
    return "number" if isinstance(value, int | float) or not strict else "tensor"


_KINDS: dict[str, Any] = {
    "text": str,
    "dict": Mapping,
    "list": list | tuple,
    "set": set,
    "string of bytes": bytes,
    "dtype": torch.dtype,
    "device": torch.device,
}
