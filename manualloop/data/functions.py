"""The user's functions by split: one for all splits, or one for each of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from manualloop.arguments import Checks, all_at_once
from manualloop.data.collate import require_pad_token
from manualloop.data.columns import Taking, column_filter, find_label
from manualloop.data.mapping import COUNTS, Copy, Preprocess
from manualloop.data.splits import Split, open_split, reference_of
from manualloop.errors import ConfigError, DataError
from manualloop.notices import say
from manualloop.tasks.made import Making
from manualloop.tasks.names import Naming, names_of

ByName = Mapping[str, Callable[..., Any]]
"""A function for each of some splits."""


RAW = "labels as they are"
"""Column of the labels from before they were numbered by their names, where it is asked for."""


class Functions(NamedTuple):
    """What the user's functions are for one split, and which columns reach a batch of it.

    Attributes:
        preprocess: As in ``prepare_dataloaders``, for this split.
        transform: As in ``prepare_dataloaders``, for this split.
        collate_fn: As in ``prepare_dataloaders``, for this split; None pads.
        takes: Test for the columns that the model takes.
        keep: Columns that skip the model.
        num_proc: Number of processes that tokenize or preprocess; None: this one alone.
        makes: Columns that the transform makes, and that skip the model.
    """

    preprocess: Callable[..., Any] | None
    transform: Callable[..., Any] | None
    collate_fn: Callable[..., Any] | None
    takes: Taking
    keep: tuple[str, ...]
    num_proc: int | None = None
    makes: tuple[str, ...] = ()

    @property
    def cut(self) -> str | None:
        """The call that cuts rows at ``{room}`` tokens; None if ``prepare_dataloaders`` does."""
        made = (self.preprocess, self.transform)
        calls = [call for function in made if (call := getattr(function, "cut_call", None))]
        if not calls and self.preprocess is not None:
            return "let preprocess call tokenizer(..., truncation=True, max_length={room})"
        return " and ".join(calls) or None

    @property
    def are_given(self) -> bool:
        """Whether any of the functions is the user's."""
        return any(function is not None for function in self[:3])

    def stays(self, name: str, kind: str) -> bool:
        """Tell whether a column stays in the dataset: a transform gets all of them."""
        is_kept = name in self.keep or name == RAW
        return self.transform is not None or is_kept or self.takes(name, kind)

    def maker_of(self, split: Split, rows: Any, model: nn.Module | None) -> str | None:
        """Return the argument whose function makes the labels of a batch; None: the dataset does.

        Args:
            split: The prepared split.
            rows: Its rows, with their transform if they have one.
            model: The model, for which the labels of the dataset were judged; None: they were not.
        """
        if self.transform is not None and (model is not None or rows.makes_labels):
            return "transform"
        makes_some = self.collate_fn is not None and "labels" not in split.kinds
        return "collate_fn" if makes_some else split.maker

    def preprocessed(self, split: Split, label_column: str | None) -> Split:
        """Return a split with the columns that ``preprocess`` makes.

        Args:
            split: The split.
            label_column: The column of labels; None finds it.
        """
        from manualloop.data.classes import note_made_labels  # loads pyarrow

        assert self.preprocess is not None
        from manualloop.data.tables import bars_only_where_seen  # it loads datasets

        kinds = split.kinds
        keep = (*self.keep, RAW) if RAW in kinds else self.keep
        label = label_column or find_label(kinds)
        kept = tuple(n for n in kinds if n == label or n in keep or self.takes(n, kinds[n]))
        counts = isinstance(self.preprocess, Making)
        options: dict[str, Any] = {} if split.is_stream else {"num_proc": self.num_proc}
        if counts and not split.is_stream:
            options["with_indices"] = True
        run = Preprocess(self.preprocess, kept, label, keep, split.name if counts else None)
        with bars_only_where_seen():
            rows = split.rows.map(run, batched=True, remove_columns=list(kinds), **options)
        if counts:
            rows = tell_counts(split, rows, self.preprocess)
        if RAW in kinds:  # the function has got the numbers in its place
            column = self.preprocess.labels_of  # type: ignore[attr-defined]
            rows = rows.remove_columns([column]).rename_column(RAW, column)
        made = open_split(split.name, rows, split.key)
        is_new = "labels" in made.kinds and "labels" not in kinds
        made = made._replace(form=split.form, maker="preprocess" if is_new else None)
        source = getattr(self.preprocess, "labels_of", None) or label_column
        return note_made_labels(split, made, source)


