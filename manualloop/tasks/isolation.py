"""Whether a model keeps apart the documents of one sequence, proved on the model at hand.

Documents are packed one after the other, and ``position_ids`` begin anew in each. transformers
keeps them apart by that if there is neither a mask nor a cache. Some models never do: those that
make their positions themselves, and those with a recurrent state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import model_inputs, split_batch
from manualloop.errors import ModelError
from manualloop.libraries import attention_of
from manualloop.models import (
    coarsest_dtype,
    config_of,
    evaluation_mode,
    forward_columns,
    is_sharded,
    model_name,
    unwrap_model,
    vocab_size,
)
from manualloop.notices import say
from manualloop.tasks.positions import report_positions
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.types import LossFn

_LENGTHS = (5, 1, 7, 3)
_MOST = 16  # tokens of a document that are looked at
_MARKS = ("position_ids", "seq_idx", "cu_seq_lens_q")  # by which documents may be told apart

# Largest relative difference that rounding makes between a document in a pack and alone. Parts of
# many models compute in float32, whatever their dtype.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 5e-3}


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What became of documents in a pack. Prints as a line.

    Attributes:
        difference: Largest difference between the logits of a document in a pack and alone,
            relative to the largest logit.
        leak: Largest difference that other tokens in the documents before it make, relative.
        is_isolated: Whether both are no more than rounding.
    """

    difference: float
    leak: float
    is_isolated: bool

    def __str__(self) -> str:
        verdict = "are kept apart" if self.is_isolated else "are NOT kept apart"
        return (
            f"Documents in a pack {verdict}: the logits differ by {self.difference:.1e} from those "
            f"of the documents alone, and by {self.leak:.1e} with other documents before them."
        )


def check_isolation(model: nn.Module) -> IsolationReport:
    """Compare documents in a pack with the same documents alone.

    The model is called without a mask and without a cache, as in training, in evaluation mode and
    without gradients; modes and random states are left as they were.

    Args:
        model: Language model that takes ``input_ids`` and ``position_ids``.

    Raises:
        ModelError: It takes no ``position_ids``, or has no vocabulary.
    """
    check_arguments(model=model)
    size = vocab_size(model)
    if size is None or "position_ids" not in forward_columns(model):
        raise ModelError(
            f"{model_name(model)} takes no input_ids with position_ids, so documents in a pack "
            "cannot be told apart. Use prepare_dataloaders(..., max_tokens=) without pack."
        )
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(size, (n,), generator=generator) for n in _LENGTHS]
    device = next(model.parameters()).device
    ids = torch.cat(documents)[None].to(device)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(device)
    return _compare(model, {"input_ids": ids, "position_ids": positions}, _LENGTHS)


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """Return the columns that a model is called with: without those that are kept.

    Where documents are told apart by their positions, they are only without a cache.
    """
    is_marked = _is_marked(batch)
    columns = model_inputs(batch)
    if not is_marked or "use_cache" in columns:
        return columns
    if columns.get("attention_mask") is not None or not _takes_cache(model):
        return columns
    return {**columns, "use_cache": False}


def _is_marked(batch: Any) -> bool:
    """Tell whether a batch has a column by which documents may be told apart."""
    if type(batch) is not dict and not isinstance(batch, Mapping):
        return False
    return "position_ids" in batch or "seq_idx" in batch or "cu_seq_lens_q" in batch


def _takes_cache(model: nn.Module) -> bool:
    known = _known(model)
    if "takes a cache" not in known:
        known["takes a cache"] = "use_cache" in forward_columns(model)
    return known["takes a cache"]


def _known(model: nn.Module) -> dict[Any, bool]:
    return _KNOWN.setdefault(unwrap_model(model), {})


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


class _Packed(NamedTuple):
    """A row of a batch in which documents are packed.

    Attributes:
        row: Its number.
        starts: The first token of each document.
        end: Number of tokens up to the end of the last one.
    """

    row: int
    starts: list[int]
    end: int


