"""How the rows of a prepared loader were made, for a script that makes them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manualloop.data.files import code_of_file, read_rows
from manualloop.data.kept import KeepingCollate
from manualloop.data.mapping import Encode
from manualloop.tasks.names import Naming

if TYPE_CHECKING:
    from manualloop.data.survey import Survey


class Preparation(NamedTuple):
    """How ``prepare_dataloaders`` made the rows of one split, and their batches.

    Attributes:
        split: Name of the split.
        texts: Columns of text that were tokenized.
        label: Column that became ``labels``; None if the split has none.
        options: Arguments of the tokenizer.
        classes: Names of the classes that were numbered from 0; None if labels were numbers.
        is_tokenized: Whether these columns, tokenized and numbered so, are all that was done.
        task: Key of ``TASKS``; None if it is unknown.
        kept: Columns that skip the model.
        pad_to_multiple_of: As in ``prepare_dataloaders``.
        collate_fn: The user's own, or None.
        source: Call of ``load_dataset`` for all splits, or of a method of ``Dataset`` for this
            one; None if it is unknown.
        others: What else makes the rows or their batches, by the names of the arguments.
    """

    split: Any
    texts: tuple[str, ...]
    label: str | None
    options: Mapping[str, Any]
    classes: tuple[str, ...] | None
    is_tokenized: bool
    task: str | None
    kept: frozenset[str]
    pad_to_multiple_of: int | None
    collate_fn: Any
    source: str | None
    others: tuple[str, ...]

    @property
    def is_of_file(self) -> bool:
        """Whether the split is a file of its own."""
        return self.source is not None and self.source.startswith("Dataset.")


def note_preparation(
    loaders: Mapping[Any, Any],
    datasets: Any,
    found: Survey,
    naming: Naming,
    encode: Encode | None,
    arguments: Mapping[str, Any],
) -> None:
    """Keep with each loader how it was made.

    Args:
        loaders: The loaders, by split.
        datasets: The user's datasets.
        found: What was found out about their columns.
        naming: Names of the classes.
        encode: The tokenization, or None.
        arguments: Arguments of ``prepare_dataloaders``.
    """
    for key, loader in loaders.items():
        given = datasets[key] if isinstance(datasets, Mapping) else datasets
        rows = _opened(str(key), given)
        label = None if key in found.hidden else found.columns.label
        classes = _numbered_classes(rows, label, naming) if encode is not None else None
        others = [name for name in ("preprocess", "transform", "pack") if arguments[name]]
        others += ["max_tokens"] if arguments["max_tokens"] is not None else []
        by_split = arguments["collate_fn"]
        collate = by_split.get(key) if isinstance(by_split, Mapping) else by_split
        kept = loader.collate_fn
        loader.__dict__["preparation"] = Preparation(
            split=key,
            texts=found.columns.texts,
            label=label,
            options={} if encode is None else {**encode.options, "max_length": encode.limit},
            classes=classes,
            is_tokenized=(
                encode is not None
                and not others
                and not arguments["fill"]
                and not found.labels.are_listed
                and hasattr(rows, "__len__")
                and _has_plain_labels(rows, label, classes, str(key) in naming.numbered)
            ),
            task=found.labels.task,
            kept=kept.skips if isinstance(kept, KeepingCollate) else frozenset(),
            pad_to_multiple_of=arguments["pad_to_multiple_of"],
            collate_fn=collate,
            source=_source_of(given),
            others=tuple(others),
        )


def preparation_of(loader: Any) -> Preparation | None:
    """Return how a loader was made; None if ``prepare_dataloaders`` has not made it."""
    return getattr(loader, "preparation", None)


def _numbered_classes(rows: Any, label: str | None, naming: Naming) -> tuple[str, ...] | None:
    """Return the names of classes, where the labels are these names and become their numbers."""
    feature = (getattr(rows, "features", None) or {}).get(label)
    is_text = str(getattr(feature, "dtype", "")) in ("string", "large_string")
    if not is_text or hasattr(feature, "names") or naming.names is None:
        return None
    if not hasattr(rows, "unique"):
        return None  # a stream, whose strings nobody has read
    names = tuple(naming.names)
    return names if set(rows.unique(label)) <= set(names) else None


def _has_plain_labels(
    rows: Any, label: str | None, classes: tuple[str, ...] | None, is_numbered: bool
) -> bool:
    if label is None or classes is not None:
        return True
    if label not in rows.column_names or (label != "labels" and "labels" in rows.column_names):
        return False
    dtype = str(getattr(rows.features[label], "dtype", ""))
    return not is_numbered and dtype.startswith(("int", "uint", "float", "double"))


def _opened(split: str, given: Any) -> Any:
    """Return a dataset; of a file or a frame its rows, unless a file is too large to read again."""
    if isinstance(given, str | os.PathLike) and Path(given).stat().st_size >= _MOST_BYTES:
        return None
    return read_rows(split, given)


_MOST_BYTES = 100_000_000


def _source_of(rows: Any) -> str | None:
    """Return the call that loads a dataset of the hub, or a file; None for others."""
    if isinstance(rows, str | os.PathLike):
        return code_of_file(rows).removeprefix("datasets.")
    info = getattr(rows, "info", None)
    for address in getattr(info, "download_checksums", None) or ():
        if str(address).startswith(_HUB):
            name = str(address).removeprefix(_HUB).split("@")[0]
            config = getattr(info, "config_name", None)
            second = "" if config in (None, "default") else f', "{config}"'
            return f'load_dataset("{name}"{second})'
    return None


_HUB = "hf://datasets/"
