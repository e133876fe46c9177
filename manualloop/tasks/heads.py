"""What a causal language model computes at its labelled positions, and nowhere else.

The logits of all positions are most of the memory of fine-tuning: 2048 tokens with a vocabulary of
128,000 take 1 GB in float32, several times over. Here the model runs without them, and its head is
applied to the labelled positions, a piece at a time. How a model gets from its head to its loss is
proved on the model at hand before the first loss is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from manualloop.batches import model_inputs
from manualloop.errors import DataError, ManualLoopError, ModelError
from manualloop.internals import children_of, compiled_in_place, compiled_module
from manualloop.models import (
    coarsest_dtype,
    config_of,
    evaluation_mode,
    forward_columns,
    model_name,
    text_config,
    unwrap_model,
)
from manualloop.tasks.float32 import in_float32, not_compiled
from manualloop.tasks.isolation import RAISED_BY_MODELS
from manualloop.tasks.loss import find_loss
from manualloop.tasks.task import IGNORE_INDEX, infer_task
from manualloop.tasks.tokens import is_of_tokens

_PIECE = 2**23
"""Number of logits that are made at a time."""
_MIN_ROWS = 64
_LABELS = ("labels", "shift_labels")


class Head(NamedTuple):
    """How a model makes logits of its last hidden states.

    Attributes:
        module: The output embedding.
        scale: Factor of what that returns.
        cap: Bound that the logits approach, ``cap * tanh(logits / cap)``; None for none.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of some hidden states, in float32 or a higher precision."""
        logits: Tensor = self.module(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Labelled(NamedTuple):
    """The positions of a batch that predict a label.

    Attributes:
        head: The head of the model.
        hidden: Their last hidden states, ``(positions, width)``.
        labels: Their labels.
        places: Their numbers among all ``rows x tokens`` of the batch.
        outputs: Outputs of the model, with the logits of one position alone.
    """

    head: Head
    hidden: Tensor
    labels: Tensor
    places: Tensor
    outputs: Any


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position."""
    return cross_entropy(logits, labels, reduction="none")


def labels_of(batch: Any) -> Tensor:
    """Return for each position the label that it predicts, ``(rows, tokens)``.

    Raises:
        DataError: The batch has no labels.
    """
    shifted = batch.get("shift_labels") if isinstance(batch, Mapping) else None
    if isinstance(shifted, Tensor):
        return shifted
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"The loss of a language model needs a tensor of labels: the batch has {found}. Let "
            "preprocess make them, as manualloop.tasks.chat does."
        )
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def labelled(model: nn.Module, batch: Any) -> Labelled:
    """Run a model on a batch without its labels; return its labelled positions.

    The model is called as a whole, so that its wrappers see the pass: those of ranks, of adapters,
    of compiled models.

    Args:
        model: A causal language model of transformers, wrapped or not.
        batch: Columns that the model takes, and ``labels`` or ``shift_labels``.

    Raises:
        DataError: The batch has no labels.
        ModelError: The model's own loss is another than the one its head gives.
    """
    labels = labels_of(batch)
    head = proved_head(model, batch)
    places = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]  # waits for the device, once
    hidden, outputs = hidden_states(model, batch, labels.shape[-1])
    return Labelled(head, hidden.flatten(0, -2)[places], labels.flatten()[places], places, outputs)


def hidden_states(model: nn.Module, batch: Any, num_tokens: int) -> tuple[Tensor, Any]:
    """Return what the head of a model gets, ``(rows, tokens, width)``, and the model's outputs.

    The head is called for one position of each row, so that the model runs to its end.
    """
    inputs = {name: c for name, c in model_inputs(batch).items() if name not in _LABELS}
    inputs |= _without_cache(model)
    if _is_compiled(model):  # with a hook that it would keep
        _require_states(model, inputs)
        outputs = model(**inputs, output_hidden_states=True, logits_to_keep=1)
        seen = list(getattr(outputs, "hidden_states", None) or ())
    else:
        seen = []

        def take(module: nn.Module, args: Any) -> Any:
            seen.append(args[0])
            return (args[0][..., -1:, :], *args[1:])

        hook = _output_embedding(model).register_forward_pre_hook(take)
        try:
            outputs = model(**inputs)
        finally:
            hook.remove()
    if not seen or not isinstance(seen[-1], Tensor):
        raise ModelError(_unknown_message(model, "its head is not called with hidden states"))
    return seen[-1][..., -num_tokens:, :], outputs  # a soft prompt stands before the tokens


