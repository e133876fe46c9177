"""Optimizers and schedules, with the defaults of the course's loop and of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manualloop.errors import ConfigError, ModelError
from manualloop.internals import unwrap_optimizer
from manualloop.models import model_name, own_config, unwrap_model
from manualloop.optimizers.together import as_schedule, each, for_each


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
    numbers_fit = all(number >= 0 for number in (lr, weight_decay, eps))
    if not numbers_fit or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(
            f"lr={lr}, weight_decay={weight_decay} and eps={eps} must be at least 0, and "
            f"betas={betas} in [0, 1). Write prepare_optimizer(model, lr=5e-5)."
        )
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
    groups = [dict(group) for group in param_groups]  # torch writes the defaults into them
    adamw = torch.optim.AdamW(
        groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=kernel
    )
    if not matrices:
        return adamw
    muon: Any = torch.optim.Muon
    return [
        muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        adamw,
    ]


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


def prepare_scheduler(
    optimizer: Optimizer,
    name: str = "linear",
    *,
    num_training_steps: int,
    num_warmup_steps: float = 0,
    **kwargs: Any,
) -> LRScheduler:
    """Build a schedule of the learning rate, counted in updates.

    Args:
        optimizer: Its ``lr`` is the schedule's maximum.
        name: One of transformers' ``SchedulerType``: ``"linear"`` (to 0, the Trainer's default),
            ``"cosine"``, ``"constant"``, ``"constant_with_warmup"``, ``"polynomial"``, ...; not
            those that follow a metric.
        num_training_steps: Updates in the run, warm-up included.
        num_warmup_steps: Updates of linear warm-up; a float below 1 is a share of
            ``num_training_steps``, rounded up as in the Trainer.
        **kwargs: Passed to the schedule, such as ``num_cycles`` for ``"cosine"``.

    Raises:
        ConfigError: The name is unknown or follows a metric, the schedule does not take the
            arguments, or a number is out of its range.

    >>> optimizer = prepare_optimizer(nn.Linear(2, 2), lr=1.0)
    >>> lr_scheduler = prepare_scheduler(optimizer, num_training_steps=4)
    >>> for _ in range(3):
    ...     print(lr_scheduler.get_last_lr())
    ...     optimizer.step()
    ...     lr_scheduler.step()
    [1.0]
    [0.75]
    [0.5]
    """
    from transformers import get_scheduler

    num_warmup_steps = check_schedule(
        optimizer, name, num_training_steps, num_warmup_steps, **kwargs
    )
    try:
        scheduler: LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler={name!r} does not take these arguments: {error}. Give "
            f"prepare_scheduler what {name!r} wants as keywords."
        ) from error
    return scheduler


def check_schedule(
    optimizer: Optimizer,
    name: str,
    num_training_steps: int,
    num_warmup_steps: float,
    **kwargs: Any,
) -> int:
    """Check the arguments of ``prepare_scheduler``; return the number of warm-up updates.

    Raises:
        ConfigError: As in ``prepare_scheduler``.
    """
    from transformers.trainer_utils import SchedulerType

    names = [str(kind.value) for kind in SchedulerType if kind.value not in _FOLLOW_A_METRIC]
    if name in _FOLLOW_A_METRIC:
        raise ConfigError(
            f"lr_scheduler={name!r} follows a metric, and a schedule is stepped after every "
            "update, without one. Step it in a loop over train_steps after each evaluation, or "
            f"use one of: {', '.join(names)}."
        )
    if name not in names:
        raise ConfigError(
            f"lr_scheduler={name!r} is unknown. Use None (constant), a scheduler object, or one "
            f"of: {', '.join(names)}."
        )
    if 0 < num_warmup_steps < 1:
        num_warmup_steps = math.ceil(num_warmup_steps * num_training_steps)
    is_whole = math.isfinite(num_warmup_steps) and num_warmup_steps == int(num_warmup_steps)
    if num_training_steps < 1 or not is_whole or not 0 <= num_warmup_steps <= num_training_steps:
        raise ConfigError(
            f"A schedule of num_training_steps={num_training_steps} updates cannot have "
            f"num_warmup_steps={num_warmup_steps}. Give a whole number, 0 <= num_warmup_steps <= "
            "num_training_steps, or a share such as 0.1."
        )
    if name == "constant" and (num_warmup_steps or kwargs):
        ignored = ", ".join((["num_warmup_steps"] if num_warmup_steps else []) + list(kwargs))
        raise ConfigError(
            f'lr_scheduler="constant" would ignore {ignored}. Use "constant_with_warmup".'
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} has lr=None and finds its own learning rates. Pass "
            "lr_scheduler=None, or give it an lr."
        )
    return int(num_warmup_steps)


def own_schedule(lr_scheduler: Any) -> Any:
    """Take off accelerate's wrapper, which steps a schedule once for every process."""
    is_wrapped = type(lr_scheduler).__name__ == "AcceleratedScheduler"
    return lr_scheduler.scheduler if is_wrapped else lr_scheduler


