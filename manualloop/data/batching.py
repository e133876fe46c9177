"""How the rows of a split become batches: padded, packed, or by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from manualloop.data.collate import padding_collate_fn
from manualloop.data.functions import Functions
from manualloop.data.masks import RowMasks, masks_rows
from manualloop.data.nested import NestedCollate, holds_nested
from manualloop.data.packing import fill_of
from manualloop.data.sampler import OrderedBatchSampler, packs_rows
from manualloop.data.splits import Split, reference_of
from manualloop.data.transform import TransformedRows
from manualloop.errors import ConfigError
from manualloop.models import accepts
from manualloop.notices import say
from manualloop.tasks.pixels import image_processor


def collates_of(
    splits: Mapping[Any, Split],
    functions: Mapping[Any, Functions],
    tokenizer: Any,
    task: str | None,
    multiple: int | None,
    pack: bool,
    seed: int,
    model: nn.Module | None,
) -> dict[Any, Any]:
    """Return the function of each split that makes a batch of rows.

    Args:
        splits: The splits, prepared.
        functions: The user's functions of each.
        tokenizer: As in ``prepare_dataloaders``.
        task: A key of ``TASKS``; None if it is unknown.
        multiple: Number of which each padded length is a multiple; None: 1.
        pack: Whether the splits that are shuffled are packed.
        seed: Seed of the run.
        model: The model; None if it is unknown.

    Raises:
        ConfigError: Rows of this kind cannot be packed.
    """
    packed = [key for key, split in splits.items() if pack and split.is_train]
    if packed:
        _check_packed({key: splits[key] for key in packed}, functions, task)
    padded = [k for k in splits if functions[k].collate_fn is None and k not in packed]
    pads: dict[Any, Any] = {}
    if padded and tokenizer is not None and holds_nested(reference_of(splits)):
        pads = dict.fromkeys(padded, NestedCollate(tokenizer, multiple))
    elif padded:
        of_images = image_processor(tokenizer) is not None or any(
            hasattr(of_split.transform, "fitted") for of_split in functions.values()
        )
        sides = _sides({k: splits[k] for k in padded}, functions, tokenizer, task)
        makers = {
            id(one): padding_collate_fn(one, task, multiple, of_images=of_images)
            for one in sides.values()
        }
        pads = {key: makers[id(one)] for key, one in sides.items()}
    if model is not None and not accepts(model, "attention_mask"):
        pads = {key: partial(_without_mask, collate=one) for key, one in pads.items()}
    made: dict[Any, Any] = {}
    for key, split in splits.items():
        collate: Any = _packing() if key in packed else functions[key].collate_fn or pads[key]
        is_fixed = not split.is_train and not split.is_stream and masks_rows(collate)
        made[key] = RowMasks(collate, seed) if is_fixed else collate
    return made


def _without_mask(rows: Any, *, collate: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch without the mask that padding adds, for a model that does not take it."""
    batch = collate(rows)
    return {name: column for name, column in batch.items() if name != "attention_mask"}


LEARNED = ("causal_lm", "seq2seq_lm")
"""Tasks whose rows with labels are padded on the right, whatever the side of the tokenizer."""


def _sides(
    splits: Mapping[Any, Split],
    functions: Mapping[Any, Functions],
    tokenizer: Any,
    task: str | None,
) -> dict[Any, Any]:
    """Return the tokenizer by which each split is padded: on the right, if texts are learned.

    Only generation needs the padding on the left. In training some models would number positions
    from it, and the decoder of an encoder-decoder would read it.
    """
    sides = dict.fromkeys(splits, tokenizer)
    if task not in LEARNED or getattr(tokenizer, "padding_side", None) != "left":
        return sides
    learned = [
        key
        for key, split in splits.items()
        if "labels" in split.kinds or functions[key].transform is not None
    ]
    if not learned:
        return sides
    other = copy(tokenizer)
    other.padding_side = "right"
    say(
        f"{', '.join(splits[key].name for key in learned)}: rows with labels are padded on the "
        'right, though tokenizer.padding_side is "left", which only generation needs'
    )
    return sides | dict.fromkeys(learned, other)


def _packing() -> Any:
    from manualloop.data.flat import PackCollate  # loads datasets

    return PackCollate()


def problems_of_packing(arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the arguments of ``prepare_dataloaders`` where rows are packed."""
    problems = []
    if arguments["max_tokens"] is None:
        problems.append("pack=True needs the number of tokens of a pack: max_tokens=4096.")
    if arguments["group_by_length"]:
        problems.append(
            "pack=True leaves no padding that group_by_length=True could save. Remove "
            "group_by_length."
        )
    if arguments["pad_to_multiple_of"] is not None:
        problems.append("pack=True pads nothing: remove pad_to_multiple_of.")
    return problems


def _check_packed(
    splits: Mapping[Any, Split], functions: Mapping[Any, Functions], task: str | None
) -> None:
    """Refuse to pack rows that are not those of a causal language model, or a ``collate_fn``.

    Raises:
        ConfigError: The message tells what to pass instead.
    """
    if any(functions[key].collate_fn is not None for key in splits):
        raise ConfigError(
            "pack=True and collate_fn= both make the batches of the training split. Remove one of "
            "the two arguments; transformers' DataCollatorWithFlattening packs rows, too."
        )
    if holds_nested(reference_of(splits)):
        raise ConfigError(
            "pack=True puts rows one after the other, and each row is several lists of tokens that "
            "are compared. Use max_tokens without pack."
        )
    if task not in (None, "causal_lm"):
        raise ConfigError(
            f"pack=True packs the rows of a causal language model, and these are of a {task}. Use "
            'max_tokens without pack; if the model is one, pass model=model or task="causal_lm".'
        )


def tell_packs(loaders: Mapping[str, DataLoader[Any]]) -> None:
    """Log how many packs the rows of each packed split become, and how full they are."""
    for loader in loaders.values():
        sampler = loader.batch_sampler
        if not packs_rows(loader) or not isinstance(sampler, OrderedBatchSampler):
            continue
        assert sampler.lengths is not None
        assert sampler.max_tokens is not None
        fill = fill_of(sampler.lengths, len(sampler), sampler.max_tokens)
        say(
            f"{sampler.split}: {sampler.num_rows:,} rows in {len(sampler):,} packs of at most "
            f"{sampler.max_tokens} tokens, {100 * fill:.1f}% full"
        )


def rows_for(collate_fn: Any, split: Split, seed: int) -> Any:
    """Return a split's rows as ``collate_fn`` takes them: as tables, with their numbers, or as is.

    Rows that are masked by their numbers know them.
    """
    if isinstance(collate_fn, RowMasks):
        return TransformedRows(split.rows, split.name, seed)
    if split.is_stream:
        return split.rows
    # A table holds an image as bytes.
    if not hasattr(collate_fn, "padded_lengths") or "media" in split.kinds.values():
        return split.rows
    from manualloop.data.tables import as_tables

    return as_tables(split.rows)