def number_sources(
    splits: dict[Any, Split],
    functions: dict[Any, Functions],
    model: nn.Module | None,
    task: str | None,
) -> tuple[dict[Any, Split], dict[Any, Functions], Naming]:
    """Number the classes that ``preprocess`` makes labels of, and tell it their names.

    A function has the name of their column in an attribute ``labels_of``, and its method ``named``
    returns a copy of it that knows the names of the classes.

    Args:
        splits: The splits.
        functions: The functions of each.
        model: As in ``number_classes``.
        task: As in ``number_classes``.

    Returns:
        The splits with numbers in that column, the functions, and the names.

    Raises:
        DataError: As in ``number_classes``.
    """
    from manualloop.data.classes import number_classes  # loads pyarrow

    reference = reference_of(splits)
    first = next(key for key, split in splits.items() if split is reference)
    source = functions[first].preprocess
    column, chosen = getattr(source, "labels_of", None), getattr(source, "names", None)
    if column not in reference.kinds:
        return splits, functions, Naming()
    with all_at_once() as check:
        number = partial(
            number_classes, column=column, model=model, task=task, check=check, chosen=chosen
        )
        numbered, naming = number(splits)
        raw = {
            key: split.map(Copy(column, RAW), types={RAW: column})
            if numbered[key] is not split and column in functions[key].keep
            else split
            for key, split in splits.items()
        }
        if check.ok and any(raw[key] is not splits[key] for key in raw):
            numbered, naming = number(raw)
        splits = numbered
    names = naming.names or names_of(model)
    if names is not None:
        of_splits: dict[int, Any] = {id(f.preprocess): f.preprocess for f in functions.values()}
        named: dict[int, Any] = {
            number: function.named(names) if hasattr(function, "named") else function
            for number, function in of_splits.items()
        }
        functions = {
            key: of_split._replace(preprocess=named[id(of_split.preprocess)])
            for key, of_split in functions.items()
        }
    return splits, functions, naming


def preprocess_all(
    splits: Mapping[Any, Split], functions: Mapping[Any, Functions], label_column: str | None
) -> dict[Any, Split]:
    """Return splits with the columns that ``preprocess`` makes, and log what it has counted.

    Args:
        splits: The splits.
        functions: The functions of each.
        label_column: The column of labels; None finds it.

    Raises:
        DataError: Rows have different numbers of choices, or a function has left out all of them.
    """
    made = {key: functions[key].preprocessed(split, label_column) for key, split in splits.items()}
    for split in made.values():
        _require_same_choices(split)
    return made


_MOST_LISTED = 100


def _require_same_choices(split: Split) -> None:
    """Refuse rows of several lists of tokens that have more or fewer than most have.

    Raises:
        DataError: The message leaves them out.
    """
    ids = split.first.get("input_ids")
    if split.is_stream or not isinstance(ids, list) or not ids or not isinstance(ids[0], list):
        return
    from manualloop.data.values import lengths_of  # loads pyarrow

    if (numbers := lengths_of(split, "input_ids")) is None:
        return
    usual = int(np.bincount(numbers).argmax())
    if not len(others := np.flatnonzero(numbers != usual)):
        return
    line = "Leave them out with dataset.select."
    if len(others) <= _MOST_LISTED:
        left = split.fix(
            f"select([n for n in range({len(numbers)}) if n not in {set(others.tolist())}])"
        )
        line = f"Leave them out: {left}."
    raise DataError(
        f"Row {others[0]} of {split.name} has {numbers[others[0]]} choices, and most rows have "
        f"{usual}; a batch holds as many choices of each row. Rows with another number: "
        f"{len(others)} of {len(numbers)}. {line}"
    )