def require_schedules(lr_scheduler: Any, optimizer: Any) -> LRScheduler | None:
    """Refuse schedules that do not fit; return them without accelerate's wrapper.

    Args:
        lr_scheduler: One schedule, or one for each of several optimizers.
        optimizer: One or several.

    Raises:
        ConfigError: As in ``require_schedule``, or there are more of one than of the other.
    """
    schedules = [own_schedule(one) for one in for_each(optimizer, lr_scheduler)]
    for schedule, own in zip(schedules, each(optimizer), strict=True):
        require_schedule(schedule, own)
    return as_schedule(schedules)


def require_schedule(lr_scheduler: object, optimizer: Optimizer) -> None:
    """Refuse a scheduler that cannot be stepped once an update, or that drives another optimizer.

    Raises:
        ConfigError: It is none, it follows a metric, or it belongs to another optimizer.
    """
    if lr_scheduler is None:
        return
    name = type(lr_scheduler).__name__
    lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's wrapper
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"{name} follows a metric, and a schedule is stepped after every update, without one. "
            "Pass lr_scheduler=None and step it yourself after each evaluation: "
            'scheduler.step(scores["loss"]).'
        )
    if not hasattr(lr_scheduler, "step"):
        raise ConfigError(
            f"lr_scheduler is a {name}, which has no step(). Build one: "
            'prepare_scheduler(optimizer, "linear", num_training_steps=...).'
        )
    driven = getattr(lr_scheduler, "optimizer", optimizer)
    if unwrap_optimizer(driven) is not unwrap_optimizer(optimizer):
        raise ConfigError(
            f"The {name} drives another optimizer than the {type(optimizer).__name__} that is "
            "given, so the learning rate would never move. Pass both: train_loop(model, loader, "
            "optimizer, lr_scheduler)."
        )


_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters that an optimizer updates, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def zero_gradients(optimizer: Optimizer) -> None:
    """Set the gradients of an optimizer's parameters to None.

    What ``Optimizer.zero_grad`` does, less its record for the profiler, which costs 6 us; an
    optimizer that has a ``zero_grad`` of its own gets it called.
    """
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def plain_lr(lr: Any) -> Any:
    """Return a learning rate as a number; one on a device stays there, where nothing waits for it.

    NaN of an optimizer without one, such as Adafactor's ``relative_step``.
    """
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.clone()  # a scheduler changes it in place
    return math.nan if lr is None else float(lr)


def put_into_training(optimizer: Any) -> None:
    """Let schedule-free optimizers give the model the weights that are trained."""
    for one in schedule_free(optimizer):
        one.train()


def schedule_free(optimizer: Any) -> list[Any]:
    """Return those among one or several optimizers that have modes, as schedule-free ones do.

    Their ``eval()`` gives the model the weights that are to be evaluated, ``train()`` those that
    are trained.

    >>> schedule_free(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    []
    """
    several = optimizer if isinstance(optimizer, list | tuple) else (optimizer,)
    inner = map(unwrap_optimizer, several)
    return [one for one in inner if all(callable(getattr(one, m, None)) for m in ("train", "eval"))]
