"""``prepare_dataloaders``: from datasets, raw or tokenized, to one DataLoader per split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from manualloop.arguments import all_at_once, check_arguments, is_count
from manualloop.data.batching import collates_of, problems_of_packing, rows_for, tell_packs
from manualloop.data.collate import require_pad_token, require_tokenizer
from manualloop.data.columns import LABELS
from manualloop.data.files import note_on_sources
from manualloop.data.functions import (
    RAW,
    ByName,
    Functions,
    functions_of,
    number_sources,
    preprocess_all,
    problems_of_cutting,
)
from manualloop.data.kept import (
    KeepingCollate,
    check_kept,
    kept_columns,
    with_raw_labels,
    without_raw,
)
from manualloop.data.labels import BY_TOKEN
from manualloop.data.lengths import lengths_of_rows
from manualloop.data.mapping import AsZerosAndOnes, Copy, Encode, RequireHidden
from manualloop.data.nested import holds_nested
from manualloop.data.notes import notes_on
from manualloop.data.preparation import note_preparation
from manualloop.data.sampler import ordered_loader
from manualloop.data.splits import Split, open_splits, reference_of
from manualloop.data.streamed import TransformedStream, require_one_process
from manualloop.data.tokens import (
    count_cuts,
    refuse_doubled,
    require_tokens,
    tell_lost,
    tell_mixed_padding,
    tell_padding,
    tell_tokens,
)
from manualloop.data.transform import (
    Transform,
    TransformedRows,
    transform_note,
    transformed_rows,
)
from manualloop.data.usage import note_of, taker_of
from manualloop.errors import ConfigError, DataError
from manualloop.models import max_length as model_max_length
from manualloop.notices import say
from manualloop.tasks.names import Naming, name_model, notes_of
from manualloop.tasks.pixels import image_processor
from manualloop.tasks.task import TASKS
from manualloop.types import Origin

if TYPE_CHECKING:
    from manualloop.data.survey import Survey


def prepare_dataloaders(
    datasets: Any,
    tokenizer: Any = None,
    *,
    model: nn.Module | None = None,
    task: str | None = None,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    eval_batch_size: int | None = None,
    max_tokens: int | None = None,
    pack: bool = False,
    group_by_length: bool = False,
    pad_to_multiple_of: int | None = None,
    drop_last: bool = False,
    collate_fn: Callable[[list[Any]], Any] | ByName | None = None,
    preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any]] | ByName | None = None,
    transform: Transform | Mapping[str, Transform] | None = None,
    fill: Mapping[str, Any] | None = None,
    keep: str | Sequence[str] = (),
    num_proc: int | None = None,
    seed: int = 42,
    num_workers: int = 0,
    pin_memory: bool | None = None,
) -> dict[str, DataLoader[Any]]:
    """Turn datasets into DataLoaders of padded batches with the columns that the model takes.

    Text is tokenized, and each batch is padded to its own longest row. Splits whose name begins
    with "train" are shuffled in an order of ``(seed, epoch)``, without a draw from the global
    random generator; the other splits keep the dataset's order. A stream keeps its own order:
    shuffle it with ``dataset.shuffle(buffer_size=...)``. One line reports which columns are used
    and which are dropped. Labels that are hidden, as in the test splits of benchmarks (all of them
    -1, None, NaN or empty), are left out of the batches. All mistakes of all splits are reported
    in one error.

    A label means the same class in all splits and in the model. Strings become numbers, and splits
    that number their classes otherwise are renumbered: as the config of the model does if it has
    names for its classes, else as "train" does. A class that these lack is refused. A model with
    the names LABEL_0, LABEL_1 and so on gets those of the data.

    Args:
        datasets: A ``DatasetDict``, any mapping from split to dataset, or a single dataset, which
            becomes the split "train". A dataset is a ``datasets.Dataset`` or ``IterableDataset``
            as ``load_dataset`` returns it, raw or with ``input_ids``; a ``pandas.DataFrame``; or
            the path of a CSV, TSV, JSON or Parquet file.
        tokenizer: Tokenizer, which also pads, or image processor, which the transforms of images in
            ``manualloop.tasks`` take; None if the rows can be stacked as they are.
        model: Model whose ``forward`` decides which columns are kept. Without it the tokenizer's
            ``model_input_names`` and the labels are kept.
        task: A key of ``manualloop.tasks.task.TASKS``; None infers it from labels and model.
        text_columns: One column of text or a pair; None infers it.
        label_column: Column that the model gets as ``labels``; None uses ``labels``, ``label``, or
            the only column of classes. Lists mean multi-label, and hold 0 and 1 for each class or
            the class numbers or names; -100 leaves a class of a row out. Floats mean a regression.
            Several columns of 0 and 1 are one multi-label target.
        max_length: Number of tokens at which texts are truncated; None uses the limit of tokenizer
            and model. One line reports how many texts are.
        batch_size: Number of rows per batch.
        eval_batch_size: Number of rows per batch in splits that are not shuffled; None uses
            ``batch_size``.
        max_tokens: Most tokens per batch, padding included, which replaces ``batch_size``. Shuffled
            splits are then grouped by length. The loss is weighted by items, so large and small
            batches count correctly.
        pack: Whether the rows of a shuffled split are put one after the other, without padding: a
            batch is one row of at most ``max_tokens`` tokens, with ``position_ids`` that begin at 0
            in each row and without a mask, by which a causal language model keeps the rows apart.
            That is proved before the first update (``manualloop.tasks.check_isolation``). Other
            rows come together in every epoch. Other splits are padded.
        group_by_length: Whether batches of the shuffled splits hold rows of about the same length,
            which saves padding. The order differs from the default one, and is also a function of
            ``(seed, epoch)``.
        pad_to_multiple_of: Number of which each padded length is a multiple.
        drop_last: Whether to drop a shorter last batch of the shuffled splits.
        collate_fn: Function that replaces padding, or a dict of functions by split. It gets rows
            with all columns, without texts that were tokenized and columns that are kept. Collators
            of transformers that mask tokens mask each row of the splits that are not shuffled in
            the same way each time.
        preprocess: Function that replaces tokenization, or a dict of functions by split. It gets a
            batch of rows as they are in the dataset, as from ``dataset.map`` with ``batched=True``,
            and may return ``labels``.
        transform: ``transform(row, generator)`` returns the columns that take the place of the
            row's, or a dict of such functions by split. It is called each time a row is read, after
            tokenization, with all columns of the dataset. What it draws from the ``generator`` is a
            function of seed, epoch and row alone; evaluations take that of epoch 0.
        fill: What an empty cell becomes, by column: ``{"text": ""}``. Empty are None, NaN and the
            empty string. A column of labels that is empty in all rows of a split stays as it is.
        keep: Columns that skip the model, such as ``("id",)``. Batches hold them under their names,
            as lists with the values of the dataset, beside the tensors.
        num_proc: Number of processes that tokenize or preprocess; None: this one alone.
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
    arguments = {name: value for name, value in locals().items() if name not in _OBJECTS}
    with all_at_once() as check:
        check(_check_arguments, **arguments)
        check(check_arguments, *_MAY_BE_NONE, **{**arguments, "keep": 1})  # of another meaning
        check(require_tokenizer, tokenizer)
        if collate_fn is None and not pack:
            check(require_pad_token, tokenizer)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    given = {name: arguments[name] for name in _GIVEN}
    tokenizes = preprocess is None and _reads_text(tokenizer)
    splits, functions, found, naming, opened = _look_at(
        *(datasets, fill or {}, label_column, given, keep),
        tokenizer=tokenizer,
        model=model,
        task=task,
        text_columns=text_columns,
        tokenizes=tokenizes,
    )
    (texts, label), labels = found.columns, found.labels
    encode = _encoder(reference_of(splits), texts, tokenizer, max_length, model, tokenizes)
    used = () if label_column is None or isinstance(label_column, str) else tuple(label_column)
    columns = {key: [name for name in split.kinds if name != RAW] for key, split in splits.items()}
    note = note_on_sources(datasets)
    splits, transformed = _prepare_splits(splits, found, encode, functions, model, used, seed, note)
    makes = tokenizer, labels.task, pad_to_multiple_of, pack, seed, model
    collates, loaders = collates_of(splits, functions, *makes), {}
    labelled = tuple(split.key for key, split in splits.items() if key not in found.hidden)
    with all_at_once(note) as check:
        for key, split in splits.items():
            collate, cut = collates[key], functions[key].cut
            sizes = pad_to_multiple_of or 1, max_tokens, group_by_length, functions[key]
            lengths = check(lengths_of_rows, split, texts, labels.task, keep, *sizes)
            rows: Any = transformed.get(key) or rows_for(collate, split, seed)
            if kept := kept_columns(split, functions[key], label, key in transformed):
                collate = KeepingCollate(collate, kept)
            check(require_one_process, rows, num_workers)
            hidden, maker = found.hidden.get(key), functions[key].maker_of(split, rows, model)
            origin = label or "labels", split.key, labelled, hidden, maker, cut
            rows.origin_of_labels = Origin(*origin)
            rows.split_notes = notes_on(split, encode, naming.names, found, columns[key])
            loaders[key] = check(
                ordered_loader,
                rows,
                split.name,
                batch_size if split.is_train else eval_batch_size or batch_size,
                shuffle=split.is_train,
                drop_last=drop_last and split.is_train,
                seed=seed,
                lengths=lengths,
                max_tokens=max_tokens,
                tells_epoch=key in transformed,
                packs=pack and split.is_train,
                collate_fn=collate,
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            )
    note_preparation(loaders, datasets, opened, found, naming, encode, arguments)
    name_model(model, naming)
    tell_mixed_padding(model, loaders.values(), tokenizer, pad_to_multiple_of or 1)
    return _finished(loaders, tokenizer)


