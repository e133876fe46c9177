"""``prepare_dataloaders``: from a dataset, raw or tokenized, to one DataLoader a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from manualloop.data.collate import collate_rows
from manualloop.data.columns import Columns, column_kinds, find_columns, find_label
from manualloop.data.labels import Labels, check_complete, describe_labels, prepare_labels
from manualloop.data.order import OrderedBatchSampler
from manualloop.errors import ConfigError, DataError
from manualloop.models import forward_columns, model_name
from manualloop.models import max_length as model_max_length
from manualloop.notices import say
from manualloop.tasks import LABEL_LIKE, TASKS


class _Plan(NamedTuple):
    """What is done to every split alike."""

    texts: tuple[str, ...]
    labels: Labels
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None
    takes: Callable[[str], bool]
    takes_text: bool  # by a collate_fn of the user's


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
        task: A key of ``manualloop.tasks.TASKS``; None: inferred from the labels and the model.
        text_columns: One column or a pair; None: inferred.
        label_column: Reaches the model as ``labels``; None: ``labels``, ``label``, or the only
            column of classes. Lists are multi-label: of 0 and 1, or of class numbers. Floats are
            a regression.
        max_length: Tokens at which texts are cut; None: what tokenizer and model have room for.
        batch_size: Rows a batch.
        eval_batch_size: Rows a batch of the splits that are not shuffled; None: ``batch_size``.
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
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    splits = _as_splits(datasets)
    if collate_fn is None:
        _require_pad_token(tokenizer)
    takes = _column_filter(tokenizer, model, keep_all=collate_fn is not None)
    if preprocess is not None:
        splits = {
            name: _preprocess(dataset, preprocess, takes, label_column)
            for name, dataset in splits.items()
        }
    first = next((name for name in splits if name.startswith("train")), next(iter(splits)))
    kinds = column_kinds(splits[first])
    if not kinds:
        raise DataError(_NO_ROWS.format(first))
    if preprocess is not None and "labels" in kinds:
        label_column = "labels"
    needs_text = preprocess is None and (tokenizer is not None or collate_fn is None)
    columns = find_columns(first, kinds, text_columns, label_column, needs_text=needs_text)
    if needs_text and columns.texts and tokenizer is None:
        raise DataError(
            f"Column {columns.texts[0]!r} of {first} is still text. Pass the tokenizer: "
            "prepare_dataloaders(dataset, tokenizer)."
        )
    if columns.label is None and preprocess is None and collate_fn is None:
        _refuse_unnamed_label(first, kinds)
    labels = describe_labels(splits[first], columns.label, task, model)
    plan = _Plan(
        columns.texts,
        labels,
        _encoder(tokenizer, columns, max_length, model) if needs_text else None,
        takes,
        takes_text=collate_fn is not None,
    )
    tables: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    for name, dataset in splits.items():
        tables[name], note = _prepare_split(name, dataset, plan, model)
        notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        say(f"{', '.join(names)}: {note}")
    if collate_fn is None:
        collator = _collator(tokenizer, labels.task, pad_to_multiple_of)
        float_labels = labels.task is not None and TASKS[labels.task].float_labels
        collate_fn = partial(collate_rows, collator=collator, float_labels=float_labels)
    options = {
        "collate_fn": collate_fn,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
    }
    return {
        name: _loader(name, table, batch_size, eval_batch_size, drop_last, seed, options)
        for name, table in tables.items()
    }


def _check_arguments(task: str | None, **counts: int | None) -> None:
    problems = [
        f"{name} must be a whole number of at least 1, got {count!r}."
        for name, count in counts.items()
        if count is not None and (not isinstance(count, int) or count < 1)
    ]
    if task is not None and task not in TASKS:
        problems.append(f"task={task!r} is unknown. Use one of: {', '.join(TASKS)}.")
    if problems:
        raise ConfigError("\n".join(problems))


def _require_pad_token(tokenizer: Any) -> None:
    if getattr(tokenizer, "pad_token", 0) is None:
        raise DataError(
            "The tokenizer has no pad token, so batches cannot be padded. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token; model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )


_NO_ROWS = "{} has 0 rows. Check the filter or the name of the split: dataset.num_rows."


def _as_splits(datasets: Any) -> dict[str, Any]:
    splits = dict(datasets) if isinstance(datasets, Mapping) else {"train": datasets}
    if not splits:
        raise DataError("No split was given. Pass load_dataset(...), or a dict of datasets.")
    for name, dataset in splits.items():
        if not hasattr(dataset, "features") or not hasattr(dataset, "map"):
            raise DataError(
                f"{name} is a {type(dataset).__name__}, not a datasets.Dataset. Load files with "
                "datasets.load_dataset, or build one from rows: datasets.Dataset.from_list(rows)."
            )
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise DataError(_NO_ROWS.format(name))
        if getattr(dataset, "format", {}).get("type") == "custom":
            raise DataError(
                f"{name} has a transform, so its columns are not known before it runs. Pass it as "
                "the function that it is: prepare_dataloaders(dataset.with_format(None), "
                "preprocess=transform); or build the loader: DataLoader(dataset, batch_size=8)."
            )
    return {name: _without_format(dataset) for name, dataset in splits.items()}


def _without_format(dataset: Any) -> Any:
    """Undo ``set_format``: rows of plain Python are what tokenizers and collators want."""
    if not hasattr(dataset, "format"):
        return dataset.with_format(None)  # a stream
    kind, columns = dataset.format["type"], dataset.format["columns"]
    if kind is None and len(columns) == len(dataset.column_names):
        return dataset
    return dataset.with_format(None).select_columns(columns)


def _preprocess(
    dataset: Any,
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    takes: Callable[[str], bool],
    label_column: str | None,
) -> Any:
    kinds = column_kinds(dataset)
    label = label_column or find_label(kinds)
    drop = [column for column in kinds if column != label and not takes(column)]
    return dataset.map(function, batched=True, remove_columns=drop)


def _refuse_unnamed_label(split: str, kinds: Mapping[str, str]) -> None:
    suspects = [name for name in kinds if name in LABEL_LIKE]
    if split.startswith("train") and suspects:
        raise DataError(
            f"No label column in {split}. Its columns: {', '.join(kinds)}. Did you mean "
            f'{suspects[0]!r}? Use label_column="{suspects[0]}".'
        )


def _encoder(
    tokenizer: Any, columns: Columns, max_length: int | None, model: nn.Module | None
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
    if not columns.texts or tokenizer is None:
        return None
    if max_length is None and model is not None and (room := model_max_length(model)) is not None:
        max_length = min(room, tokenizer.model_max_length)

    def encode(rows: Mapping[str, Any]) -> Mapping[str, Any]:
        texts = (rows[name] for name in columns.texts)
        encoded: Mapping[str, Any] = tokenizer(*texts, truncation=True, max_length=max_length)
        return encoded

    return encode


def _column_filter(
    tokenizer: Any, model: nn.Module | None, *, keep_all: bool
) -> Callable[[str], bool]:
    if keep_all:
        return lambda name: True
    if model is not None:
        names = {*forward_columns(model), "labels"}
    elif tokenizer is not None:
        extra = ("labels", "start_positions", "end_positions", "position_ids")
        names = {*tokenizer.model_input_names, *extra}
    else:
        return lambda name: True
    return lambda name: name in names


def _prepare_split(
    name: str, dataset: Any, plan: _Plan, model: nn.Module | None
) -> tuple[Any, str]:
    """Tokenize a split and keep what the model takes; also say what was used and left out."""
    texts, label = plan.texts, plan.labels.column
    kinds = column_kinds(dataset)
    if missing := [column for column in texts if column not in kinds]:
        raise DataError(
            f"{name} has no column {missing[0]!r}; it has {', '.join(kinds)}. Give all splits the "
            "same columns, or prepare them one by one."
        )
    for column in texts if hasattr(dataset, "__len__") else ():
        check_complete(name, dataset, column)
    dataset, note = prepare_labels(name, dataset, kinds, plan.labels, may_be_text=plan.takes_text)
    if plan.encode is not None:
        others = [c for c in kinds if c not in (label, "labels") and not plan.takes(c)]
        dataset = dataset.map(plan.encode, batched=True, remove_columns=[*{*others, *texts}])
    produced = column_kinds(dataset)
    kept = [
        column
        for column, kind in produced.items()
        if plan.takes(column) and (kind != "text" or plan.takes_text)
    ]
    inputs = [column for column in kept if column != "labels"]
    taker = "" if model is None else f" (not in {model_name(model)}.forward)"
    if not inputs:
        raise DataError(
            f"{name} has nothing for the model to read, only {', '.join(produced)}{taker}. Make "
            "the columns that it takes, such as input_ids, with preprocess= or dataset.map."
        )
    left_out = [c for c in (*kinds, *produced) if c not in (*kept, *texts, label)]
    if left_out:
        note = f"; left out: {', '.join(dict.fromkeys(left_out))}{taker}{note}"
    target = " -> labels" if "labels" in kept else ""
    return dataset.select_columns(kept), f"using {', '.join(texts or inputs)}{target}{note}"


def _collator(tokenizer: Any, task: str | None, pad_to_multiple_of: int | None) -> Any:
    from transformers import (
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        default_data_collator,
    )

    if not hasattr(tokenizer, "pad_token"):  # None, or a processor of images
        return default_data_collator
    token_labels = task in ("token_classification", "masked_lm", "causal_lm", "seq2seq_lm")
    kind = DataCollatorForTokenClassification if token_labels else DataCollatorWithPadding
    return kind(tokenizer, pad_to_multiple_of=pad_to_multiple_of)


def _loader(
    name: str,
    table: Any,
    batch_size: int,
    eval_batch_size: int | None,
    drop_last: bool,
    seed: int,
    options: dict[str, Any],
) -> DataLoader[Any]:
    is_train = name.startswith("train")
    size = batch_size if is_train or eval_batch_size is None else eval_batch_size
    drop_last = drop_last and is_train
    if not hasattr(table, "__len__"):
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            table, batch_size=size, drop_last=drop_last, generator=generator, **options
        )
    sampler = OrderedBatchSampler(
        len(table), size, shuffle=is_train, seed=seed, drop_last=drop_last, split=name
    )
    if len(sampler) == 0:
        raise DataError(
            f"{name} has {len(table)} rows: with batch_size={size} and drop_last it has 0 batches. "
            "Use drop_last=False or a smaller batch_size."
        )
    return DataLoader(table, batch_sampler=sampler, generator=sampler.generator, **options)
