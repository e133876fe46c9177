"""``prepare_dataloaders``: from datasets, raw or tokenized, to one DataLoader per split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from manualloop.data.collate import (
    check_alignment,
    check_columns,
    padding_collate_fn,
    require_pad_token,
)
from manualloop.data.columns import (
    Columns,
    Rows,
    Split,
    Takes,
    column_filter,
    find_columns,
    find_label,
    open_split,
    open_splits,
)
from manualloop.data.grouping import Ints, round_up
from manualloop.data.labels import BY_TOKEN, Labels, describe_labels, prepare_labels
from manualloop.data.sampler import ordered_loader
from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import LABEL_LIKE, text_message
from manualloop.models import max_length as model_max_length
from manualloop.models import model_name
from manualloop.notices import say
from manualloop.tasks.task import TASKS


def prepare_dataloaders(
    datasets: Any,
    tokenizer: Any = None,
    *,
    model: nn.Module | None = None,
    task: str | None = None,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    eval_batch_size: int | None = None,
    max_tokens: int | None = None,
    group_by_length: bool = False,
    pad_to_multiple_of: int | None = None,
    drop_last: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    seed: int = 42,
    num_workers: int = 0,
    pin_memory: bool | None = None,
) -> dict[str, DataLoader[Any]]:
    """Turn datasets into DataLoaders of padded batches with the columns that the model takes.

    Text is tokenized, and each batch is padded to its own longest row. Splits whose name begins
    with "train" are shuffled in an order of ``(seed, epoch)``, without a draw from the global
    random generator; the other splits keep the dataset's order. A stream keeps its own order:
    shuffle it with ``dataset.shuffle(buffer_size=...)``. One line reports which columns are used
    and which are dropped.

    Args:
        datasets: A ``DatasetDict``, any mapping from split to dataset, or a single dataset, which
            becomes the split "train". A dataset is a ``datasets.Dataset`` or ``IterableDataset``
            as ``load_dataset`` returns it, raw or with ``input_ids``.
        tokenizer: Tokenizer, which also pads; None if the rows can be stacked as they are.
        model: Model whose ``forward`` decides which columns are kept. Without it the tokenizer's
            ``model_input_names`` and the labels are kept.
        task: A key of ``manualloop.tasks.task.TASKS``; None infers it from labels and model.
        text_columns: One column of text or a pair; None infers it.
        label_column: Column that the model gets as ``labels``; None uses ``labels``, ``label``, or
            the only column of classes. Lists mean multi-label, and hold 0 and 1 for each class or
            the class numbers. Floats mean a regression.
        max_length: Number of tokens at which texts are truncated; None uses the limit of tokenizer
            and model.
        batch_size: Number of rows per batch.
        eval_batch_size: Number of rows per batch in splits that are not shuffled; None uses
            ``batch_size``.
        max_tokens: Most tokens per batch, padding included, which replaces ``batch_size``. Shuffled
            splits are then grouped by length. The loss is weighted by items, so large and small
            batches count correctly.
        group_by_length: Whether batches of the shuffled splits hold rows of about the same length,
            which saves padding. The order differs from the default one, and is also a function of
            ``(seed, epoch)``.
        pad_to_multiple_of: Number of which each padded length is a multiple.
        drop_last: Whether to drop a shorter last batch of the shuffled splits.
        collate_fn: Function that replaces padding. It gets rows with all columns, except for texts
            that were tokenized.
        preprocess: Function that replaces tokenization. It gets a batch of rows as they are in the
            dataset, as from ``dataset.map`` with ``batched=True``, and may return ``labels``.
        seed: Seed of the order.
        num_workers: Number of processes that read and pad.
        pin_memory: Whether to pin batches in memory; None pins them if there is a CUDA device.

    Returns:
        One loader per split, by the names of the splits. Batches are dicts of CPU tensors:
        ``input_ids`` and ``attention_mask``, int64 ``(rows, tokens)``; ``labels``, int64
        ``(rows,)``, or float32 ``(rows,)`` for a regression and ``(rows, classes)`` for
        multi-label.

    Raises:
        ConfigError: The arguments do not fit together or do not fit the data.
        DataError: A split is empty, or labels are missing, text, or not classes of the model.

    >>> from datasets import Dataset, disable_progress_bars
    >>> disable_progress_bars()
    >>> rows = Dataset.from_dict({"input_ids": [[5, 6], [7, 8], [9, 4]], "label": [0, 1, 0]})
    >>> loaders = prepare_dataloaders(rows, batch_size=2)
    >>> batch = next(iter(loaders["train"]))
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6], [9, 4]], [0, 0])
    """
    _check_arguments(
        task,
        drop_last,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        max_length=max_length,
        max_tokens=max_tokens,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    if collate_fn is None:
        require_pad_token(tokenizer)
    takes = column_filter(tokenizer, model, takes_all=collate_fn is not None)

    splits = open_splits(datasets)
    if preprocess is not None:
        for key, split in splits.items():
            splits[key] = _preprocess(split, preprocess, takes, label_column)
    first = max(splits.values(), key=lambda split: split.is_train)  # the first split if none is
    if preprocess is not None and "labels" in first.kinds:
        label_column = "labels"

    tokenizes = preprocess is None and tokenizer is not None
    columns = find_columns(
        first.name, first.kinds, text_columns, label_column, needs_text=tokenizes
    )
    if preprocess is None and collate_fn is None:
        _refuse_leftovers(first, columns, tokenizer)
    for split in splits.values():
        check_columns(split, *columns, may_be_text=collate_fn is not None)

    labels = describe_labels(first, columns.label, task, model)
    encode = _encoder(first, columns, tokenizer, max_length, model) if tokenizes else None
    notes: dict[str, list[str]] = {}
    for key, split in splits.items():
        splits[key], note = _prepare_split(split, columns, labels, encode, takes, model)
        notes.setdefault(note, []).append(split.name)
    for note, names in notes.items():
        say(f"{', '.join(names)}: {note}")

    if collate_fn is None:
        collate_fn = padding_collate_fn(tokenizer, labels.task, pad_to_multiple_of)
        splits = {key: _in_tables(split, collate_fn) for key, split in splits.items()}
    return {
        key: ordered_loader(
            split.rows,
            split.name,
            batch_size if split.is_train else eval_batch_size or batch_size,
            shuffle=split.is_train,
            drop_last=drop_last and split.is_train,
            seed=seed,
            lengths=_lengths(
                split, columns, labels.task, pad_to_multiple_of or 1, max_tokens, group_by_length
            ),
            max_tokens=max_tokens,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        )
        for key, split in splits.items()
    }


def _lengths(
    split: Split,
    columns: Columns,
    task: str | None,
    multiple: int,
    max_tokens: int | None,
    group_by_length: bool,
) -> Ints | None:
    """Return the number of tokens of each row, int64 ``(rows,)``; None if the order ignores it.

    Raises:
        ConfigError: The split is a stream, or has no column of lists of numbers.
        DataError: A row has no tokens.
    """
    if max_tokens is None and not (group_by_length and split.is_train):
        return None
    lengths = None
    if hasattr(split.rows, "__len__"):
        from manualloop.data.tables import as_tables

        lists = [name for name, kind in split.kinds.items() if kind == "list"]
        names = ["input_ids"] if "input_ids" in lists else lists[:1]
        if "labels" in lists and (task in BY_TOKEN or task == "seq2seq_lm"):
            names.append("labels")
        lengths = as_tables(split.rows).lengths(names)
    if lengths is None:
        asked = "group_by_length=True" if max_tokens is None else f"max_tokens={max_tokens}"
        raise ConfigError(
            f"{asked} needs the number of tokens of each row of {split.name}, which is a stream or "
            "has no column of lists of numbers. Remove the argument."
        )
    row = int(lengths.argmin())
    if lengths[row] == 0:
        column = (columns.texts or names)[0]
        raise DataError(
            f"Row {row} of {split.name} has no tokens, so grouping by length would make a batch "
            "without tokens. Filter such rows out: "
            f'dataset.filter(lambda row: len(row["{column}"]) > 0).'
        )
    return round_up(lengths, multiple)


def _check_arguments(task: str | None, drop_last: bool, **counts: int | None) -> None:
    problems = [
        f"{name} must be a whole number of at least 1, got {count!r}."
        for name, count in counts.items()
        if count is not None and (not isinstance(count, int) or count < 1)
    ]
    if task is not None and task not in TASKS:
        problems.append(f"task={task!r} is unknown. Use one of: {', '.join(TASKS)}.")
    if drop_last and counts["max_tokens"] is not None:
        problems.append(
            "drop_last=True drops a last batch with fewer rows than batch_size, but with "
            "max_tokens batches have no fixed number of rows. Remove one of the two arguments."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _preprocess(
    split: Split, function: Callable[[Rows], Rows], takes: Takes, label_column: str | None
) -> Split:
    kinds = split.kinds
    label = label_column or find_label(kinds)
    kept = [name for name, kind in kinds.items() if name == label or takes(name, kind)]

    def run(rows: Rows) -> Rows:
        made = function(rows) or {}
        # A function that returns labels may also return more or fewer rows than it got.
        left = [name for name in kept if name != label or "labels" not in made]
        return {**{name: rows[name] for name in left}, **made}

    return open_split(split.name, split.rows.map(run, batched=True, remove_columns=list(kinds)))


def _refuse_leftovers(split: Split, columns: Columns, tokenizer: Any) -> None:
    """Refuse text without a tokenizer, and labels under a name that cannot be identified."""
    kinds = {name: kind for name, kind in split.kinds.items() if name != columns.label}
    if tokenizer is None:
        is_ready = {"list", "other"} & set(kinds.values())
        found = [name for name, kind in kinds.items() if kind == "text" and not is_ready]
        if texts := columns.texts or found:
            raise DataError(text_message(texts[0], split.first[texts[0]], split=split.name))
    suspects = [name for name in kinds if name in LABEL_LIKE]
    if columns.label is None and suspects and split.is_train:
        raise DataError(
            f"No label column in {split.name}. Its columns: {', '.join(kinds)}. Did you mean "
            f'{suspects[0]!r}? Use label_column="{suspects[0]}".'
        )


def _encoder(
    split: Split,
    columns: Columns,
    tokenizer: Any,
    max_length: int | None,
    model: nn.Module | None,
) -> Callable[[Rows], Rows] | None:
    if not columns.texts:
        return None
    if max_length is None and model is not None and (room := model_max_length(model)) is not None:
        max_length = min(room, getattr(tokenizer, "model_max_length", room))
    options = {"truncation": True, "max_length": max_length}
    if split.kinds[columns.texts[0]] == "texts":  # a list of two words would else count as a pair
        options["is_split_into_words"] = True

    def encode(rows: Rows) -> Rows:
        encoded: Rows = tokenizer(*(rows[name] for name in columns.texts), **options)
        return encoded

    return encode


def _prepare_split(
    split: Split,
    columns: Columns,
    labels: Labels,
    encode: Callable[[Rows], Rows] | None,
    takes: Takes,
    model: nn.Module | None,
) -> tuple[Split, str]:
    """Return a split, tokenized and pruned, and a line on which columns it uses and drops."""
    texts, label = columns
    raw = split.kinds
    split = prepare_labels(split, labels)
    if encode is not None:
        kinds = split.kinds
        split = split.select([name for name in kinds if name in texts or takes(name, kinds[name])])
        split = split.map(encode, remove=texts)
    if labels.task in BY_TOKEN:
        check_alignment(split)
    kinds = split.kinds
    kept = [name for name in kinds if takes(name, kinds[name])]
    inputs = [name for name in kept if name != "labels"]
    taker = "" if model is None else f" (not in {model_name(model)}.forward)"
    if not inputs:
        raise DataError(
            f"{split.name} has no column that the model takes, only {', '.join(kinds)}{taker}. "
            "Add the columns that it takes, such as input_ids, with preprocess= or dataset.map."
        )
    note = f"using {', '.join(texts or inputs)}{' -> labels' if 'labels' in kept else ''}"
    if dropped := [name for name in (*raw, *kinds) if name not in (*kept, *texts, label)]:
        note += f"; dropped: {', '.join(dict.fromkeys(dropped))}{taker}"
    if label in raw and "labels" not in kinds:
        note += f"; every {label} is -1, so there are no labels"
    return split.select(kept), note


def _in_tables(split: Split, collate_fn: Callable[[Any], Any]) -> Split:
    """Make loaders fetch a split's rows as tables if their ``collate_fn`` takes tables."""
    if not hasattr(collate_fn, "padded_lengths") or not hasattr(split.rows, "__len__"):
        return split
    from manualloop.data.tables import as_tables

    return split._replace(rows=as_tables(split.rows))