def _reads_text(tokenizer: Any) -> bool:
    return tokenizer is not None and image_processor(tokenizer) is None


def _finished(loaders: dict[str, DataLoader[Any]], tokenizer: Any) -> dict[str, DataLoader[Any]]:
    """Report on loaders, and let each know the tokenizer and the notes on all splits."""
    tell_packs(loaders)
    tell_padding(loaders.values())
    splits = {str(name): notes_of(loader) for name, loader in loaders.items()}
    for loader in loaders.values():
        loader.__dict__.update(tokenizer=tokenizer, splits=splits)
    return loaders


_OBJECTS = ("datasets", "tokenizer")
_GIVEN = ("preprocess", "transform", "collate_fn", "num_proc", "pack")
_MAY_BE_NONE = ("model", "text_columns", "label_column", "fill")
_COUNTS = (
    *("batch_size", "eval_batch_size", "max_length", "max_tokens", "num_proc"),
    "pad_to_multiple_of",
)


def _check_arguments(task: str | None, drop_last: bool, keep: Any, **arguments: Any) -> None:
    problems = [
        f"{name} must be a whole number of at least 1, got {arguments[name]!r}."
        for name in _COUNTS
        if not is_count(arguments[name]) and (arguments[name] is not None or name == "batch_size")
    ]
    names = (keep,) if isinstance(keep, str) else keep
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        problems.append(f"keep must be a name or a list of names, got {keep!r:.60}.")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        problems.append(f"task={task!r} is unknown. Use one of: {', '.join(TASKS)}.")
    if drop_last and arguments["max_tokens"] is not None:
        problems.append(
            "drop_last=True drops a last batch with fewer rows than batch_size, but with "
            "max_tokens batches have no fixed number of rows. Remove one of the two arguments."
        )
    problems += problems_of_cutting(arguments)
    problems += problems_of_packing(arguments) if arguments["pack"] else []
    if problems:
        raise ConfigError("\n".join(problems))


