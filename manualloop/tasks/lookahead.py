"""Whether a model sees the tokens that it is to predict, tried on the model at hand.

Its loss then falls as it learns to copy them. That is so for encoders that are loaded as causal
language models without a causal mask, such as ``BertLMHeadModel`` without ``is_decoder=True``, and
for models of a user's own that lack the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from manualloop.batches import split_batch
from manualloop.errors import ModelError
from manualloop.models import (
    config_of,
    evaluation_mode,
    forward_columns,
    is_sharded,
    model_name,
    unwrap_model,
)
from manualloop.notices import say
from manualloop.objects import remember
from manualloop.tasks.endings import report_untrained_ends
from manualloop.tasks.float32 import in_float32
from manualloop.tasks.isolation import RAISED_BY_MODELS, inputs_of, parts_of_loss
from manualloop.tasks.padding import Cut, part_of
from manualloop.tasks.task import IGNORE_INDEX, infer_task
from manualloop.types import LossFn

_FEW = 8  # labels, of which all may be tokens of the row by chance
_MOST_LABELS = 8
_MOST_BEFORE = 32  # tokens before the first label that is looked at
_ROUNDING = 5e-7  # relative; only experts with other numbers of tokens round at all


def look_at_texts(
    model: nn.Module, batches: Sequence[Any], *, tokenizer: Any = None, loss_fn: Any = None
) -> None:
    """Look at the first window of a language model: what it sees, and whether its texts end.

    Args:
        model: The model.
        batches: The micro-batches.
        tokenizer: The tokenizer that made them; None if it is unknown.
        loss_fn: Function that calls the model; None where it is called with the columns.

    Raises:
        ModelError: The model sees the tokens that it is to predict.
    """
    refuse_lookahead(model, batches, loss_fn)
    report_untrained_ends(model, batches, tokenizer)


def refuse_lookahead(
    model: nn.Module, batches: Sequence[Any], loss_fn: LossFn | None = None
) -> None:
    """Refuse a causal language model that sees the tokens that it is to predict.

    It is tried once with each loss, by changing tokens: nothing before them may change. Of a model
    of the user's own, which may be meant so, it is logged.

    Args:
        model: The model.
        batches: Batches, of which the first with two labels in a row is used.
        loss_fn: Function that calls the model; None where it is called with the columns.

    Raises:
        ModelError: It is a model of transformers, and it sees them.
    """
    function, held = parts_of_loss(loss_fn)
    known, key = _KNOWN.setdefault(unwrap_model(model), set()), (function, *map(ref, held))
    if key in known or is_sharded(model):
        return
    places = (place for batch in batches if (place := _place_in(model, batch)) is not None)
    if (place := next(places, None)) is None:
        return
    known.add(key)
    found = _that_sees(unwrap_model(model, adapters=False), place, loss_fn)
    if found is None:
        return
    if _is_own(found):
        say(_own_message(found))
        return
    known.discard(key)
    raise ModelError(_message(found))


_KNOWN: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


class _Place(NamedTuple):
    """A token that is to be predicted.

    Attributes:
        row: A batch of one row, up to some tokens behind it.
        number: The place of the token in it.
        kept: The labels of the row that are predicted before the token.
    """

    row: dict[str, Any]
    number: int
    kept: Tensor


def _place_in(model: nn.Module, batch: Any) -> _Place | None:
    """Find a token among the labels of a batch, with others before it; None: there is none."""
    ids, labels = (batch.get(n) if isinstance(batch, Mapping) else None for n in _COLUMNS)
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.ndim not in (2, 3):
        return None
    if ids.shape != labels.shape or ids.is_floating_point() or labels.is_floating_point():
        return None
    if (ahead := _distance(model, ids, labels)) is None:
        return None
    first = (slice(None), 0) if ids.ndim == 3 else (slice(None),)  # the better answer of a pair
    for number, own in enumerate(labels[first].cpu()):
        targets = (own != IGNORE_INDEX).nonzero()[:, 0] + ahead
        targets = targets[(targets > 0) & (targets < len(own))][:_MOST_LABELS]
        if len(targets) < 2:
            continue
        begin = max(0, int(targets[0]) - _MOST_BEFORE)
        place = int(targets[len(targets) // 2]) - begin
        row = split_batch(batch, 1)[number]
        cut, shape = Cut(0, slice(begin, int(targets[-1]) + 1)), row["input_ids"].shape
        row = {name: part_of(name, column, shape, cut) for name, column in row.items()}
        kept = row["labels"].clone()
        kept[..., place - ahead :] = IGNORE_INDEX
        return _Place(row, place, kept)
    return None


_COLUMNS = ("input_ids", "labels")


def _distance(model: nn.Module, ids: Tensor, labels: Tensor) -> int | None:
    """Return how far behind a label its token is: 0, or 1 where the labels are shifted already.

    None: the labels are no tokens of the row, or those of a masked model.
    """
    if (task := infer_task(model)) == "causal_lm":
        return 0
    is_label, is_own = labels != IGNORE_INDEX, _is_own(model)
    is_masked = task != "masked_lm" or model_name(model).endswith("ForMaskedLM")
    if (is_masked and not is_own) or int(is_label.sum()) < _FEW:
        return None
    if is_own and bool((~is_label | (labels == ids)).all()):
        return 0
    before, after = is_label[..., :-1], labels[..., :-1] == ids[..., 1:]
    return 1 if bool(before.any()) and bool((after | ~before).all()) else None


def _is_own(model: nn.Module) -> bool:
    """Tell whether the class of a model does not name its task."""
    is_unnamed = infer_task(model) == "single_label_classification"
    return is_unnamed and not model_name(model).endswith("Classification")


def _that_sees(model: nn.Module, place: _Place, loss_fn: LossFn | None) -> nn.Module | None:
    """Return the model whose prediction before a token depends on what follows; None if none does.

    That is the model or one that the loss holds. None also if nothing tells.
    """
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1:
        return None
    device = devices.pop()
    row = {n: c.to(device) if isinstance(c, Tensor) else c for n, c in place.row.items()}
    place = place._replace(row=row, kept=place.kept.to(device))
    put_back = remember({"loss_fn": loss_fn})  # which may count its calls
    try:
        for context in (in_float32(device), nullcontext()):  # some kernels take halves alone
            with (
                suppress(*RAISED_BY_MODELS),  # the pass that follows raises them too
                evaluation_mode(model, device, loss_fn=loss_fn),
                context,
            ):
                return _that_differs(model, place, loss_fn)
    finally:
        put_back()
    return None


def _that_differs(model: nn.Module, place: _Place, loss_fn: LossFn | None) -> nn.Module | None:
    """Return the model whose logits before a token differ with others behind; else by the loss."""
    row, shape = place.row, place.row["input_ids"].shape
    is_seen = False
    for module, columns in _calls_of(model, row, loss_fn).items():
        ids = columns["input_ids"]
        if ids.shape[-1] != shape[-1]:
            continue
        found = [
            _logits_before(module, {**columns, "input_ids": tokens}, place.number)
            for tokens in (ids, _changed(ids, place.number))
        ]
        if found[0] is not None and found[1] is not None:
            is_seen |= module is model
            if _are_apart(found[0], found[1]):
                return module
    if is_seen:
        return None
    call = _loss_of_model if loss_fn is None else loss_fn
    losses = [
        _number_of(call, model, {**row, "input_ids": ids, "labels": labels})
        for ids, labels in (
            (row["input_ids"], place.kept),
            (_changed(row["input_ids"], place.number), place.kept),
            (row["input_ids"], row["labels"]),
        )
    ]
    is_of_labels = not torch.equal(losses[0], losses[2])
    return model if is_of_labels and _are_apart(losses[0], losses[1]) else None


def _changed(ids: Tensor, number: int) -> Tensor:
    """Return tokens of which those of the first row are others from a place on."""
    changed = ids.clone(memory_format=torch.contiguous_format)
    tokens = changed.view(-1, ids.shape[-1])[0, number:]
    tokens.copy_(torch.where(tokens > 0, tokens - 1, 1))
    return changed


def _calls_of(
    model: nn.Module, row: dict[str, Any], loss_fn: LossFn | None
) -> dict[nn.Module, dict[str, Any]]:
    """Return the columns with which a model, and those that a loss holds, are called."""
    if loss_fn is None:
        return {model: dict(inputs_of(model, row))}
    calls: dict[nn.Module, dict[str, Any]] = {}

    def note(module: nn.Module, args: Any, columns: Mapping[str, Any]) -> None:
        call = {**dict(zip(forward_columns(module), args, strict=False)), **columns}
        if isinstance(call.get("input_ids"), Tensor):
            calls[module] = call

    held = [unwrap_model(part, adapters=False) for part in parts_of_loss(loss_fn)[1]]
    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in dict.fromkeys([model, *held])
    ]
    try:
        loss_fn(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _logits_before(module: nn.Module, columns: dict[str, Any], number: int) -> Tensor | None:
    """Return the logits at the places before a token; None where a token has none."""
    outputs = module(**{name: c for name, c in columns.items() if name != "logits_to_keep"})
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    width = columns["input_ids"].shape[-1]
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < width:
        return None
    return logits[:, -width:][:, :number]  # a soft prompt stands before the tokens


def _loss_of_model(model: nn.Module, row: Any) -> Any:
    outputs = model(**inputs_of(model, row))
    return outputs.get("loss") if isinstance(outputs, Mapping) else None


def _number_of(call: Callable[..., Any], model: nn.Module, row: Any) -> Tensor:
    made = call(model, row)
    loss = made[0] if isinstance(made, tuple) else made
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(loss.isfinite()):
        raise ValueError("no loss")
    return loss.detach().flatten()


def _are_apart(one: Tensor, other: Tensor) -> bool:
    size = float(one.abs().max()) or 1.0
    return float((one - other).abs().max()) > _ROUNDING * size


def _message(model: nn.Module) -> str:
    name = model_name(model)
    head = (
        f"{name} sees the tokens that it is to predict: what it makes of a place changes with the "
        "token after it, so that it would learn to copy. "
    )
    if getattr(config_of(model), "is_decoder", None) is False:
        return f"{head}Load it with a causal mask: from_pretrained(name, is_decoder=True)."
    return (
        f"{head}Load a causal language model, AutoModelForCausalLM.from_pretrained(name), or leave "
        "out of the batch what undoes its mask."
    )


def _own_message(model: nn.Module) -> str:
    return (
        f"{model_name(model)} sees the tokens that are its labels: what it makes of a place "
        "changes with the token after it. If it is to predict the next token, it learns to copy: "
        "give its attention a causal mask."
    )
