"""The private names of libraries around models and metrics that are used, as ``internals.py``.

Each function says what a name is for, in which versions it was seen, and what happens without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def tied_patterns(model: nn.Module) -> list[str]:
    """List the patterns of the weights that a model of transformers 4 makes from others.

    Seen in transformers 4.52 to 4.57: ``_tied_weights_keys``, and then ``all_tied_weights_keys``.
    If it is gone, the first name of a tensor that has several is its own: the embedding's.
    """
    return list(getattr(model, "_tied_weights_keys", None) or ())


def attention_of(config: Any) -> str | None:
    """Name a model's attention (seen in transformers 4.52 to 5.24); else it is probed once."""
    return getattr(config, "_attn_implementation", None)


def pads_as_base(tokenizer: Any) -> bool:
    """Tell whether a tokenizer pads as transformers' base class does.

    Seen in transformers 4.52 to 5.24: ``_pad``. If it is gone, batches are padded by the tokenizer
    itself, to the same tensors, and an evaluation does not begin with the longest rows.
    """
    from transformers import PreTrainedTokenizerBase

    own, base = type(tokenizer), PreTrainedTokenizerBase
    try:
        return isinstance(tokenizer, base) and own.pad is base.pad and own._pad is base._pad
    except AttributeError:
        return False


def options_of_module(module: Any) -> tuple[str, ...] | None:
    """Return the names of the options that an ``evaluate`` module computes with.

    Seen in evaluate 0.4.3 to 0.4.6: ``_compute``, which each module defines. If it is gone, or
    takes options by any name, nobody knows them, and None is returned.
    """
    compute = getattr(module, "_compute", None)
    parameters = {} if compute is None else inspect.signature(compute).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()) or not parameters:
        return None
    features = getattr(module, "features", None)
    columns = features[0] if isinstance(features, list) and features else features or ()
    return tuple(name for name in parameters if name not in ("predictions", "references", *columns))


def parts_of_scorer(scorer: Any) -> tuple[Callable[..., Any], int, dict[str, Any], str] | None:
    """Return the function of a scikit-learn scorer, its sign, options and method of an estimator.

    Seen in scikit-learn 1.5 to 1.9. If they are gone, None is returned, as for any other object.
    """
    names = ("_score_func", "_sign", "_kwargs", "_response_method")
    if not all(hasattr(scorer, name) for name in names):
        return None
    function, sign, options, method = (getattr(scorer, name) for name in names)
    method = method if isinstance(method, str) else next(iter(method), "predict")
    return function, int(sign), dict(options), method


def require_reduced(model: Any) -> None:
    """Raise the ``RuntimeError`` of DDP if it still waits for gradients after a backward pass.

    Seen in torch 2.6 to 2.14: ``_check_reducer_finalized``. If it is gone, the next forward pass of
    DDP raises the same error.
    """
    getattr(model, "_check_reducer_finalized", bool)()


def forget_prepared(accelerator: Any, *parts: nn.Module) -> bool:
    """Let an ``Accelerator`` forget a model and its wrapper; tell whether it had made that.

    Seen in accelerate 1.7 to 1.15: ``_models``, and ``_is_accelerate_prepared`` of what it returns.
    If they are gone, it prepares the model again all the same.
    """
    known: list[nn.Module] = getattr(accelerator, "_models", [])
    known[:] = [held for held in known if all(held is not part for part in parts)]
    made = [vars(part).pop("_is_accelerate_prepared", False) for part in parts]
    return any(made)
