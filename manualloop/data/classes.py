"""Numbers for the classes of all splits, so that a number means the same class everywhere.

Strings become numbers, and a split that numbers its classes otherwise gets the numbers of the model
or, if the model has no names, those of the training split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from manualloop.arguments import Checks
from manualloop.data.columns import find_label
from manualloop.data.mapping import Number, is_hidden
from manualloop.data.splits import TEXT_KINDS, Split, fix_all, reference_of
from manualloop.data.values import Values, count_texts, distinct_in, values_of
from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import as_map, class_lists_call
from manualloop.models import model_name, num_labels
from manualloop.notices import say
from manualloop.tasks.names import (
    Names,
    Naming,
    are_given,
    are_numbered_alike,
    are_numbers,
    folded,
    names_in_config,
    names_of,
    place_of_names,
    show_names,
)
from manualloop.tasks.task import infer_task

_TASKS = ("single_label_classification", "multi_label_classification", "token_classification")
_MOST_UNIQUE = 20
_NUM_COMPARED = 64
_FEW, _SHARE = 3, 0.1  # rows of a letter, and share of those of its other case: less is a mistake


class _Labels(NamedTuple):
    """Labels of several splits, with what decides their numbers.

    Attributes:
        column: Their column.
        splits: The splits that have it and do not hide it, by key.
        values: A description of their strings, by key; for splits that are no streams.
        model: The model; None if it is unknown.
        own: The names of the model that count; None for none.
    """

    column: str
    splits: dict[Any, Split]
    values: dict[Any, Values]
    model: nn.Module | None
    own: Names | None

    def is_text(self, key: Any) -> bool:
        """Tell whether the labels of a split are strings, or lists of them."""
        return self.splits[key].kinds[self.column] in TEXT_KINDS

    def is_list(self, key: Any) -> bool:
        """Tell whether a row of a split has a list of labels."""
        return self.splits[key].kinds[self.column] in ("list", "texts")

    def names_in(self, key: Any) -> Names | None:
        """Return the names that a split has in its features; None if it has none."""
        if (made_of := self.splits[key].made_of) is not None:
            if not self.splits[key].is_unchanged:
                return None  # numbers of the user's
            return None if are_numbers(made_of) else made_of
        names = getattr(self.splits[key].feature(self.column), "names", None)
        return tuple(names) if names and not are_numbers(names) else None


def number_classes(
    splits: dict[Any, Split],
    column: str | None,
    model: nn.Module | None,
    task: str | None,
    check: Checks,
    *,
    keeps_text: bool = False,
    joined: Sequence[str] = (),
    chosen: Names | None = None,
) -> tuple[dict[Any, Split], Naming]:
    """Number the classes of all splits alike.

    Args:
        splits: The splits.
        column: Their column of labels; None finds it.
        model: The model, whose names count if it has some; None if it is unknown.
        task: The task that the user named; None infers it.
        check: Keeps the errors: a class that the model or the training split does not have.
        keeps_text: Whether strings stay strings, because a ``collate_fn`` gets them.
        joined: Columns of 0 and 1 that became one, in the order of the classes.
        chosen: Names that the user gave for the numbers; None for those of the data.

    Returns:
        The splits with numbers for strings, and the names.
    """
    known = task or (None if model is None else infer_task(model))
    column = column or find_label(reference_of(splits).kinds)
    if column is None or known not in (None, *_TASKS):
        return splits, Naming()
    labels = _labels_of(splits, column, model, keeps_text=keeps_text)
    if chosen is not None and labels.own is not None and not are_numbered_alike(chosen, labels.own):
        check(_refuse_chosen, chosen, labels)
    if (names := chosen or _names_that_count(labels)) is None:
        made_of = labels.own or tuple(joined) if len(joined) > 1 else _names_of_made(labels)
        return splits, Naming(made_of)
    if labels.own is None and chosen is None:
        check(_refuse_alike, labels)
    check(_require_outputs, labels, names)
    has_room = check.ok
    changed, numbered, refused = dict(splits), [], []
    for key, split in labels.splits.items():
        made = check(_numbered, labels, key, names)
        if made is None or not has_room:
            refused.append(split.name)
        elif made is not split:
            changed[key] = made
            numbered.append(split.name)
    return changed, Naming(names, tuple(numbered), tuple(refused), is_numbered=True)


def _refuse_chosen(chosen: Names, labels: _Labels) -> None:
    assert labels.model is not None
    raise ConfigError(
        f"preprocess= numbers its labels {show_names(chosen)}, but {model_name(labels.model)} has "
        f"the classes {show_names(labels.own or ())} ({place_of_names(labels.model)}). Leave names "
        "out of preprocess, which then numbers them as the model does."
    )


def columns_in_order(
    columns: str | Sequence[str] | None, model: nn.Module | None, check: Checks
) -> str | Sequence[str] | None:
    """Return several columns of 0 and 1 in the order in which the model has the classes."""
    own = names_of(model)
    if model is None or own is None or columns is None or isinstance(columns, str):
        return columns
    if set(columns) == set(own):
        return own
    if len(columns) > 1 and not (are_numbered_alike(columns, own) and len(columns) == len(own)):
        check(_refuse_columns, columns, model, own)
    return columns


def _refuse_columns(columns: Sequence[str], model: nn.Module, own: Names) -> None:
    raise ConfigError(
        f"The columns of labels are {', '.join(columns)}, but {model_name(model)} has the classes "
        f"{show_names(own)} ({place_of_names(model)}). {_learn(columns, own, model)}"
    )


def note_made_labels(raw: Split, split: Split, column: str | None) -> Split:
    """Note of which classes a function of the user's made the labels of a split, if it did.

    Args:
        raw: The split as the function got it.
        split: The split that it made.
        column: The column of labels; None finds it.
    """
    label = column or find_label(raw.kinds)
    if "labels" not in split.kinds:
        return split
    named = [name for name in raw.kinds if getattr(raw.feature(name), "names", None)]
    source = label if label in raw.kinds else named[0] if len(named) == 1 else None
    names = None if source is None else getattr(raw.feature(source), "names", None)
    is_same = names is not None and _cells(raw, source) == _cells(split, "labels")
    return split._replace(made_of=tuple(names or ()), is_unchanged=is_same)


def _cells(split: Split, column: Any) -> list[Any]:
    """Return the cells of a column; of a stream those of its first rows."""
    if split.is_stream:
        return [row[column] for row in islice(split.rows, _NUM_COMPARED)]
    return list(split.rows[column][:])


def _names_of_made(labels: _Labels) -> Names | None:
    """Return the names of the classes that labels were made of, where the numbers are as many."""
    if not labels.splits:
        return None
    reference = reference_of(labels.splits)
    names = reference.made_of or ()
    if labels.own is not None:
        if not are_numbered_alike(names, labels.own):
            say(
                f"preprocess= made the labels of {reference.name}: they are taken for the numbers "
                f"of the model's classes, {show_names(labels.own)}, and not for those of the "
                f"dataset's, {show_names(names)}"
            )
        return None
    if are_numbers(names) or reference.kinds[labels.column] not in ("class", "int", "list"):
        return None
    if labels.model is not None and num_labels(labels.model) != len(names):
        return None
    found = [] if reference.is_stream else distinct_in(reference, labels.column).tolist()
    return names if all(n < len(names) and n == int(n) for n in found) else None


def _labels_of(
    splits: dict[Any, Split], column: str, model: nn.Module | None, *, keeps_text: bool
) -> _Labels:
    visible, found = {}, {}
    for key, split in splits.items():
        if (kind := split.kinds.get(column)) is None:
            continue
        if kind in TEXT_KINDS and keeps_text:
            continue
        if kind in TEXT_KINDS:
            values = values_of(split, column)
            if is_hidden(split.first[column]) if values is None else values.hidden_as():
                continue
            if values is not None:
                found[key] = values
        visible[key] = split
    if any(split.kinds[column] in TEXT_KINDS for split in visible.values()):
        visible = {key: s for key, s in visible.items() if not _is_hidden(s, column)}
    own = names_of(model)
    if own is not None and model is not None and are_given(model):
        has_names = any(split.is_train for split in visible.values())
        own = None if has_names else own  # of data that the model was not trained on
    return _Labels(column, visible, found, model, own)


def _is_hidden(split: Split, column: str) -> bool:
    """Tell whether a split hides its labels as numbers or None, where others have strings."""
    if split.kinds[column] in TEXT_KINDS:
        return False  # those were left out before
    values = values_of(split, column)
    return is_hidden(split.first[column]) if values is None else bool(values.hidden_as())


def _names_that_count(labels: _Labels) -> Names | None:
    """Return the names by which all splits are numbered; None leaves the labels as they are."""
    named = [key for key in labels.splits if labels.is_text(key) or labels.names_in(key)]
    if not named or labels.own is not None:
        return labels.own if named else None
    reference = reference_of(labels.splits)
    key = next(key for key, split in labels.splits.items() if split is reference)
    if not labels.is_text(key):
        return labels.names_in(key)
    values = labels.values.get(key)
    if values is None or len(named) < len(labels.splits) or not _are_classes(values, labels.model):
        return None  # a stream, or numbers elsewhere, whose names nobody knows, or texts
    return tuple(sorted(values.texts, key=_in_order(values.texts)))


def _refuse_alike(labels: _Labels) -> None:
    """Refuse strings that differ in their writing alone: one class would become two.

    Single characters may be letters of both cases, if both are common; that is logged.

    Raises:
        DataError: The message has the lines that make them one, and that keep them.
    """
    reference = reference_of(labels.splits)
    key = next(key for key, split in labels.splits.items() if split is reference)
    texts = labels.values[key].texts if key in labels.values else ()
    seen: dict[Any, str] = {}
    alike = {text: one for text in texts if (one := seen.setdefault(_meaning(text), text)) != text}
    if not alike:
        return
    text, other = next(iter(alike.items()))
    cell, keys = f'row["{labels.column}"]', [split.key for split in labels.splits.values()]
    one = as_map(labels.column, f"{alike}.get({cell}, {cell})")
    if labels.is_list(key):
        one = as_map(labels.column, f"[{alike}.get(name, name) for name in {cell}]")
    more = f", and {len(alike) - 1} more," if len(alike) > 1 else ","
    if all(len(a) == len(b) == 1 for a, b in alike.items()) and _are_common(labels, key, alike):
        say(
            f"{labels.column!r} of {reference.name} has the classes {other!r} and {text!r}{more} "
            f"which differ in case alone, and are two classes each. If they are one: "
            f"{fix_all(keys, one)}"
        )
        return
    two = fix_all(keys, _named_call(labels, key, f"names={list(texts)}"))
    raise DataError(
        f"{labels.column!r} of {reference.name} has the classes {other!r} and {text!r}{more} "
        f"which differ in case, spaces or form alone. If they are one: {fix_all(keys, one)}. If "
        f"they are two, name all: {two}."
    )


def _are_common(labels: _Labels, key: Any, alike: Mapping[str, str]) -> bool:
    """Tell whether of each pair of strings the rarer one occurs too often for a mistake."""
    counts = count_texts(labels.splits[key], labels.column)
    pairs = [sorted((counts[text], counts[other])) for text, other in alike.items()]
    return all(few >= _FEW and few >= _SHARE * many for few, many in pairs)


def _named_call(labels: _Labels, key: Any, names: str) -> str:
    """Return the call that makes strings classes with names."""
    if labels.is_list(key):
        return class_lists_call(labels.column, names.removeprefix("names="))
    return f'cast_column("{labels.column}", datasets.ClassLabel({names}))'


def _meaning(text: str) -> Any:
    """Return what two writings of a name have in common: 1.0 is 1, but 1.10 may be no 1.1."""
    with suppress(ValueError):
        if (number := float(text)).is_integer():
            return number
    return folded(text) or text  # punctuation alone is a class of its own


def _require_outputs(labels: _Labels, names: Names) -> None:
    """Refuse more strings than the model has outputs for.

    Raises:
        DataError: The message tells how to load it with more.
    """
    number = None if labels.model is None else num_labels(labels.model)
    reference = reference_of(labels.splits)
    is_text = reference.kinds[labels.column] in TEXT_KINDS
    if number is not None and is_text and len(names) > number:
        raise DataError(
            f"{labels.column!r} of {reference.name} has {len(names)} classes: "
            f"{show_names(names)}. The model has num_labels={number}. Load it with more: "
            f"from_pretrained(name, num_labels={len(names)})."
        )


def _are_classes(values: Values, model: nn.Module | None) -> bool:
    """Tell whether strings are classes, and no texts: most occur more than once."""
    has_room = model is not None and num_labels(model) is not None
    return has_room or len(values.texts) <= max(_MOST_UNIQUE, len(values.lengths) // 2)


def _in_order(names: Iterable[str]) -> Any:
    """Return the key by which names are sorted: numbers in their order, so that "10" is last."""
    return int if all(name.isascii() and name.isdigit() for name in names) else str


def _numbered(labels: _Labels, key: Any, names: Names) -> Split:
    """Number the classes of a split by their names.

    Raises:
        DataError: A class is not among the names. In a stream that comes to light on the way.
    """
    split, here = labels.splits[key], labels.names_in(key)
    values = labels.values.get(key)
    if labels.is_text(key):
        if values is not None and (values.is_missing | values.is_blank).any():
            return split  # which is refused
        numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
        others = () if values is None else tuple(t for t in values.texts if t not in numbers)
    elif here is None or (are_numbered_alike(here, names) and len(here) <= len(names)):
        return split
    else:
        numbers = {n: names.index(name) for n, name in enumerate(here) if name in names}
        found = range(len(here)) if split.is_stream else distinct_in(split, labels.column).tolist()
        others = tuple(here[n] for n in found if 0 <= n < len(here) and n not in numbers)
        if not others and all(number == new for number, new in numbers.items()):
            return split
        others = () if split.is_stream and numbers else others
    if others:
        raise DataError(_message_on_others(labels, key, names, others))
    fix = f"Correct it, or leave such rows out: {_filter_call(labels, key, list(numbers))}"
    classes = f"The classes are {show_names(names)}. {fix}."
    return split.map(
        Number(labels.column, numbers, split.name, classes), classes=(labels.column, names)
    )


def _filter_call(labels: _Labels, key: Any, kept: Sequence[Any] = (), left: Any = None) -> str:
    """Return the line that filters a split: to rows of some classes, or to those without others."""
    value, listed = f'row["{labels.column}"]', kept if left is None else left
    some = f"{{{', '.join(map(repr, listed))}}}"
    if labels.is_list(key):
        test = f"{some}.issuperset({value})" if left is None else f"{some}.isdisjoint({value})"
    else:
        test = f"{value} in {some}" if left is None else f"{value} not in {some}"
    return labels.splits[key].fix(f"filter(lambda row: {test})")


def _message_on_others(labels: _Labels, key: Any, names: Names, others: Sequence[str]) -> str:
    """Return the message about classes of a split that are not among the names."""
    split, column = labels.splits[key], labels.column
    head = f"{_first_with(labels, key, others)}, a class that"
    if labels.own is not None and labels.model is not None:
        found = labels.names_in(key) or labels.values[key].texts
        return (
            f"{head} {model_name(labels.model)} does not have: {show_names(names)} "
            f"({place_of_names(labels.model)}). {_advice_on_names(labels, key, found)}"
        )
    here = labels.names_in(key)
    left = others if here is None else [here.index(name) for name in others]
    known = _filter_call(labels, key, left=left)
    without = split.fix(f'remove_columns("{column}")')
    reference = reference_of(labels.splits).name
    return (
        f"{head} {reference} does not have: {show_names(names)}. Correct it. To leave such rows "
        f"out: {known}. To predict all rows: {without}."
    )


def _first_with(labels: _Labels, key: Any, others: Sequence[str]) -> str:
    """Return the words on the first row with one of some classes."""
    split, column = labels.splits[key], labels.column
    if split.is_stream:
        return f"{column!r} of {split.name} has {others[0]!r}"
    here = labels.names_in(key)
    names = {name if here is None else here.index(name): name for name in others}
    for number, row in enumerate(split.select([column]).rows):
        cells = row[column] if isinstance(row[column], list) else [row[column]]
        if found := [names[cell] for cell in cells if cell in names]:
            return f"Row {number} of {split.name} has {column}={found[0]!r}"
    raise AssertionError(f"no row has one of {others}")


def _advice_on_names(labels: _Labels, key: Any, found: Names) -> str:
    """Return the lines that bring the names of data and model together."""
    own, split = labels.own or (), labels.splits[key]
    alike = {name: [o for o in own if folded(o) == folded(name)] for name in found}
    if all(len(matches) == 1 for matches in alike.values()):
        renamed = {name: matches[0] for name, matches in alike.items()}
        line = split.fix(_rename_call(labels, key, renamed))
        return f"Names differ in case or spaces. Name them as the model does: {line}."
    advice = []
    if labels.names_in(key) is not None and len(found) == len(own):
        line = split.fix(_rename_call(labels, key, dict(zip(found, own, strict=True))))
        advice.append(f"If they are the model's classes in this order, name them so: {line}.")
    return " ".join([*advice, _learn(found, own, labels.model)])


def _learn(names: Sequence[str], own: Names, model: nn.Module | None) -> str:
    """Return the sentence on a model that is to learn classes of other names."""
    if model is not None and names_in_config(model) is None:
        return "If the model is to learn these classes, prepare them without model=."
    id2label = dict(enumerate(names))
    label2id = {name: number for number, name in id2label.items()}
    if len(names) == len(own):
        line = f'model.config.update({{"id2label": {id2label}, "label2id": {label2id}}})'
        return f"If the model is to learn these classes, name them before: {line}."
    return (
        "If the model is to learn these classes, load it with them: from_pretrained(name, "
        f"id2label={id2label}, label2id={label2id}, ignore_mismatched_sizes=True)."
    )


def _rename_call(labels: _Labels, key: Any, names: Mapping[str, str]) -> str:
    """Return the call that gives the classes of a split other names."""
    column = labels.column
    if labels.names_in(key) is not None:
        if labels.is_list(key):
            return class_lists_call(column, str(list(names.values())))
        return f'cast_column("{column}", datasets.ClassLabel(names={list(names.values())}))'
    value = f'{dict(names)}[row["{column}"]]'
    if labels.is_list(key):
        value = f'[{dict(names)}[name] for name in row["{column}"]]'
    return as_map(column, value)