def tell_counts(split: Split, rows: Any, function: Any) -> Any:
    """Log what a function counted while it made the rows of a split, and drop the counts.

    Raises:
        DataError: It has left out all rows.
    """
    if split.is_stream:
        return rows.remove_columns([COUNTS])  # nobody has read it to its end
    if len(rows) == 0:
        raise DataError(
            f"preprocess= has left out all {len(split.rows)} rows of {split.name}. Look at what it "
            f"makes of the first: preprocess({split.code}[:1])."
        )
    counts: Counter[str] = Counter()
    for notes in filter(None, rows[COUNTS][:]):
        counts.update(json.loads(notes))
    lines = function.describe(counts)
    if others := len(split.rows) - counts["given"]:
        lines.append(f"left out as well: {others:,} rows, in batches of which no row is left")
    if lines:
        say(f"{split.name}: {'; '.join(lines)}")
    return rows.remove_columns([COUNTS])


def problems_of_cutting(arguments: Mapping[str, Any]) -> list[str]:
    """Return that ``max_length`` cuts no row that ``preprocess`` makes, where both are given."""
    function, room = arguments["preprocess"], arguments["max_length"]
    if function is None or room is None:
        return []
    functions = list(function.values()) if isinstance(function, Mapping) else [function]
    found = {getattr(one, "cut_call", None) for one in functions}
    calls = sorted(call for call in found if isinstance(call, str))
    fix = f"Cut rows there: tokenizer(..., truncation=True, max_length={room})."
    if calls:
        shown = " and ".join(call.format(room=room) for call in calls)
        fix = f"Cut the rows where they are made: preprocess={shown}."
    return [
        f"max_length={room} cuts texts that are tokenized here, and with preprocess= none are: it "
        f"would cut nothing. {fix}"
    ]


def functions_of(
    splits: Mapping[Any, Split],
    given: Mapping[str, Any],
    keep: tuple[str, ...],
    tokenizer: Any,
    model: nn.Module | None,
    check: Checks,
) -> dict[Any, Functions]:
    """Return the functions of each split.

    Args:
        splits: The splits.
        given: The user's ``preprocess``, ``transform``, ``collate_fn``, ``num_proc`` and ``pack``.
        keep: Columns that skip the model.
        tokenizer: As in ``prepare_dataloaders``.
        model: As in ``prepare_dataloaders``.
        check: Keeps the errors.
    """
    of_split: dict[Any, list[Any]] = {key: [] for key in splits}
    for argument in ("preprocess", "transform", "collate_fn"):
        by_key = check(_by_split, argument, given[argument], list(splits)) or {}
        for key, functions in of_split.items():
            functions.append(by_key.get(key))
    padded = [key for key, split in splits.items() if not (given["pack"] and split.is_train)]
    if any(of_split[key][2] is None for key in padded):
        check(require_pad_token, tokenizer)
    if model is not None:
        for functions in of_split.values():
            if isinstance(functions[0], Making) and hasattr(functions[0], "with_model"):
                functions[0] = functions[0].with_model(model)
    return {
        key: Functions(
            *(preprocess, transform, collate_fn),
            column_filter(tokenizer, model, takes_all=collate_fn is not None, keep=(*keep, RAW)),
            keep,
            given["num_proc"],
        )
        for key, (preprocess, transform, collate_fn) in of_split.items()
    }


def _by_split(argument: str, function: Any, keys: list[Any]) -> dict[Any, Any]:
    """Return an argument as a function by split.

    Raises:
        ConfigError: It names a split that is not there, or ``preprocess`` leaves one out.
    """
    if not isinstance(function, Mapping):
        return dict.fromkeys(keys, function)
    names = ", ".join(map(str, keys))
    if unknown := [key for key in function if key not in keys]:
        raise ConfigError(
            f"{argument} names the split {unknown[0]!r}, which is not there. The splits: {names}."
        )
    left = [key for key in keys if key not in function]
    if argument == "preprocess" and left:
        raise ConfigError(
            f"preprocess names no function for {left[0]}. Name one for every split: {names}."
        )
    return dict(function)
