"""``prepare_dataloaders``: from a dataset, raw or tokenized, to one DataLoader a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from manualloop.data.collate import collate_rows
from manualloop.data.columns import Columns, column_kinds, find_columns
from manualloop.data.labels import check_class_ids
from manualloop.data.order import OrderedBatchSampler
from manualloop.errors import ConfigError, DataError
from manualloop.models import forward_columns, model_name, num_labels
from manualloop.models import max_length as model_max_length
from manualloop.notices import say
from manualloop.tasks import LABEL_LIKE, TASKS, infer_task


class _Plan(NamedTuple):
    """What is done to every split alike."""

    columns: Columns
    task: str | None
    num_classes: int | None  # of labels that are lists of class numbers
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None
    takes: Callable[[str], bool]


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
    without a draw from the global random generator; the others keep the dataset's order. Which
    columns were taken for what is said once.

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
        collate_fn: Replaces padding; all columns then reach it.
        preprocess: Replaces tokenization: a function of a batch of rows, as ``dataset.map``
            calls it with ``batched=True``.
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
    ([[5, 6], [7, 8]], [0, 1])
    """
    splits = _as_splits(datasets)
    if task is not None and task not in TASKS:
        raise ConfigError(f"task={task!r} is unknown. Use one of: {', '.join(TASKS)}.")
    if collate_fn is None and tokenizer is not None and getattr(tokenizer, "pad_token", 0) is None:
        raise DataError(
            "The tokenizer has no pad token, so batches cannot be padded. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token; model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )
    first = next((name for name in splits if name.startswith("train")), next(iter(splits)))
    kinds = column_kinds(splits[first])
    columns = find_columns(first, kinds, text_columns, label_column)
    if columns.texts and tokenizer is None and preprocess is None:
        raise DataError(
            f"Column {columns.texts[0]!r} of {first} is still text. Pass the tokenizer: "
            "prepare_dataloaders(dataset, tokenizer)."
        )
    if columns.label is None and preprocess is None and collate_fn is None:
        _refuse_unnamed_label(first, kinds)
    task = task or _infer_task(splits[first], columns, model)
    plan = _Plan(
        columns,
        task,
        _num_listed_classes(splits[first], columns, task, model),
        preprocess or _encoder(tokenizer, columns, max_length, model),
        _column_filter(tokenizer, model, keep_all=collate_fn is not None),
    )
    tables: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    for name, dataset in splits.items():
        tables[name], note = _prepare_split(name, dataset, plan, model)
        notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        say(f"{', '.join(names)}: {note}")
    if collate_fn is None:
        collator = _collator(tokenizer, task, pad_to_multiple_of)
        float_labels = task is not None and TASKS[task].float_labels
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
            raise DataError(
                f"{name} has 0 rows. Check the filter or the name of the split: dataset.num_rows."
            )
    return splits


def _refuse_unnamed_label(split: str, kinds: Mapping[str, str]) -> None:
    suspects = [name for name in kinds if name in LABEL_LIKE]
    if split.startswith("train") and suspects:
        raise DataError(
            f"No label column in {split}. Its columns: {', '.join(kinds)}. Did you mean "
            f'{suspects[0]!r}? Use label_column="{suspects[0]}".'
        )


def _infer_task(dataset: Any, columns: Columns, model: nn.Module | None) -> str | None:
    row: dict[str, Any] = next(iter(dataset), {}) if columns.label else {}
    label = row.get(columns.label) if columns.label else None
    if label is None or isinstance(label, str):
        return None  # said by _prepare_split, with the row
    if hasattr(label, "__len__"):
        tokens = row.get("input_ids")
        if tokens is None or len(tokens) != len(label):
            return "multi_label_classification"
        return infer_task(nn.Module() if model is None else model, torch.tensor([list(label)]))
    return infer_task(nn.Module() if model is None else model, torch.tensor([label]))


def _num_listed_classes(
    dataset: Any, columns: Columns, task: str | None, model: nn.Module | None
) -> int | None:
    """Return the number of classes if labels are lists of class numbers, None if of 0 and 1."""
    if task != "multi_label_classification" or columns.label is None or dataset.features is None:
        return None
    feature = dataset.features[columns.label]
    inner: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if hasattr(inner, "names"):
        return len(inner.names)
    labels = dataset.with_format(None)[columns.label] if hasattr(dataset, "__len__") else []
    if len({len(label) for label in labels if label is not None}) < 2:
        return None
    classes = num_labels(model) if model is not None else None
    if classes is None:
        raise DataError(
            f"{columns.label!r} holds lists of different lengths, so they are class numbers, and "
            "how many classes there are is not known. Pass model=, or rows of 0 and 1."
        )
    return classes


def _encoder(
    tokenizer: Any, columns: Columns, max_length: int | None, model: nn.Module | None
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
    if not columns.texts:
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
    texts, label = plan.columns
    kinds = column_kinds(dataset)
    if missing := [column for column in texts if column not in kinds]:
        raise DataError(
            f"{name} has no column {missing[0]!r}; it has {', '.join(kinds)}. Give all splits the "
            "same columns, or prepare them one by one."
        )
    note = ""
    if label is not None and label in kinds:
        if _labels_are_hidden(dataset, label):
            note = f"; every {label} is -1 (hidden), so it has no labels"
            dataset = dataset.remove_columns(label)
        else:
            _check_labels(name, dataset, label, kinds[label], plan, model)
            if label != "labels":
                dataset = dataset.remove_columns("labels") if "labels" in kinds else dataset
                dataset = dataset.rename_column(label, "labels")
            if plan.num_classes is not None:
                dataset = dataset.map(partial(_multi_hot, num_classes=plan.num_classes))
    present = set(column_kinds(dataset))
    if plan.encode is not None:
        drop = [column for column in present if column != "labels" and not plan.takes(column)]
        dataset = dataset.map(plan.encode, batched=True, remove_columns=[*{*drop, *texts}])
    produced = column_kinds(dataset)
    kept = [column for column in produced if plan.takes(column) and produced[column] != "text"]
    left_out = [c for c in (*kinds, *produced) if c not in (*kept, *texts, label)]
    used = ", ".join(texts or [column for column in kept if column != "labels"])
    target = " -> labels" if "labels" in kept else ""
    if left_out:
        taker = f" (not in {model_name(model)}.forward)" if model is not None else ""
        note = f"; left out: {', '.join(dict.fromkeys(left_out))}{taker}{note}"
    return dataset.select_columns(kept), f"using {used}{target}{note}"


def _multi_hot(row: Mapping[str, Any], *, num_classes: int) -> dict[str, list[float]]:
    return {"labels": [float(number in row["labels"]) for number in range(num_classes)]}


def _label_table(dataset: Any, label: str) -> Any:
    return dataset.select_columns([label]).with_format("arrow")[:].column(label)


def _labels_are_hidden(dataset: Any, label: str) -> bool:
    """Tell whether all labels are -1: GLUE's convention for test splits."""
    if not hasattr(dataset, "__len__") or column_kinds(dataset)[label] not in ("int", "class"):
        return False
    import pyarrow.compute as pc

    extremes = pc.min_max(_label_table(dataset, label)).as_py()
    return bool(extremes["min"] == extremes["max"] == -1)


def _check_labels(
    name: str, dataset: Any, label: str, kind: str, plan: _Plan, model: nn.Module | None
) -> None:
    if kind == "text":
        example = next(iter(dataset))[label]
        raise DataError(
            f"{label!r} of {name} holds strings, e.g. {example!r} (row 0). Turn them into class "
            f'numbers: dataset.class_encode_column("{label}").'
        )
    if not hasattr(dataset, "__len__"):
        return  # a stream is checked batch by batch
    labels = _label_table(dataset, label)
    if labels.null_count:
        import pyarrow.compute as pc

        row = pc.index(pc.is_null(labels), True).as_py()
        raise DataError(
            f"Row {row} of {name} has {label}=None; so have {labels.null_count} of {len(dataset)} "
            f'rows. Filter them out: dataset.filter(lambda row: row["{label}"] is not None).'
        )
    classes = num_labels(model) if model is not None else None
    if plan.task == "single_label_classification" and kind in ("int", "class") and classes:
        check_class_ids(labels.to_numpy(), classes, lambda row: f"row {row} of {name}")


def _collator(tokenizer: Any, task: str | None, pad_to_multiple_of: int | None) -> Any:
    from transformers import (
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        default_data_collator,
    )

    if tokenizer is None:
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
