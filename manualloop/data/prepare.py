"""``prepare_dataloaders``: from a dataset, raw or tokenized, to one DataLoader a split."""

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
from manualloop.tasks.items import TASKS


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
    """Turn datasets into DataLoaders: tokenized, pruned to what the model takes, padded by batch.

    Splits whose name begins with "train" are shuffled, in the order of ``(seed, epoch)`` and
    without a draw from the global random generator; the others keep the dataset's order. A stream
    keeps its own: shuffle it with ``dataset.shuffle(buffer_size=...)``. Which columns were taken
    for what is said once.

    Args:
        datasets: A ``DatasetDict``, any mapping from split to dataset, or one dataset, which
            becomes the split "train"; ``datasets.Dataset`` or ``IterableDataset``, as
            ``load_dataset`` returns them, raw or with ``input_ids``.
        tokenizer: Tokenizes and pads; None if the rows are ready to be stacked.
        model: Its ``forward`` decides which columns stay. Without it the tokenizer's
            ``model_input_names`` and the labels do.
        task: A key of ``manualloop.tasks.items.TASKS``; None: inferred from labels and model.
        text_columns: One column or a pair; None: inferred.
        label_column: Reaches the model as ``labels``; None: ``labels``, ``label``, or the only
            column of classes. Lists are multi-label: of 0 and 1, or of class numbers. Floats are
            a regression.
        max_length: Tokens at which texts are cut; None: what tokenizer and model have room for.
        batch_size: Rows a batch.
        eval_batch_size: Rows a batch of the splits that are not shuffled; None: ``batch_size``.
        max_tokens: A batch holds as many rows as fit into so many tokens, padding counted, instead
            of ``batch_size``. Those of the shuffled splits are grouped by length. The loss weighs
            items, so that large and small batches count as they should.
        group_by_length: Put rows of about one length into the batches of the shuffled splits, so
            that less is padding. The order is another one, and still one of ``(seed, epoch)``.
        pad_to_multiple_of: Pad further, to a multiple of so many tokens.
        drop_last: Leave out a shorter last batch of the shuffled splits.
        collate_fn: Replaces padding. All columns then reach it, texts that the tokenizer has
            replaced by tokens excepted.
        preprocess: Replaces tokenization: a function of a batch of rows as they are in the
            dataset, as ``dataset.map`` calls it with ``batched=True``. It may return ``labels``.
        seed: Of the order.
        num_workers: Processes that read and pad.
        pin_memory: None: if there is a CUDA device.

    Returns:
        One loader a split, under the splits' names. Batches are dicts of CPU tensors:
        ``input_ids``, ``attention_mask`` int64 ``(rows, tokens)``; ``labels`` int64 ``(rows,)``,
        or float32 ``(rows,)`` for a regression, ``(rows, classes)`` for multi-label.

    Raises:
        ConfigError: The arguments do not fit the data.
        DataError: A split is empty, labels are missing, text, or beyond the model's classes.

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
    first = max(splits.values(), key=lambda split: split.is_train)  # or the first one, if none is
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
                split, labels.task, pad_to_multiple_of or 1, max_tokens, group_by_length
            ),
            max_tokens=max_tokens,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        )
        for key, split in splits.items()
    }


def _lengths(
    split: Split, task: str | None, multiple: int, max_tokens: int | None, group_by_length: bool
) -> Ints | None:
    """Return the number of tokens of each row, int64 ``(rows,)``, if its order depends on them.

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
            f"{asked} needs the lengths of the rows of {split.name}, and it is a stream or has no "
            "column of lists of numbers. Leave it out."
        )
    row = int(lengths.argmin())
    if lengths[row] == 0:
        raise DataError(
            f"Row {row} of {split.name} has no tokens, and would be in a batch with its like. "
            'Filter such rows out: dataset.filter(lambda row: len(row["text"]) > 0).'
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
            "drop_last=True leaves out a batch that is shorter than batch_size, and with "
            "max_tokens batches differ anyway. Leave one of them out."
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
        # With labels of its own it may also make more rows, or fewer, than there were labels.
        left = [name for name in kept if name != label or "labels" not in made]
        return {**{name: rows[name] for name in left}, **made}

    return open_split(split.name, split.rows.map(run, batched=True, remove_columns=list(kinds)))


def _refuse_leftovers(split: Split, columns: Columns, tokenizer: Any) -> None:
    """Refuse text that nothing tokenizes, and labels under a name that does not tell."""
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
    if split.kinds[columns.texts[0]] == "texts":  # or a list of two words would be taken for a pair
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
    """Tokenize a split and prune it; also say what was used and what was left out."""
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
            f"{split.name} has nothing for the model to read, only {', '.join(kinds)}{taker}. "
            "Make the columns that it takes, such as input_ids, with preprocess= or dataset.map."
        )
    note = f"using {', '.join(texts or inputs)}{' -> labels' if 'labels' in kept else ''}"
    if left_out := [name for name in (*raw, *kinds) if name not in (*kept, *texts, label)]:
        note += f"; left out: {', '.join(dict.fromkeys(left_out))}{taker}"
    if label in raw and "labels" not in kinds:
        note += f"; every {label} is -1 (hidden), so it has none"
    return split.select(kept), note


def _in_tables(split: Split, collate_fn: Callable[[Any], Any]) -> Split:
    """Let loaders fetch a split's rows as tables, if what collates them takes tables."""
    if not hasattr(collate_fn, "padded_lengths") or not hasattr(split.rows, "__len__"):
        return split
    from manualloop.data.tables import as_tables

    return split._replace(rows=as_tables(split.rows))