def require_isolation(
    model: nn.Module, batch: Any, inputs: Any, loss_fn: LossFn | None = None
) -> None:
    """Refuse a batch of packed documents that the model would let see each other.

    The model is probed with the first such batch, and remembered. Batches without positions cost
    one look.

    Args:
        model: The model.
        batch: The batch, on the CPU if the loader gave it there.
        inputs: The batch on the model's device.
        loss_fn: Function that calls the model; None where it is called with the columns.

    Raises:
        ModelError: The documents are not kept apart.
    """
    if not _is_marked(batch):
        return
    known, key = _known(model), _key_of(model, batch, loss_fn)
    if "positions" not in known and report_positions(model, batch):
        known["positions"] = True
    if known.get(key) or not isinstance(batch.get("input_ids"), Tensor):
        return
    if (packed := _find_packed(batch)) is None:
        return
    if key not in known:
        inner = model if is_sharded(model) else unwrap_model(model, adapters=False)
        verdict = _probe(inner, inputs, packed, loss_fn)
        if verdict is None:
            return
        known[key] = verdict
    if not known[key]:
        raise ModelError(_message(model, batch, loss_fn))


def _key_of(model: nn.Module, batch: Mapping[str, Any], loss_fn: Any) -> tuple[Any, ...]:
    """Return what decides whether documents are kept apart, besides the model."""
    function, held = parts_of_loss(loss_fn)
    form = tuple(name for name in (*_MARKS, "attention_mask") if batch.get(name) is not None)
    attention = attention_of(config_of(model))
    return form, attention, function, type(model), tuple(map(ref, held))


def parts_of_loss(loss_fn: Any) -> tuple[Any, list[nn.Module]]:
    """Return what tells a ``loss_fn`` from others, and the models that it holds."""
    parts: list[Any] = []
    while isinstance(loss_fn, partial):
        parts += [*loss_fn.args, *loss_fn.keywords.values()]
        loss_fn = loss_fn.func
    parts += getattr(loss_fn, "__dict__", {}).values()
    function = None if loss_fn is None else getattr(loss_fn, "__code__", type(loss_fn))
    return function, [part for part in parts if isinstance(part, nn.Module)]


def _find_packed(batch: Mapping[str, Any]) -> _Packed | None:
    """Find a row of a batch with several documents; None: there is none."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.ndim != 2 or (isinstance(mask, Tensor) and mask.ndim != 2):
        return None  # of a mask with more axes the user knows what it hides
    if isinstance(ends := batch.get("cu_seq_lens_q"), Tensor):
        starts = ends.tolist()
        return _Packed(0, starts[:-1], starts[-1]) if len(starts) > 2 else None
    seq, positions = batch.get("seq_idx"), batch.get("position_ids")
    if isinstance(seq, Tensor) and seq.shape == ids.shape:
        is_start = seq[:, 1:] != seq[:, :-1]
    elif isinstance(positions, Tensor) and positions.shape[-1] == ids.shape[1]:
        positions = positions.reshape(-1, ids.shape[1])[-len(ids) :]
        is_start = positions[:, 1:] != positions[:, :-1] + 1
        is_start = is_start & (positions[:, 1:] <= positions[:, :-1])
    else:
        return None
    is_there = torch.ones_like(ids) if mask is None else mask
    if mask is not None:  # padding has positions that mean nothing
        is_start = is_start & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if not bool(is_start.any()):
        return None
    row = int(is_start.any(1).nonzero()[0, 0])
    there = is_there[row].nonzero()[:, 0].tolist()
    starts = [there[0], *(is_start[row].nonzero()[:, 0] + 1).tolist()]
    return _Packed(row, starts, there[-1] + 1)


def rows_or_documents(batch: Any) -> list[Any]:
    """Return the rows of a batch as batches, or the documents of a pack, which is one row."""
    rows = split_batch(batch, 1)
    if len(rows) > 1:
        return rows
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or "cu_seq_lens_q" in batch or not _is_marked(batch):
        return rows
    if (packed := _find_packed(batch)) is None:
        return rows
    ends = [*packed.starts[1:], packed.end]
    return [
        {
            name: column[..., start:end] if _is_by_token(column, ids) else column
            for name, column in batch.items()
        }
        for start, end in zip(packed.starts, ends, strict=True)
    ]


def _is_by_token(column: Any, ids: Tensor) -> bool:
    return isinstance(column, Tensor) and column.ndim > 1 and column.shape[-1] == ids.shape[1]


def _probe(
    model: nn.Module, inputs: Mapping[str, Any], packed: _Packed, loss_fn: LossFn | None
) -> bool | None:
    """Tell whether the documents of a row are kept apart; None: it could not be found out."""
    try:
        if loss_fn is not None:
            return _is_loss_isolated(model, inputs, packed, loss_fn)
        columns, lengths = _first_documents(inputs, packed)
        return _compare(model, columns, lengths).is_isolated
    except RAISED_BY_MODELS as error:
        say(
            "nothing tells whether the packed documents see each other: the model could not be "
            f"called with two of them ({type(error).__name__}: {error!s:.100}). "
            "manualloop.tasks.check_isolation(model) shows more."
        )
        return None


RAISED_BY_MODELS = (LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be called with the rows of a trial."""


