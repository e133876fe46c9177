"""Parts of a script that are tried on the objects of the call: what they make must be the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch

from manualloop.batches import Kept
from manualloop.data.batching import LEARNED
from manualloop.data.collate import padding_collator
from manualloop.data.labels import BY_TOKEN
from manualloop.data.preparation import Preparation
from manualloop.models import accepts
from manualloop.script.job import Job


def needs_floats(job: Job) -> bool:
    """Tell whether a script has to make numbers of classes, for a loss that compares numbers."""
    feature: Any = job.loader.dataset.features.get("labels")
    while getattr(feature, "feature", None) is not None:
        feature = feature.feature
    is_float = str(getattr(feature, "dtype", "")).startswith(("float", "double"))
    return job.task.rules.float_labels and not is_float


def problems_of_batches(job: Job, name: str, loader: Any, made: Preparation) -> Iterator[str]:
    """Yield how the first batch of a loader differs from the one that the script makes of its rows.

    Args:
        job: The call, whose loader was made with the collator of the script.
        name: Name of the loader in messages.
        loader: A prepared loader.
        made: How it was made.
    """
    numbers = loader.batch_sampler.batches(0)[0]
    ours = loader.collate_fn(loader.dataset.__getitems__(numbers))
    ours = {key: column for key, column in ours.items() if not isinstance(column, Kept)}
    columns = [key for key in loader.dataset.column_names if key not in made.kept]
    rows = [{key: loader.dataset[number][key] for key in columns} for number in numbers]
    try:
        theirs = dict(_collate(job)(rows))
    except Exception as error:  # whatever a collator raises, the script would raise it
        yield f"{name} cannot be read by the lines of a script: {error!r:.200}. {TOGETHER}"
        return
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key not in theirs or key not in ours or not _are_same(ours[key], theirs[key]):
            yield (
                f"{key!r} in the first batch of {name} is another than a script would make of the "
                f"same rows. {TOGETHER}"
            )
            return


TOGETHER = (
    "Prepare both loaders in one call of prepare_dataloaders, and leave them as they are; or build "
    "the loader yourself: a script then asks for it."
)


def _are_same(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    return one.dtype == other.dtype and torch.equal(one, other)


def _collate(job: Job) -> Any:
    """Build the collator that the script has."""
    made: Any = job.preparation
    tokenizer: Any = getattr(job.loader, "tokenizer", None)
    if tokenizer is not None and tokenizer.padding_side == "left" and is_learned(job, made):
        tokenizer = copy(tokenizer)
        tokenizer.padding_side = "right"
    collator = padding_collator(tokenizer, made.task, made.pad_to_multiple_of)
    if tokenizer is None:
        return collator

    def collate(rows: list[Any]) -> Mapping[str, Any]:
        batch = dict(collator(rows))
        if needs_floats(job):
            batch["labels"] = batch["labels"].float()
        if not accepts(job.model, "attention_mask"):
            del batch["attention_mask"]
        return batch

    return collate


def is_learned(job: Job, made: Preparation) -> bool:
    """Tell whether rows are padded on the right, whatever the side of the tokenizer."""
    return made.task in LEARNED and "labels" in job.loader.dataset.column_names


def problems_of_grouping(job: Job, made: Preparation) -> Iterator[str]:
    """Yield that the script would count other tokens, by which the rows are grouped."""
    sampler, rows = job.loader.batch_sampler, job.loader.dataset
    if sampler.lengths is None or not sampler.shuffle:
        return
    names = grouped_columns(made)
    lengths = [
        max(len(row[name]) for name in names if name in row)
        for row in rows.select_columns([name for name in names if name in rows.column_names])
    ]
    multiple = made.pad_to_multiple_of or 1
    if [-(-length // multiple) * multiple for length in lengths] != list(sampler.lengths):
        yield (
            "group_by_length=True of rows with several lists of tokens is not written out. Prepare "
            "the loader without it."
        )


def grouped_columns(made: Preparation) -> list[str]:
    """Return the columns whose lengths decide how rows are grouped."""
    return ["input_ids", *(["labels"] if made.task in (*BY_TOKEN, "seq2seq_lm") else [])]


def stored_tokenizer(tokenizer: Any) -> Any:
    """Load the tokenizer that a script loads; None if it is not on this disk."""
    try:
        return type(tokenizer).from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except Exception:  # of many classes: there is nothing to compare with
        return None


def is_stored(tokenizer: Any, stored: Any) -> bool:
    """Tell whether a tokenizer makes of a text what another one does.

    It may have been given tokens since it was loaded. What each call says itself, and what a script
    sets, does not count.
    """
    return bool(_facts_of(tokenizer) == _facts_of(stored))


def _facts_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab()
    if backend is not None:
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    special = dict(tokenizer.special_tokens_map)
    if tokenizer.pad_token == tokenizer.eos_token:
        special.pop("pad_token", None)
    return state, special, tokenizer.model_input_names