def _look_at(
    datasets: Any,
    fill: Mapping[str, Any],
    label_column: str | Sequence[str] | None,
    given: Mapping[str, Any],
    keep: tuple[str, ...],
    **choices: Any,
) -> tuple[dict[Any, Split], dict[Any, Functions], Survey, Naming, dict[Any, Split]]:
    """Open all splits, make the changes that the user asked for, and judge what they hold."""
    # Here, because they load pyarrow, which importing the package must not.
    from manualloop.data.cells import fill_cells, one_label_column
    from manualloop.data.classes import columns_in_order, number_classes
    from manualloop.data.fitting import fit_transforms
    from manualloop.data.survey import Choices, survey

    fitted = Naming()
    with all_at_once(note_on_sources(datasets)) as check:
        opened = splits = open_splits(datasets, check)
        if splits:
            splits = fill_cells(splits, fill, label_column, check)
            label_column = columns_in_order(label_column, choices["model"], check)
            splits, label = one_label_column(splits, label_column, keep, check)
            of_model = choices["tokenizer"], choices["model"]
            functions = functions_of(splits, given, keep, *of_model, check)
            sources = Naming()
            if check.ok:
                splits, functions, fitted = fit_transforms(splits, functions, *of_model, check)
            if given["preprocess"] is not None and check.ok:
                of_classes = choices["model"], choices["task"]
                splits, functions, sources = number_sources(splits, functions, *of_classes)
                splits = preprocess_all(splits, functions, label)
                label = "labels" if "labels" in reference_of(splits).kinds else label
            tell_tokens(splits, choices["tokenizer"], choices["model"])
            of_first = functions[next(k for k, s in splits.items() if s is reference_of(splits))]
            if holds_nested(reference_of(splits)):
                choices["task"] = choices["task"] or "causal_lm"
            if choices["model"] is None:
                choices["task"] = choices["task"] or getattr(of_first.preprocess, "of_task", None)
            number = partial(
                number_classes,
                column=label,
                model=choices["model"],
                task=choices["task"],
                check=check,
                keeps_text=of_first.collate_fn is not None,
                joined=() if isinstance(label_column, str) else tuple(label_column or ()),
            )
            numbered, naming = number(splits)
            if (raw := with_raw_labels(splits, numbered, label, functions)) is not None:
                numbered, naming = number(raw)
            splits, naming = numbered, naming if sources.names is None else sources
            chosen = Choices(
                **{**choices, "label_column": label, "keep": keep, "naming": naming},
                may_be_text=of_first.collate_fn is not None or of_first.transform is not None,
                is_padded=not of_first.are_given,
            )
            found = survey({k: without_raw(s) for k, s in splits.items()}, chosen, check)
            check(check_kept, splits, keep, *of_model, found.columns)
    return splits, functions, found, naming if fitted.names is None else fitted, opened


