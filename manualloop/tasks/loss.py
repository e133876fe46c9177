"""The loss of a batch as means, each with the number of its items.

Everything that adds up losses (an update, an evaluation, the search for a bad row, a proof) takes
them apart here, whether the model returned the loss, a ``loss_fn`` did, or ``terms``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from manualloop.batches import Kept
from manualloop.errors import ConfigError, DataError, ModelError
from manualloop.mistakes import no_head_message, no_labels_message, no_loss_message
from manualloop.strategy.base import Strategy
from manualloop.tasks.isolation import inputs_of, require_isolation
from manualloop.tasks.lookahead import look_at_texts
from manualloop.tasks.padding import require_padding_unseen
from manualloop.tasks.task import IGNORE_INDEX, Counts
from manualloop.types import Batch, LossFn, Terms

Term: TypeAlias = "tuple[Any, Any]"
"""A mean, and the number of items it is over. A loss is the sum of its terms' means.

The number may be a tensor that was not read yet, and is None if the function that made the loss
counts nothing.
"""


BOTH_GIVEN = (
    "Give loss_fn or terms, not both. terms(outputs, batch) takes apart what model(**batch) "
    "returned; loss_fn(model, batch) calls the model itself, and may return (mean_loss, num_items)."
)


class Loss(NamedTuple):
    """What makes the loss of a run: the model, or a function of the user's. Made by ``loss_of``.

    Attributes:
        loss_fn: As in ``train_steps``.
        terms: As in ``train_steps``, of the model at hand.
        declared: Function that counts the items of a batch, where the user's declares them.
        is_models: Whether the model makes the loss itself.
    """

    loss_fn: LossFn | None = None
    terms: Terms | None = None
    declared: Callable[[Any], Counts] | None = None
    is_models: bool = True


_OF_THE_MODEL = Loss()
ALL_LOOKS = frozenset(("padding", "documents", "kept"))
"""What a batch is looked at for where nothing is known of its columns: see ``Task``."""


def check_loss(loss_fn: LossFn | None, terms: Terms | None) -> None:
    """Refuse two answers to what the loss is.

    Raises:
        ConfigError: Both are given.
    """
    if loss_fn is not None and terms is not None:
        raise ConfigError(BOTH_GIVEN)


def loss_of(model: nn.Module, loss_fn: LossFn | None, terms: Terms | None) -> Loss:
    """Return what makes the loss of a model.

    Raises:
        ConfigError: Both functions are given.
    """
    if loss_fn is None and terms is None:
        return _OF_THE_MODEL
    check_loss(loss_fn, terms)
    terms = of_model(terms, model)
    declared = declared_items(terms if loss_fn is None else loss_fn)
    return Loss(loss_fn, terms, declared, is_models=False)


def of_model(terms: Terms | None, model: nn.Module) -> Terms | None:
    """Return terms that know the model whose outputs they take apart, if they ask for it.

    They do so by an attribute ``of_model``: a function of the model that returns the terms.
    """
    bind = getattr(terms, "of_model", None)
    return terms if bind is None else bind(model)


def means_of(
    model: nn.Module,
    batch: Any,
    inputs: Any,
    counts: Sequence[float],
    loss: Loss,
    *,
    looks: frozenset[str],
) -> list[Term]:
    """Run a micro-batch through the model to train it; return the terms of its loss.

    Args:
        model: The model.
        batch: The batch as the loader gave it.
        inputs: The batch on the model's device.
        counts: The items that were counted in the batch.
        loss: What makes the loss.
        looks: What the batch is looked at for: see ``Task``.

    A mean over no item may be a constant, as that of DeBERTa is: it is left out of the window.

    Raises:
        DataError: The model sees the padding, or the batch has no labels.
        ModelError: The model sees the other documents of a sequence, or there is no loss.
    """
    if "documents" in looks:
        require_isolation(model, batch, inputs, loss.loss_fn)
    if "padding" in looks:
        require_padding_unseen(model, batch, inputs, loss.loss_fn)
    found = loss_terms(model, inputs, counts, loss.loss_fn, loss.terms, looks=looks)
    means = []
    for place, (mean, num_items) in enumerate(found):
        is_constant = not (isinstance(mean, Tensor) and mean.requires_grad)
        if is_constant and num_items is None:
            counts = counts if loss.declared is None else loss.declared(batch)
            num_items = counts[place] if place < len(counts) else None
        is_left_out = is_constant and num_items is not None and bool(num_items == 0)
        means.append((require_mean(mean, trains=not is_left_out), num_items))
    return means


def loss_terms(
    model: nn.Module,
    batch: Any,
    counts: Sequence[float],
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    *,
    looks: frozenset[str] = ALL_LOOKS,
) -> list[Term]:
    """Run a batch through the model, and return the terms of its loss.

    Args:
        model: Called as ``model(**batch)``, unless there is a ``loss_fn``.
        batch: A batch on the model's device.
        counts: The items that ``Task.count`` found in the batch.
        loss_fn: As in ``train_steps``; None for the loss that the model returns.
        terms: As in ``train_steps``.
        looks: What the batch has to be looked at for: see ``Task``.

    Raises:
        ModelError: The model returned no loss, or a function something that is none; the message
            tells why and what to do.
        DataError: The batch has no labels.
    """
    if loss_fn is not None:
        try:
            return own_terms(_call(loss_fn, model, batch))
        except TypeError as error:
            explain_kept(error, batch)
            raise
    is_called_as_is = looks.isdisjoint(("documents", "kept"))
    outputs = model(**(batch if is_called_as_is else inputs_of(model, batch)))
    if terms is not None:
        return listed_terms(terms(outputs, batch))
    loss = find_loss(outputs)
    if loss is None:
        raise no_loss(model, batch, outputs)
    return model_terms(loss, outputs, batch, counts)


def _call(loss_fn: LossFn, model: nn.Module, batch: Any) -> Any:
    """Call a ``loss_fn`` with the model that it would get in one process.

    DDP adds up, over the ranks, the gradients of what its own forward pass has run. A ``loss_fn``
    may call a method of the model, or the model by a name of the script, and ranks would drift
    apart. So it is called inside of that forward pass, in the place of the model.
    """
    if not isinstance(model, DistributedDataParallel):
        return loss_fn(model, batch)
    inner = model.module

    def forward() -> Any:
        model.module = inner
        return loss_fn(inner, batch)

    model.module = _InPlace(inner)
    try:
        return model(forward)
    finally:
        model.module = inner


class _InPlace(nn.Module):
    """Calls the function that it is given, in the place of a model, whose buffers DDP copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self)["named_buffers"] = model.named_buffers

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def explain_kept(error: TypeError, batch: Any) -> None:
    """Raise the mistake of a ``loss_fn`` that calls the model with a column that is kept.

    Raises:
        DataError: The error names such a column.
    """
    columns = batch if isinstance(batch, Mapping) else {}
    kept = tuple(name for name, column in columns.items() if isinstance(column, Kept))
    if named := [name for name in kept if repr(name) in str(error)]:
        raise DataError(
            f"loss_fn calls the model with the column {named[0]!r}, which keep= put into the batch "
            "beside the model's. Leave such columns out: "
            f"model(**{{name: column for name, column in batch.items() if name not in {kept}}})."
        ) from error


