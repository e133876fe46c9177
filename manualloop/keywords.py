"""Arguments that a function does not have, with what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from manualloop.errors import ConfigError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class UnknownArgumentError(ConfigError, TypeError):
    """A function has no argument of this name."""


def explains_unknown(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function tell what to write instead of keywords that it does not have.

    Its signature stays, and with it what completion and type checkers know.

    >>> @explains_unknown
    ... def train_loop(model, *, num_epochs=3): ...
    >>> train_loop(None, lr=1e-4)
    Traceback (most recent call last):
    manualloop.keywords.UnknownArgumentError: train_loop has no argument lr. Settings of the \
optimizer are passed by optimizer=prepare_optimizer(model, lr=0.0001).
    """
    known = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if unknown := [name for name in kwargs if name not in known]:
            raise UnknownArgumentError(
                "\n".join(
                    f"{function.__name__} has no argument {name}. "
                    f"{instead_of(name, kwargs[name], known)}"
                    for name in unknown
                )
            )
        return function(*args, **kwargs)

    return call


def instead_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Tell what to write instead of an argument that ``train_loop`` does not have.

    Args:
        name: The name that was used, perhaps that of another library.
        value: What was passed by it.
        known: The names that there are.
    """
    shown = repr(value) if isinstance(value, bool | int | float | str) else "..."
    setting = "lr" if name == "learning_rate" else name
    if setting in ("lr", "weight_decay", "betas", "eps"):
        return (
            "Settings of the optimizer are passed by "
            f"optimizer=prepare_optimizer(model, {setting}={shown})."
        )
    if name in _ELSEWHERE:
        return f"Write {_ELSEWHERE[name].format(shown)}."
    near = get_close_matches(name, known, 1)
    return f"Did you mean {near[0]}=?" if near else "Leave it out."


_ELSEWHERE = {
    **dict.fromkeys(("epochs", "num_train_epochs", "max_epochs"), "num_epochs={}"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "num_warmup"), "num_warmup_steps={}"),
    **dict.fromkeys(("scheduler", "lr_scheduler_type"), "lr_scheduler={}"),
    **dict.fromkeys(("output_dir", "save_dir", "checkpoint_path"), "checkpoint_dir={}"),
    **dict.fromkeys(("eval_steps", "eval_every"), "evaluate_every={}"),
    **dict.fromkeys(("save_steps", "save_every"), "checkpoint_every={}"),
    "logging_steps": "log_every={}",
    "save_total_limit": "keep_checkpoints={}",
    "resume_from_checkpoint": "resume={}",
    "early_stopping_patience": "patience={}",
    "metric_for_best_model": "best_metric={}",
    **dict.fromkeys(
        ("accumulation_steps", "accumulate_grad_batches"), "gradient_accumulation_steps={}"
    ),
    **dict.fromkeys(("grad_clip", "gradient_clip_val", "max_norm"), "max_grad_norm={}"),
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size"),
        "prepare_dataloaders(datasets, tokenizer, batch_size={}), whose loaders are passed",
    ),
    "seed": "prepare_dataloaders(datasets, tokenizer, seed={0}), and torch.manual_seed({0}) before "
    "the model is made",
    **dict.fromkeys(
        ("eval_dataset", "eval_dataloader", "val_dataloader", "metric", "compute_metrics"),
        "evaluate=partial(evaluate_loop, model, eval_dataloader, metric)",
    ),
    "device": "strategy=prepare_strategy({})",
    "mixed_precision": "strategy=prepare_strategy(mixed_precision={})",
    **dict.fromkeys(("bf16", "fp16"), 'strategy=prepare_strategy(mixed_precision="bf16")'),
    "callbacks": "on_step=f for a function of each step, or a loop over train_steps",
    "report_to": "trackers=[manualloop.tracking.tensorboard(folder)], or others of that module",
}
"""What to write, by the names that other libraries have for it."""