def _encoder(
    split: Split,
    texts: tuple[str, ...],
    tokenizer: Any,
    max_length: int | None,
    model: nn.Module | None,
    tokenizes: bool,
) -> Encode | None:
    if not texts or not tokenizes:
        return None
    if max_length is None and model is not None and (room := model_max_length(model)) is not None:
        max_length = min(room, getattr(tokenizer, "model_max_length", room))
    options = {"truncation": True, "max_length": max_length}
    if split.kinds[texts[0]] == "texts":  # a list of two words would else count as a pair
        options["is_split_into_words"] = True
    return Encode(tokenizer, texts, options)


def _prepare_splits(
    splits: Mapping[Any, Split],
    found: Survey,
    encode: Encode | None,
    functions: Mapping[Any, Functions],
    model: nn.Module | None,
    used: Sequence[str],
    seed: int,
    note: str,
) -> tuple[dict[Any, Split], dict[Any, TransformedRows | TransformedStream]]:
    """Tokenize and prune all splits, try the transforms, and report which columns are used.

    Returns:
        The splits, and the rows of those that are transformed.
    """
    prepared: dict[Any, Split] = {}
    transformed: dict[Any, TransformedRows | TransformedStream] = {}
    notes: dict[str, list[str]] = {}
    with all_at_once(note) as check:
        for key, split in splits.items():
            raw = [name for name in split.kinds if name not in used]
            hidden = found.hidden.get(key)
            made = check(_prepare_split, split, found, encode, functions[key], model, hidden)
            if made is None:
                continue
            prepared[key] = made
            if functions[key].transform is None:
                note = note_of(raw, made, found, functions[key], model, hidden)
            else:
                rows = transformed_rows(made, functions[key], found, hidden, seed)
                note = check(transform_note, rows, found, taker_of(model), hidden)
                transformed[key] = TransformedStream(made.rows, rows) if made.is_stream else rows
            notes.setdefault(note, []).append(split.name)
    for note, names in notes.items():
        say(f"{', '.join(names)}: {note}")
    tell_lost(prepared.values(), encode, found.labels.task)
    for key, split in prepared.items():
        kinds, stays = split.kinds, functions[key].stays
        prepared[key] = split.select([name for name in kinds if stays(name, kinds[name])])
    return prepared, transformed