def _first_documents(
    inputs: Mapping[str, Any], packed: _Packed
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the beginnings of the first documents of a row, in the form of the batch."""
    ends = [*packed.starts[1:], packed.end]
    spans = [(a, min(b, a + _MOST)) for a, b in zip(packed.starts, ends, strict=True)][:3]
    lengths = tuple(b - a for a, b in spans)
    columns: dict[str, Any] = {}
    for name in ("input_ids", "position_ids", "seq_idx", "attention_mask"):
        column = inputs.get(name)
        if isinstance(column, Tensor) and column.ndim == 2:
            columns[name] = torch.cat(
                [column[packed.row : packed.row + 1, a:b] for a, b in spans], 1
            )
    if "cu_seq_lens_q" in inputs:
        bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        made = torch.tensor(bounds, dtype=torch.int32, device=columns["input_ids"].device)
        columns |= {"cu_seq_lens_q": made, "cu_seq_lens_k": made}
        columns |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return columns, lengths


def _compare(
    model: nn.Module, columns: Mapping[str, Any], lengths: tuple[int, ...]
) -> IsolationReport:
    """Compare documents in a pack with the same alone, and with others before them."""
    ids = columns["input_ids"]
    with evaluation_mode(model, ids.device):
        together = _logits(model, columns)
        changed = _logits(model, {**columns, "input_ids": _others_before(ids, lengths)})
        apart, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            alone = {
                n: c[:, part] for n, c in columns.items() if n in ("input_ids", "position_ids")
            }
            apart.append(_logits(model, alone))
            start += length
    reference = torch.cat(apart, dim=1)
    scale = float(reference.abs().max()) or 1.0
    last = slice(sum(lengths[:-1]), None)
    difference = float((together - reference).abs().max()) / scale
    leak = float((together - changed)[:, last].abs().max()) / scale
    dtype = coarsest_dtype(model, ids.device, together.dtype)
    is_close = difference <= _ROUNDING.get(dtype, 0.1) and leak <= 4 * _eps(model, dtype)
    if is_close and leak > 4 * torch.finfo(torch.float32).eps:
        is_close = not _reaches_back(model, columns, sum(lengths[:-1]))
    return IsolationReport(difference, leak, is_close)


def _reaches_back(model: nn.Module, columns: Mapping[str, Any], start: int) -> bool:
    """Tell whether the logits of the last document have a gradient at those before it.

    Where a model keeps them apart it is 0, in any precision, though other numbers of tokens among
    the experts round otherwise.
    """
    seen: list[Tensor] = []

    def take(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[-1]

    embedding: Any = getattr(unwrap_model(model), "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module):
        return False
    hook = embedding.register_forward_hook(take)
    try:
        with evaluation_mode(model, columns["input_ids"].device, inference=False):
            last = _logits(model, columns)[:, start:]
            (gradient,) = torch.autograd.grad(last.float().square().sum(), seen[:1])
    finally:
        hook.remove()
    return bool((gradient[:, :start] != 0).any())


def _eps(model: nn.Module, dtype: torch.dtype) -> float:
    """Return the rounding of what other tokens must not change: next to none, in any dtype.

    The same operations on the same numbers round alike. Only experts get other numbers of tokens.
    """
    settings = getattr(config_of(model), "__dict__", {})
    has_experts = any("experts" in n and isinstance(v, int) and v > 1 for n, v in settings.items())
    kinds = (dtype, torch.float32) if has_experts else (torch.float32,)
    return max(torch.finfo(kind).eps for kind in kinds)


def _logits(model: nn.Module, columns: Mapping[str, Any]) -> Tensor:
    outputs = model(**inputs_of(model, columns))
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    logits = getattr(outputs, "last_hidden_state", None) if logits is None else logits
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise TypeError(f"its {type(outputs).__name__} has no logits for each token")
    return logits[:, -columns["input_ids"].shape[1] :]  # a soft prompt stands before the tokens


def _others_before(ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return a pack with other tokens in all documents but the last."""
    changed, before = ids.clone(), sum(lengths[:-1])
    values = torch.unique(ids)
    if len(values) == 1:
        changed[:, :before] = values - 1 if int(values) else values + 1
    else:
        changed[:, :before] = values[
            (torch.searchsorted(values, ids[:, :before]) + 1) % len(values)
        ]
    return changed


def _is_loss_isolated(
    model: nn.Module, inputs: Mapping[str, Any], packed: _Packed, loss_fn: LossFn
) -> bool | None:
    """Tell whether the loss of the last document depends on those before it.

    The labels of all others are left out, so their tokens must not matter.
    """
    labels, ids = inputs.get("labels"), inputs["input_ids"]
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return None
    row, start = packed.row, packed.starts[-1]
    kept = torch.full_like(labels, IGNORE_INDEX)
    kept[row, start + 1 : packed.end] = labels[row, start + 1 : packed.end]
    if not bool((kept != IGNORE_INDEX).any()):
        return None
    changed = ids.clone()
    lengths = (start, packed.end - start)
    changed[row, : packed.end] = _others_before(ids[row : row + 1, : packed.end], lengths)[0]
    found = []
    for tokens in (ids, changed):
        with evaluation_mode(model, ids.device, loss_fn=loss_fn):
            made = loss_fn(model, {**inputs, "labels": kept, "input_ids": tokens})
        loss = made[0] if isinstance(made, tuple) else made
        found.append(float(loss))
    if not all(map(isfinite, found)):
        return None
    dtype = coarsest_dtype(model, ids.device, loss.dtype)
    apart = abs(found[0] - found[1]) / max(abs(found[0]), 1e-30)
    if apart <= 8 * torch.finfo(torch.float32).eps or apart > 8 * _eps(model, dtype):
        return apart <= 8 * torch.finfo(torch.float32).eps
    columns, of_documents = _first_documents(inputs, packed)
    held = [unwrap_model(part, adapters=False) for part in parts_of_loss(loss_fn)[1]]
    return not any(_reaches_back(m, columns, sum(of_documents[:-1])) for m in (model, *held))


def _message(model: nn.Module, batch: Mapping[str, Any], loss_fn: Any) -> str:
    name = model_name(model)
    head = (
        f"The batches pack several documents into one sequence, and {name} lets them see each "
        "other: the loss of one would depend on those before it."
    )
    if loss_fn is not None:
        return (
            f"{head} If loss_fn calls the model with a cache or a mask, leave both out: "
            "model(input_ids=..., position_ids=..., use_cache=False). If it does not, use "
            "prepare_dataloaders(..., max_tokens=) without pack."
        )
    if batch.get("attention_mask") is not None:
        return (
            f"{head} An attention_mask beside position_ids that begin anew undoes them: leave it "
            'out of the batch, batch.pop("attention_mask"), or use prepare_dataloaders(..., '
            "max_tokens=) without pack."
        )
    return (
        f"{head} Use prepare_dataloaders(..., max_tokens=) without pack, which pads rows, or a "
        "model that keeps them apart: manualloop.tasks.check_isolation(model) tells."
    )