def own_terms(result: Any) -> list[Term]:
    """Take apart what a ``loss_fn`` returned: a mean, or a mean and its items.

    Raises:
        ModelError: It returned something else.
    """
    if not isinstance(result, tuple):
        loss, num_items = result, None
    elif len(result) == 2:
        loss, num_items = result
        check_items(num_items, "loss_fn")
    else:
        raise ModelError(
            f"loss_fn returned {len(result)} values ({', '.join(map(_name_of, result))}). Let it "
            "end with return loss, or return loss, num_items."
        )
    if loss is None:
        raise ModelError(
            "loss_fn returned None. Let it end with return loss, or return loss, num_items."
        )
    if not isinstance(loss, Tensor):
        _refuse_outputs(loss)
    return [(loss, num_items)]


def listed_terms(result: Any) -> list[Term]:
    """Take apart what ``terms`` returned.

    Raises:
        ModelError: It is not a list of pairs of a mean and its items.
    """
    pairs = result if isinstance(result, list | tuple) else ()
    if not pairs or not all(isinstance(term, list | tuple) and len(term) == 2 for term in pairs):
        raise ModelError(
            f"terms returned {_name_of(result)}. Let it return a list of pairs, each a mean and "
            "the number of items it is over: return [(mean, num_items)]."
        )
    for _, num_items in result:
        check_items(num_items, "terms")
    return [(mean, num_items) for mean, num_items in result]