def _prepare_split(
    split: Split,
    found: Survey,
    encode: Encode | None,
    functions: Functions,
    model: nn.Module | None,
    hidden: str | None,
) -> Split:
    """Name the labels, tokenize, and check what came of it."""
    from manualloop.data.survey import check_answers, check_inputs

    texts, labels = found.columns.texts, found.labels
    takes = functions.takes
    stored = functions.keep if functions.transform is None else tuple(split.kinds)
    split = _name_labels(split, found, hidden, stored)
    if encode is not None:
        kinds, stays = split.kinds, functions.stays
        split = split.select([name for name in kinds if name in texts or stays(name, kinds[name])])
        run = replace(encode, stream=split.name, key=split.key) if split.is_stream else encode
        left = [name for name in texts if name not in stored]
        made = split.map(run, remove=left, num_proc=functions.num_proc)
        raw, split = split, count_cuts(made)
        require_tokens(raw, split, encode)
        refuse_doubled(raw, split, encode)
    check_inputs(split, by_token=labels.task in BY_TOKEN)
    split = check_answers(split, getattr(functions.preprocess, "label_column", None))
    kinds = split.kinds
    is_taken = [name for name in kinds if takes(name, kinds[name]) and name != "labels"]
    if functions.transform is None and not is_taken:
        raise DataError(
            f"{split.name} has no column that the model takes, only {', '.join(kinds)}"
            f"{taker_of(model)}. "
            "Add the columns that it takes, such as input_ids, with preprocess= or dataset.map."
        )
    return split


def _name_labels(split: Split, found: Survey, hidden: str | None, keep: tuple[str, ...]) -> Split:
    """Name the labels ``labels``; drop hidden ones, and columns that collators take for labels.

    A column of labels that is kept is not copied if its values are those of ``labels``.
    """
    column, kinds = found.columns.label, split.kinds
    if column is None:
        return split
    others = [n for n in kinds if n in keep or (n != column and n not in LABELS)]
    if hidden is not None and split.is_stream:
        without = split.fix(f'remove_columns("{column}")')
        run = RequireHidden(split.name, column, f"To predict all rows: {without}.")
        split = split.select([*others, *({column} - {*others})]).map(run)
    if column not in kinds or hidden is not None:
        return split.select(others)
    others = [name for name in others if name != column]
    if column != "labels" or len(others) + 1 < len(kinds):
        split = split.select([*others, column])
    if column != "labels":
        split = split.rename(column, "labels")
    if found.labels.are_listed:
        if column in keep and RAW not in kinds:
            split = split.map(Copy("labels", column))
        split = split.map(AsZerosAndOnes(found.labels.num_classes or 0))
    return split
