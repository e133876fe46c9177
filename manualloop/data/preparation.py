"""How the rows of a prepared loader were made, for a script that makes them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manualloop.data.files import code_of_file, is_frame
from manualloop.data.kept import KeepingCollate
from manualloop.data.mapping import Encode
from manualloop.data.notes import hub_source
from manualloop.data.splits import Split
from manualloop.internals import stored_table
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
        frame_index: The index of the ``pandas.DataFrame`` that the rows were; None of others.
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
    frame_index: Any

    @property
    def is_of_file(self) -> bool:
        """Whether the split is a file of its own."""
        return self.source is not None and self.source.startswith("Dataset.")


def note_preparation(
    loaders: Mapping[Any, Any],
    datasets: Any,
    opened: Mapping[Any, Split],
    found: Survey,
    naming: Naming,
    encode: Encode | None,
    arguments: Mapping[str, Any],
) -> None:
    """Keep with each loader how it was made.

    Args:
        loaders: The loaders, by split.
        datasets: The user's datasets.
        opened: The same as splits, before any change.
        found: What was found out about their columns.
        naming: Names of the classes.
        encode: The tokenization, or None.
        arguments: Arguments of ``prepare_dataloaders``.
    """
    for key, loader in loaders.items():
        given = datasets[key] if isinstance(datasets, Mapping) else datasets
        rows = opened[key].rows
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
            source=_source_of(str(key), given),
            others=tuple(others),
            frame_index=_frame_index(given, loader.dataset),
        )


def preparation_of(loader: Any) -> Preparation | None:
    """Return how a loader was made; None if ``prepare_dataloaders`` has not made it."""
    return getattr(loader, "preparation", None)


def _frame_index(given: Any, rows: Any) -> Any:
    """Return the index of a frame; None of others, and if ``preprocess`` changed their number."""
    if not is_frame(given) or not hasattr(rows, "__len__") or len(rows) != len(given):
        return None
    return given.index


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


def _source_of(split: str, rows: Any) -> str | None:
    """Return the call that loads a file, or a dataset of the hub as it is; None for others."""
    if isinstance(rows, str | os.PathLike):
        return code_of_file(rows).removeprefix("datasets.")
    if (source := hub_source(rows)) is None or not _is_as_loaded(split, rows):
        return None
    name, config = source
    second = "" if config in (None, "default") else f', "{config}"'
    return f'load_dataset("{name}"{second})'


def _is_as_loaded(split: str, rows: Any) -> bool:
    """Tell whether rows are all those of a split of the same name, as ``load_dataset`` wrote them.

    A selection has row numbers or fewer rows, and what ``map`` has made is in another file.
    """
    info, files = rows.info, getattr(rows, "cache_files", ())
    whole = (info.splits or {}).get(split)
    if str(rows.split) != split or not files or whole is None or len(rows) != whole.num_examples:
        return False
    names = [Path(file["filename"]).name for file in files]
    is_written = all(name.startswith(f"{info.dataset_name}-{split}") for name in names)
    return is_written and stored_table(rows)[1] is None