_STATES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _require_states(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse a compiled model whose head gets other states than the last of its outputs."""
    inner = unwrap_model(model, adapters=False)
    if _STATES.get(inner):
        return
    seen: list[Tensor] = []
    hook = _output_embedding(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with evaluation_mode(inner, next(inner.parameters()).device), not_compiled():
            states = inner(**inputs, output_hidden_states=True).hidden_states
    finally:
        hook.remove()
    if not seen or not states or not torch.equal(seen[-1], states[-1]):
        raise ModelError(
            _unknown_message(
                model, "compiled, it shows other states than its head gets. Leave it uncompiled"
            )
        )
    _STATES[inner] = True


def _output_embedding(model: nn.Module) -> nn.Module:
    find: Any = getattr(unwrap_model(model, adapters=False), "get_output_embeddings", None)
    module = None if find is None else find()
    if not isinstance(module, nn.Module):
        raise ModelError(_unknown_message(model, "it has no output embedding"))
    return module


def _is_compiled(model: nn.Module | None) -> bool:
    """Tell whether a model is compiled as a whole, under its wrappers."""
    while model is not None:
        children = children_of(model)
        if compiled_in_place(model) or compiled_module(model, children) is not None:
            return True
        wraps = type(model).__name__.startswith(_WRAPPERS) or hasattr(model, "peft_config")
        inner = children.get("module") or children.get("base_model") or children.get("model")
        model = inner if wraps else None
    return False


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the option by which a model keeps no keys and values, if it has one."""
    inner = unwrap_model(model)
    if (options := _OPTIONS.get(inner)) is None:
        takes = "use_cache" in forward_columns(inner)
        _OPTIONS[inner] = options = {"use_cache": False} if takes else {}
    return options


_OPTIONS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def in_pieces(function: Callable[..., Tensor], heads: tuple[Head, ...], *columns: Tensor) -> Tensor:
    """Return a number for each position, of logits that are never there all at once.

    The logits of each piece are made again for its backward pass, except those of the last one,
    which comes first there.

    Args:
        function: Function of the logits of each head, and of the other columns of a piece.
        heads: The heads of as many first columns, which are hidden states.
        columns: Tensors with one entry for each position.
    """

    def of_piece(*parts: Tensor) -> Tensor:
        logits = [head.logits(part) for head, part in zip(heads, parts, strict=False)]
        return function(*logits, *parts[len(heads) :])

    width = max(map(_vocabulary, heads))
    size = max(_PIECE // width, _MIN_ROWS)
    pieces = list(zip(*(torch.split(column, size) for column in columns), strict=True))
    draws = any(type(head.module) is not nn.Linear for head in heads)  # an adapter may have dropout
    remade = [
        checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=draws)
        if torch.is_grad_enabled()
        else of_piece(*piece)
        for piece in pieces[:-1]
    ]
    return torch.cat([*remade, of_piece(*pieces[-1])])


class RowLogps(NamedTuple):
    """Log-probabilities of the labelled tokens of rows.

    Attributes:
        sums: Their sum in each row.
        counts: Their number in each row.
        outputs: Outputs of the model.
    """

    sums: Tensor
    counts: Tensor
    outputs: Any


def row_logps(
    model: nn.Module, batch: Any, losses: Callable[..., Tensor] = token_losses
) -> RowLogps:
    """Return the log-probability of the labelled tokens of each row.

    Args:
        model: A causal language model of transformers, wrapped or not.
        batch: Rows with labels, as for ``labelled``.
        losses: The negative log-probability of each label, given logits and labels.
    """
    head, hidden, labels, places, outputs = labelled(model, batch)
    found = in_pieces(losses, (head,), hidden, labels)
    shape = labels_of(batch).shape
    flat = found.new_zeros(shape.numel())
    each = flat.index_put((places,), -found).view(shape)  # a sum over an axis has one order
    counts = flat.index_fill(0, places, 1).view(shape)
    return RowLogps(each.sum(-1), counts.sum(-1), outputs)


def _vocabulary(head: Head) -> int:
    return int(getattr(head.module, "out_features", 0) or _weight_rows(head.module))


def _weight_rows(module: nn.Module) -> int:
    return max((len(weight) for weight in module.parameters() if weight.ndim == 2), default=1)


class _Proof(NamedTuple):
    """What a proof holds for: another head, or other settings of it, are proved again."""

    module: Any
    scale: float
    cap: float | None
    balances: object


_PROVED: WeakKeyDictionary[nn.Module, _Proof] = WeakKeyDictionary()


def proved_head(model: nn.Module, batch: Any) -> Head:
    """Return the head of a model, once it was proved to give the model's own loss.

    Raises:
        ModelError: It does not, or the model is no causal language model of transformers.
    """
    inner = unwrap_model(model, adapters=False)
    head, balances = _head_of(inner), getattr(config_of(inner), "output_router_logits", None)
    proof = _PROVED.get(inner)
    is_proved = proof is not None and proof.module() is head.module
    if is_proved and proof is not None and proof[1:] == (*head[1:], balances):
        return head
    if _prove(inner, head, batch):
        _PROVED[inner] = _Proof(ref(head.module), *head[1:], balances)
    return head


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def _head_of(model: nn.Module) -> Head:
    config = config_of(model)
    names = [kind.__name__ for kind in type(unwrap_model(model)).__mro__]
    is_causal = any(name.endswith(_CAUSAL) for name in names) or infer_task(model) == "causal_lm"
    if config is None or not is_causal:
        raise ModelError(_unknown_message(model, "it is no causal language model of transformers"))
    texts = text_config(config)
    scale = _number(texts, "logit_scale") or _number(texts, "lm_head_multiplier") or 1.0
    return Head(
        _output_embedding(model),
        scale / (_number(texts, "logits_scaling") or 1.0),
        _number(texts, "final_logit_softcapping") or _number(texts, "logits_soft_cap"),
    )


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


_LARGE = 50.0
"""Largest logit of a proof. A new model has small ones, which a cap leaves as they are."""
_TOLERANCES = {torch.float64: 5e-5, torch.float32: 5e-5}  # transformers' losses are in float32


def _prove(model: nn.Module, head: Head, batch: Any) -> bool:
    """Compare the model's own loss of a few tokens with the one that its head gives.

    Once with the logits as they are, which shows another loss beside it, and once with the logits
    enlarged to what a trained model has, which shows what it does with them. No other pass, no
    random number and no mode depends on the proof.

    Returns:
        Whether there was a token to compare.
    """
    row = _few_tokens(batch)
    labels = labels_of(row)
    kept = labels != IGNORE_INDEX
    if not kept.any():
        return False
    gain = 1.0

    def enlarge(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits * gain

    hook = head.module.register_forward_hook(enlarge)
    try:
        with evaluation_mode(model, labels.device), _widened(model, row):
            hidden = hidden_states(model, row, labels.shape[-1])[0][kept]
            largest = float(head.module(hidden).abs().max())
            tolerance = _TOLERANCES.get(head.module(hidden[:1]).dtype, 2e-2)
            for gain in (1.0, _LARGE / largest if 0 < largest < math.inf else 1.0):
                found = float(token_losses(head.logits(hidden), labels[kept]).double().mean())
                loss = find_loss(model(**model_inputs(row), **_without_cache(model)))
                own = math.nan if loss is None else float(loss)
                if not abs(found - own) <= tolerance * max(abs(own), 1):
                    raise ModelError(_other_message(model, found, own, int(kept.sum()), gain))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ManualLoopError | torch.OutOfMemoryError) or is_of_tokens(error):
            raise
        raise ModelError(
            _unknown_message(model, f"it does not run on a row of the batch ({error!r:.200})")
        ) from error
    finally:
        hook.remove()
    return True


def _widened(model: nn.Module, row: Mapping[str, Any]) -> Any:
    """Return a context in which a proof computes in float32, if the model can be called in it.

    In half precision rounding would hide a loss that is added, such as that of balanced experts.
    """
    device = labels_of(row).device
    is_quantized = getattr(config_of(model), "quantization_config", None) is not None
    if is_quantized or coarsest_dtype(model, device) in (torch.float32, torch.float64):
        return not_compiled()
    try:
        with in_float32(device):
            hidden_states(model, row, 1)
    except RAISED_BY_MODELS:
        return not_compiled()  # of kernels for half precision alone
    return in_float32(device)


def _other_message(model: nn.Module, found: float, own: float, num_tokens: int, gain: float) -> str:
    enlarged = f", with logits enlarged to {_LARGE:g}," if gain != 1 else ""
    return (
        f"The head of {model_name(model)} alone gives a loss of {found:.5f} on {num_tokens} tokens "
        f"of the first batch{enlarged} and the model's own loss is {own:.5f}: it does more with "
        "its logits than multiply or cap them as its config tells, or adds another loss. "
        f"{_FIX}"
    )


_FIX = (
    "Train with the loss that the model returns: leave loss_fn=lm_loss out. For dpo and distil "
    "write a loss_fn that takes the logits from model(**inputs)."
)


def _unknown_message(model: nn.Module, reason: str) -> str:
    return (
        f"The losses of language models apply the head of a model to its last hidden states, and "
        f"for {model_name(model)} that cannot be done: {reason}. {_FIX}"
    )


_NUM_TOKENS = 24
_OF_TOKENS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", *_LABELS}


def _few_tokens(batch: Any) -> dict[str, Any]:
    """Return a few tokens of a row, some with a label; the whole row where there are other inputs.

    It is the row with the most labels.
    """
    at = int((labels_of(batch) != IGNORE_INDEX).sum(-1).argmax())
    row = {name: _row_of(column, at) for name, column in model_inputs(batch).items()}
    ids = row.get("input_ids")
    if not isinstance(ids, Tensor) or not row.keys() <= _OF_TOKENS:
        return row
    begin = 0
    if isinstance(mask := row.get("attention_mask"), Tensor) and mask.shape == ids.shape:
        begin = int(mask[0].ne(0).int().argmax())  # of a row that is padded on the left
    cut = slice(begin, begin + _NUM_TOKENS)
    few = {name: column[..., cut] for name, column in row.items() if name not in _LABELS}
    few["labels"] = few["input_ids"].clone()
    few["labels"][:, : few["labels"].shape[1] // 2] = IGNORE_INDEX
    return few


def _row_of(column: Any, number: int) -> Any:
    if not isinstance(column, Tensor) or not column.ndim:
        return column
    place = slice(number, number + 1)
    return column[:, place] if column.ndim > 2 and column.dtype == torch.int64 else column[place]