def model_terms(loss: Any, outputs: Any, batch: Batch, counts: Sequence[float]) -> list[Term]:
    """Take apart the loss that a model returned with its outputs."""
    if len(counts) < 2:
        labels: Any = batch.get("labels") if counts else None
        if isinstance(labels, Tensor) and labels.is_floating_point() and counts[0] < labels.numel():
            loss = _targets_loss(outputs, labels, counts[0])  # transformers' does not know -100
        return [(loss, counts[0] if counts else None)]
    return list(zip(_position_losses(outputs, batch), counts, strict=True))


def _targets_loss(outputs: Any, labels: Tensor, num_items: float) -> Tensor:
    """Return the binary cross-entropy of a multi-label head, a mean without the ignored targets."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    kept = (labels != IGNORE_INDEX).to(labels.dtype)
    summed = nn.functional.binary_cross_entropy_with_logits(
        logits, labels * kept, weight=kept, reduction="sum"
    )
    return summed / num_items


def _position_losses(outputs: Any, batch: Batch) -> list[Tensor]:
    """Return the halves of the loss of a question answering head: of start and of end positions.

    The formula is that of transformers' ``ForQuestionAnsweringLoss``: positions beyond the input
    are left out of the mean.
    """
    losses = []
    for key, name in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
        logits = outputs[key] if isinstance(outputs, Mapping) else getattr(outputs, key)
        length = logits.shape[1]
        positions = batch[name].reshape(-1).clamp(0, length)
        losses.append(nn.functional.cross_entropy(logits, positions, ignore_index=length) * 0.5)
    return losses


def find_loss(outputs: Any) -> Any:
    """Return the loss among a model's outputs; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    # An attribute that was set later is no entry of what older versions of transformers return.
    return getattr(outputs, "loss", None) if loss is None else loss


def no_loss(model: nn.Module, batch: Batch, outputs: Any) -> ModelError | DataError:
    """Return the error about outputs without a loss, which says why there is none."""
    if not isinstance(outputs, Mapping) and not hasattr(outputs, "loss"):
        return ModelError(no_loss_message(model, batch, outputs))
    if "labels" not in batch and "start_positions" not in batch:
        return DataError(no_labels_message(batch))
    return ModelError(no_head_message(model))


def require_mean(loss: Any, *, trains: bool = True) -> Tensor:
    """Return a loss as a 0-d tensor.

    Args:
        loss: What should be a loss.
        trains: Whether it must depend on trainable parameters.

    Raises:
        ModelError: It is no tensor of one number, or cannot be differentiated.
    """
    if isinstance(loss, Tensor) and (loss.requires_grad or not trains) and loss.numel() == 1:
        return loss if loss.ndim == 0 else loss.reshape(())
    if not trains and isinstance(loss, Real):
        return torch.tensor(float(loss), dtype=torch.float64)
    found = _name_of(loss)
    if isinstance(loss, Tensor):
        found += f", requires_grad={loss.requires_grad}"
    raise ModelError(
        f"The loss is {found}. It must be one number that depends on trainable parameters: return "
        "losses.mean() from loss_fn, not detached and not under no_grad."
    )


