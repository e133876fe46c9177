"""Optimizers with the defaults of the course's loop and of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, ModelError
from manualloop.models import model_name, own_config, unwrap_model


@overload
def prepare_optimizer(
    model: nn.Module,
    name: Literal["adamw"] = "adamw",
    *,
    lr: float = ...,
    weight_decay: float = ...,
    betas: tuple[float, float] = ...,
    eps: float = ...,
    fused: bool | Literal["auto"] = ...,
    param_groups: Iterable[dict[str, Any]] | None = ...,
) -> Optimizer: ...


@overload
def prepare_optimizer(
    model: nn.Module,
    name: Literal["muon+adamw"],
    *,
    lr: float = ...,
    weight_decay: float = ...,
    betas: tuple[float, float] = ...,
    eps: float = ...,
    fused: bool | Literal["auto"] = ...,
) -> list[Optimizer]: ...


def prepare_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon+adamw"] = "adamw",
    *,
    lr: float = 5e-5,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool | Literal["auto"] = "auto",
    param_groups: Iterable[dict[str, Any]] | None = None,
) -> Optimizer | list[Optimizer]:
    """Build AdamW over a model's trainable parameters, or the pair of Muon and AdamW.

    Args:
        model: Its frozen parameters (``requires_grad=False``) are left out.
        name: ``"adamw"``, or ``"muon+adamw"`` for two optimizers in a list: ``torch.optim.Muon``
            for the matrices of hidden layers, AdamW for the rest. As Muon's authors advise, the
            rest includes embeddings and the head: of a model of transformers everything outside
            its base model, of another one the last matrix. Muon's updates are scaled to the size
            of AdamW's (``match_rms_adamw``), so that one ``lr`` and ``weight_decay`` suit both.
        lr: Learning rate: the Trainer's default.
        weight_decay: 0.0 as in the Trainer; torch's own AdamW has 0.01. If it is not 0, biases
            and normalisation weights (parameters of fewer than 2 axes) are not decayed.
        betas: Of Adam's two running means.
        eps: Added to Adam's denominator.
        fused: One kernel for all parameters: about 4 times fewer calls. Its last bits differ from
            the unfused update's. ``"auto"``: wherever torch has it.
        param_groups: Groups of your own, as torch's optimizers take them, instead.

    Raises:
        ModelError: The model has no trainable parameter.
        ConfigError: A number is out of its range.

    >>> model = nn.Linear(2, 2)
    >>> optimizer = prepare_optimizer(model, lr=1e-3, weight_decay=0.01)
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.01, 1), (0.0, 1)]
    """
    check_arguments(
        "param_groups",
        model=model,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        fused=fused,
        param_groups=param_groups,
    )
    param_groups = None if param_groups is None else [dict(group) for group in param_groups]
    given = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": betas}
    _check_numbers(given, "prepare_optimizer(model, {})")
    for number, group in enumerate(param_groups or ()):
        _check_numbers(group, f"param_groups[{number}].update({{}})")
    if name not in ("adamw", "muon+adamw"):
        raise ConfigError(f'name={name!r} is neither "adamw" nor "muon+adamw".')
    kernel = (_has_fused_kernel(model) or None) if fused == "auto" else fused
    trainable, matrices = require_trainable(model), []
    if name == "muon+adamw":
        matrices = _hidden_matrices(model, trainable, param_groups)
        in_muon = {id(parameter) for parameter in matrices}
        trainable = [parameter for parameter in trainable if id(parameter) not in in_muon]
    if param_groups is None:
        param_groups = _decay_groups(trainable, weight_decay)
    # torch writes the defaults into them.
    adamw = torch.optim.AdamW(
        param_groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=kernel
    )
    if not matrices:
        return adamw
    muon: Any = torch.optim.Muon
    return [
        muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        adamw,
    ]


_RIGHT = {"lr": "5e-5", "weight_decay": "0.01", "eps": "1e-8", "betas": "(0.9, 0.999)"}


def _check_numbers(given: Mapping[str, Any], call: str) -> None:
    """Refuse numbers of an optimizer that are out of their range.

    Args:
        given: The numbers by their names, among others.
        call: Code with a place for the right ones.

    Raises:
        ConfigError: The message names those that are wrong.
    """
    problems, fixes = [], []
    for name in [name for name in _RIGHT if name in given]:
        value, wanted = given[name], "at least 0 and finite"
        if name == "betas":
            is_right, wanted = all(0 <= beta < 1 for beta in value), "in [0, 1)"
        else:
            is_right = 0 <= value < math.inf
        if not is_right:
            problems.append(f"{name}={value} must be {wanted}")
            fixes.append(f"{name}={_RIGHT[name]}")
    if problems:
        raise ConfigError(f"{', '.join(problems)}. Write {call.format(', '.join(fixes))}.")


def _hidden_matrices(
    model: nn.Module, trainable: list[nn.Parameter], param_groups: object
) -> list[nn.Parameter]:
    """List the matrices of hidden layers.

    Raises:
        ConfigError: There is none, torch has no Muon, or the groups are given.
    """
    if param_groups is not None:
        raise ConfigError(
            'name="muon+adamw" makes the groups itself. Leave param_groups out, or build the '
            "optimizers yourself and pass both: [torch.optim.Muon(...), torch.optim.AdamW(...)]."
        )
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"torch {torch.__version__} has no torch.optim.Muon, which came with 2.9. Use "
            "prepare_optimizer(model)."
        )
    at_the_ends = _embeddings_and_head(model)
    matrices = [p for p in trainable if _is_matrix(p) and id(p) not in at_the_ends]
    if not matrices:
        raise ConfigError(
            f"{model_name(model)} has no trainable matrix in a hidden layer, and Muon updates no "
            "others. Use prepare_optimizer(model)."
        )
    return matrices


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > 1 and parameter.is_floating_point()


def _embeddings_and_head(model: nn.Module) -> set[int]:
    """Return the identities of the parameters by which a model meets tokens and classes."""
    inner = unwrap_model(model)
    found = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    if own_config(inner) is None:
        matrices = [parameter for parameter in inner.parameters() if _is_matrix(parameter)]
        return found | {id(parameter) for parameter in matrices[-1:]}
    get_head: Any = getattr(inner, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if isinstance(head, nn.Module):
        found |= {id(parameter) for parameter in head.parameters()}
    base = getattr(inner, str(getattr(inner, "base_model_prefix", "")), inner)
    if isinstance(base, nn.Module):
        in_base = {id(parameter) for parameter in base.parameters()}
        found |= {id(p) for p in inner.parameters() if id(p) not in in_base}
    return found


def _has_fused_kernel(model: nn.Module) -> bool:
    # torch itself looks only at the first update, and raises then.
    return all(p.device.type in _FUSED and p.is_floating_point() for p in model.parameters())


_FUSED = ("cpu", "cuda", "mps", "xpu")


def require_trainable(model: nn.Module) -> list[nn.Parameter]:
    """List the trainable parameters.

    Raises:
        ModelError: There is none.
    """
    require_initialized(model)
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ModelError(
            f"{type(model).__name__} has 0 trainable parameters of {len(parameters)}. Unfreeze "
            "some: for parameter in model.classifier.parameters(): parameter.requires_grad_(True)."
        )
    return trainable


_LAZY = (UninitializedParameter, UninitializedBuffer)


def require_initialized(model: nn.Module) -> None:
    """Refuse a model whose lazy modules do not know their shapes yet.

    Raises:
        ModelError: The message names one of their weights.
    """
    weights = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, weight in weights if isinstance(weight, _LAZY)]
    if lazy:
        raise ModelError(
            f"{lazy[0]} of {type(model).__name__} is lazy: it has no shape before the first "
            "forward pass, so an optimizer has nothing to hold and a checkpoint nothing to load "
            "into. Run a batch through the model before the optimizer is built: "
            "with torch.no_grad(): model(**batch)."
        )


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    # One group, in the model's order, when there is nothing to tell apart: the same sums in the
    # same order as AdamW(model.parameters()).
    if weight_decay == 0:
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
