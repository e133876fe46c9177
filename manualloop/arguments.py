"""The arguments of a call are checked together: one error lists everything that is wrong."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from torch import Tensor, nn

from manualloop.errors import ConfigError, DataError, ManualLoopError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Checks:
    """Calls functions that check arguments, and keeps the errors they raise."""

    def __init__(self) -> None:
        self.errors: list[ManualLoopError] = []

    def __call__(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a function returns. If it raises an error of ours, keep that, return None.

        The error is raised at the end of the ``with`` block, so that nobody sees the None behind
        it; inside the block ``ok`` tells.
        """
        try:
            return function(*args, **kwargs)
        except ManualLoopError as error:
            self.errors.append(error)
            return cast("_T", None)

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong so far."""
        return not self.errors


@contextmanager
def all_at_once(note: str = "") -> Iterator[Checks]:
    """Raise the errors of several checks as one, at the end of the block.

    Args:
        note: Sentence behind an error whose lines are about a ``dataset``.

    Raises:
        ManualLoopError: The error has the class of the first one, and a line for every problem.

    >>> def require_positive(name, value):
    ...     if value <= 0:
    ...         raise ConfigError(f"{name} must be above 0, got {value}.")
    >>> from manualloop import ConfigError
    >>> with all_at_once() as check:
    ...     check(require_positive, "lr", -1)
    ...     check(require_positive, "momentum", 0.9)
    ...     check(require_positive, "eps", 0)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: lr must be above 0, got -1.
    eps must be above 0, got 0.
    """
    checks = Checks()
    try:
        yield checks
        _raise(checks.errors)
    except ManualLoopError as error:
        if not note or not _OF_DATASET.search(str(error)):
            raise
        raise type(error)(f"{error}{note}") from error.__cause__


_OF_DATASET = re.compile(r"\bdataset[.\[]")


def _raise(errors: Sequence[ManualLoopError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = dict.fromkeys("\n".join(map(str, errors)).split("\n"))
        # Not from the first, which would be printed above: its line is here.
        raise type(errors[0])("\n".join(lines)) from errors[0].__cause__


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 1, of Python or of NumPy.

    >>> [is_count(value) for value in (2, 0, 2.0, True)]
    [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_positive(value: Any) -> bool:
    """Tell whether a value is a number above 0.

    >>> [is_positive(value) for value in (0.5, float("nan"), "1.0")]
    [True, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def check_arguments(*optional: str, **arguments: Any) -> None:
    """Refuse arguments that cannot be meant, by what their names mean in every public function.

    Names that are not known here are checked where they are used. None is let through where it is
    the default of a function.

    Args:
        optional: Names of arguments that may be None in this function.
        arguments: Values by the names of arguments.

    Raises:
        ConfigError: A line for every problem.

    >>> check_arguments(size=0, progress_bar="no", skip=3)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: size must be a whole number of at least 1, got 0.
    progress_bar must be True or False, got 'no'.
    """
    problems = []
    for name, value in arguments.items():
        is_right, wanted = MEANINGS.get(name, _ANYTHING)
        if not is_right(value) and not (value is None and name in (*_MAY_BE_NONE, *optional)):
            if isinstance(value, str | int | float | bytes | None):
                got = f"got {value!r:.60}"
            else:
                got = f"got a {type(value).__name__}"
            problems.append(f"{name} must be {wanted}, {got}.")
        elif name in CALLS:
            functions = value.values() if isinstance(value, Mapping) else [value]
            problems += [p for one in functions if (p := problem_of_call(name, one))]
    for (one, other), message in NOT_BOTH.items():
        if arguments.get(one) is not None and arguments.get(other) is not None:
            problems.append(message)
    if problems:
        raise ConfigError("\n".join(problems))


CALLS = {
    "evaluate": (),
    "on_step": ("step",),
    "trackers": ("record",),
    **dict.fromkeys(("collate_fn", "preprocess"), ("rows",)),
    "terms": ("outputs", "batch"),
    "loss_fn": ("model", "batch"),
    "step_fn": ("state", "batches", "strategy"),
    "transform": ("row", "generator"),
}
"""With which arguments the functions of the user are called."""

NOT_BOTH = {
    ("postprocess", "decode"): (
        "Give postprocess or decode, not both. postprocess(outputs, batch) returns a tensor of "
        "predictions; decode(outputs, batch) returns a list with one object for each row."
    ),
}
"""Arguments of which a call takes one, with the message about two."""


_LOSSES_OF_TORCH = ("torch.nn.functional", "torch.nn.modules.loss")


def problem_of_call(name: str, function: Any) -> str | None:
    """Tell why a function cannot be called as it will be; None if it can, or if nobody knows."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    if name == "loss_fn" and str(getattr(inner, "__module__", "")).startswith(_LOSSES_OF_TORCH):
        kind = getattr(inner, "__name__", type(inner).__name__)
        return (
            f"loss_fn is torch's {kind}, which takes outputs and labels, and it is called with the "
            "model and a batch: loss_fn=lambda model, batch: loss(model(batch[0]), batch[1])."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, or no function
        return None
    try:
        signature.bind(*CALLS[name])
    except TypeError as error:
        call = f"{name}({', '.join(CALLS[name])})"
        return f"{name} will be called as {call}, but it takes {signature}: {error}."
    return None


def require_loader(loader: Any) -> None:
    """Refuse an object that is not a loader of batches, such as a dict of loaders or a dataset.

    Raises:
        DataError: It is not a loader; the message shows how to make one.
    """
    if hasattr(loader, "keys"):
        names = ", ".join(map(str, loader.keys()))
        raise DataError(
            f"Got a {type(loader).__name__} with splits {names}, where one loader is wanted. Pass "
            'one of prepare_dataloaders(...): loaders["train"].'
        )
    is_text = isinstance(loader, str | bytes)
    if is_text or hasattr(loader, "features") or not hasattr(loader, "__iter__"):
        raise DataError(
            f"Got a {type(loader).__name__}, where a loader of batches is wanted. Make one: "
            'prepare_dataloaders(dataset, tokenizer)["train"].'
        )


_Meaning = tuple[Callable[[Any], bool], str]


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_whole(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return is_number and least <= int(value) <= most


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_function_or_by_name(value: Any) -> bool:
    if isinstance(value, Mapping) and not callable(value):
        return bool(value) and all(map(_is_function, value.values()))
    return _is_function(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_batch(value: Any) -> bool:
    is_plain = isinstance(value, str | bytes | int | float | None) or type(value) is object
    return not is_plain and not callable(value)


def _is_reaction(value: Any) -> bool:
    return isinstance(value, str) and value in ("raise", "skip", "ignore")


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real or (isinstance(value, Tensor) and value.numel() == 1)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_groups(value: Any) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return False
    return not _is_list(value) or all(isinstance(group, dict) for group in value)


def _is_port(value: Any) -> bool:
    is_text = isinstance(value, str) and value.isascii() and value.isdigit()
    return _is_whole(int(value) if is_text else value, 0, 65535)


def _is_share(value: Any) -> bool:
    return is_positive(value) and float(value) < 1


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _is_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_ANYTHING: _Meaning = (lambda value: True, "")
_COUNT: _Meaning = (is_count, "a whole number of at least 1")
_FLAG: _Meaning = (_is_flag, "True or False")
_CALLED: _Meaning = (_is_function, "a function")
_NAME: _Meaning = (lambda value: isinstance(value, str) and value != "", "a name")
_LIST: _Meaning = (_is_list, "a list")

MEANINGS: dict[str, _Meaning] = {
    **dict.fromkeys(("at", "keep", "num_processes", "size"), _COUNT),
    **dict.fromkeys(
        (
            *("drop_last", "group_by_length", "pack", "pin_memory", "preflight"),
            *("progress_bar", "verify"),
        ),
        _FLAG,
    ),
    **dict.fromkeys(("evaluate", "on_step", "function", "train_fn"), _CALLED),
    **dict.fromkeys(("decode", "loss_fn", "postprocess", "terms"), _CALLED),
    **dict.fromkeys(
        ("collate_fn", "preprocess", "transform"),
        (_is_function_or_by_name, "a function, or a dict of functions by split"),
    ),
    **dict.fromkeys(("best_metric", "config", "name"), _NAME),
    "confidence": (_is_share, "a number between 0 and 1, such as 0.95"),
    **dict.fromkeys(("args", "batches"), _LIST),
    **dict.fromkeys(("extras", "metrics"), (_is_by_name, "a dict whose keys are names")),
    "launched_precision": (lambda value: value in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
    "loader": (
        lambda value: hasattr(value, "__iter__") and not isinstance(value, str | bytes),
        'a loader of batches: prepare_dataloaders(dataset, tokenizer)["train"]',
    ),
    "compile": (
        lambda value: _is_flag(value) or _is_by_name(value),
        "True, False or options of torch.compile",
    ),
    "max_grad_norm": (is_positive, "above 0"),
    "on_nonfinite": (_is_reaction, 'one of "raise", "skip", "ignore"'),
    **dict.fromkeys(("label_column", "text_columns"), (_are_names, "a name or a list of names")),
    "fill": (_is_by_name, "a dict whose keys are names"),
    **dict.fromkeys(("eps", "lr", "num_warmup_steps", "weight_decay"), (_is_number, "a number")),
    "betas": (lambda value: _is_list(value) and all(map(_is_number, value)), "two numbers"),
    "fused": (lambda value: value in ("auto", None) or _is_flag(value), 'True, False or "auto"'),
    "num_training_steps": (lambda value: _is_whole(value, -(2**62)), "a whole number"),
    "optimizer": (_has("param_groups"), "an optimizer: prepare_optimizer(model)"),
    "param_groups": (_are_groups, 'a list of dicts, each with "params"'),
    "batch": (_is_batch, "a batch, such as a dict of tensors"),
    "model": (
        lambda value: isinstance(value, nn.Module),
        "a torch.nn.Module, such as AutoModelForSequenceClassification.from_pretrained(name)",
    ),
    "num_workers": (_is_whole, "a whole number of at least 0"),
    "seed": (lambda value: _is_whole(value, -(2**63)), "a whole number of 64 bits"),
    "skip": (_is_whole, "a whole number of at least 0"),
    "state": (_has("model", "optimizer", "progress"), "a TrainState(model, optimizer)"),
    "strategy": (_has("sum_counts", "to_device"), 'a strategy: prepare_strategy("auto")'),
    "tokenizer": (_has("decode"), "a tokenizer: AutoTokenizer.from_pretrained(name)"),
    "use_port": (_is_port, "the number of a port"),
    "which": (_is_path, '"last", "best" or a folder'),
}
"""What arguments must be, and in which words that is told."""

_MAY_BE_NONE = {
    *(
        "best_metric",
        "collate_fn",
        "config",
        "decode",
        "evaluate",
        "extras",
        "loss_fn",
        "metrics",
        "on_step",
    ),
    *("num_processes", "pin_memory", "postprocess", "preprocess", "strategy", "terms"),
    "transform",
    *("max_grad_norm", "tokenizer", "use_port"),
}