def check_items(value: Any, name: str) -> None:
    """Refuse what is no number of items, without reading a tensor.

    Args:
        value: Second element of what the user's function returned.
        name: Name of the function.

    Raises:
        ModelError: It requires grad, has several elements, is negative, or is no number.
    """
    if isinstance(value, Tensor):
        if not value.requires_grad and value.numel() == 1 and not value.is_complex():
            return
    elif isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf:
        return
    raise ModelError(_items_message(value, name))


def read_items(value: Any, name: str = "loss_fn") -> float:
    """Return a number of items as a number of Python. A tensor is waited for.

    Items may be a fraction: with class weights they are the sum of the rows' weights.

    Raises:
        ModelError: It is negative, or not finite.
    """
    number: float = value.item() if isinstance(value, Tensor) else value
    if not 0 <= number < math.inf:
        raise ModelError(_items_message(number, name))
    return number


def _items_message(value: Any, name: str) -> str:
    pair = "(loss, something)" if name == "loss_fn" else "[(mean, something), ...]"
    fix = "Return the loss alone, or the items that it is a mean over: return loss, len(rows)."
    if isinstance(value, Tensor) and value.requires_grad:
        fix = "It requires grad: if it is another loss, return the sum of both."
    elif isinstance(value, Tensor) and value.numel() != 1:
        fix = "If it is logits, leave it out: return loss."
    if name != "loss_fn":
        has_grad = isinstance(value, Tensor) and value.requires_grad
        fix = "It requires grad: if it is another loss, make it a term. " if has_grad else ""
        fix += "Return [(mean, num_items)], with one number of items for each mean."
    return f"{name} returned {pair}, and something is {_name_of(value)}, no number of items. {fix}"


def _refuse_outputs(loss: Any) -> None:
    """Refuse a model's outputs, or a dict of losses, in the place of a loss."""
    if isinstance(loss, Mapping):
        fix = 'return outputs["loss"]' if "loss" in loss else "return sum(losses.values())"
    elif hasattr(loss, "loss"):
        fix = "return outputs.loss"
    else:
        return  # refused by require_mean
    raise ModelError(
        f"loss_fn returned {_name_of(loss)}, not a loss. It must be one number that depends on "
        f"trainable parameters: {fix}."
    )


def _name_of(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value))}"
    if value is None or isinstance(value, Real):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def declared_items(function: Any) -> Callable[[Any], Counts] | None:
    """Return the function that declares the items of a ``loss_fn`` or of ``terms``, if one does.

    It is the attribute ``items`` of the function: ``items(batch)`` gets the batch as the loader
    gave it, and returns the number of its items; for ``terms`` a list of numbers, one a term.
    """
    while (items := getattr(function, "items", None)) is None and isinstance(function, partial):
        function = function.func
    is_dict = getattr(type(function), "items", None) in _OF_DICTS
    return partial(_count_declared, items) if callable(items) and not is_dict else None


_OF_DICTS = (dict.items, Mapping.items, nn.ModuleDict.items, nn.ParameterDict.items)


def _count_declared(items: Callable[[Any], Any], batch: Any) -> Counts:
    declared = items(batch)
    listed = declared if isinstance(declared, list | tuple) else (declared,)
    for number in listed:
        check_items(number, "items")
    return tuple(read_items(number, "items") for number in listed)


def check_own_loss(
    model: nn.Module,
    batches: Sequence[Any],
    *places: Any,
    tokenizer: Any,
    loss_fn: Any,
    strategy: Strategy | None,
) -> None:
    """Look at the first window of a loss of the user's.

    A ``loss_fn`` may refuse to begin a run by a method ``check_start(model, batch)``.

    Args:
        model: The model.
        batches: The micro-batches of the first window.
        places: Not used.
        tokenizer: The tokenizer that made them; None if it is unknown.
        loss_fn: The loss.
        strategy: The strategy; None where updates were made before.
    """
    if loss_fn is not None:  # what a step_fn does with the model is not known
        look_at_texts(model, batches, tokenizer=tokenizer, loss_fn=loss_fn)
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    begin = getattr(loss_fn, "check_start", None)
    if begin is not None and strategy is not None:
        with strategy.autocast():
            begin(model, strategy.to_device(batches[0]))
