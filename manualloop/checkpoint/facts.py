"""Facts about the objects of a run, as plain data: by them a resumed run is compared.

Each is what the script has built, before a step was made or a state loaded: the same script gives
the same facts in every process.
"""

from __future__ import annotations

import dis
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manualloop.internals import unwrap_optimizer
from manualloop.models import config_of, unwrap_model
from manualloop.optim import own_schedule

Facts = dict[str, Any]
"""Plain data by name: numbers, texts, and lists of them."""

_SCALARS = (bool, int, float, str)
_DEPTH = 4


def plain(value: Any) -> Any:
    """Return a setting as JSON has it; what is no plain data becomes its type's name.

    >>> plain((0.9, 0.999)), plain(len)
    ([0.9, 0.999], 'builtins.len')
    """
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [plain(part) for part in parts]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return callable_facts(value) if callable(value) else type(value).__qualname__


def model_facts(model: nn.Module) -> Facts:
    """Describe class, configuration, settings of modules, and which parameters are trained."""
    whole, inner = unwrap_model(model, adapters=False), unwrap_model(model)
    parameters = list(whole.named_parameters())
    frozen = [name for name, parameter in parameters if not parameter.requires_grad]
    facts: Facts = {
        "model": type(inner).__name__,
        "frozen parameters": f"{len(frozen)} of {len(parameters)}",
        "names of frozen parameters": _digest(*frozen),
        "config": _config_facts(config_of(model)),
        "adapters": {
            name: _config_facts(config)
            for name, config in (getattr(whole, "peft_config", None) or {}).items()
        },
    }
    settings = list(_module_settings(whole))
    by_kind: dict[str, Counter[str]] = {}
    for _, kind, name, value in settings:
        by_kind.setdefault(f"{kind}.{name}", Counter())[value] += 1
    facts["modules"] = {
        name: ", ".join(f"{value} ({number} times)" for value, number in sorted(values.items())[:9])
        for name, values in by_kind.items()
    }
    facts["places of modules"] = _digest(*map(repr, settings))
    return facts


def _module_settings(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """Give path, class, name and value of the plain attributes of all modules."""
    for path, module in model.named_modules():
        kind = type(module).__name__.removeprefix("FSDP")  # what fully_shard makes of a class
        for name, value in vars(module).items():
            if name.startswith("_") or _MOVES.search(name):
                continue
            if isinstance(value, _SCALARS) or (
                isinstance(value, tuple) and all(isinstance(part, _SCALARS) for part in value)
            ):
                yield path, kind, name, repr(value)


# What a forward pass changes, or what saves memory and changes no number.
_MOVES = re.compile(r"training$|cache|gradient_checkpointing|^name_or_path$|^num_batches_tracked$")


def _config_facts(config: Any) -> Facts:
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return {}
    return {key: plain(v) for key, v in to_dict().items() if key not in _NO_SETTINGS}


# Of a config: written by the library, or at the first batch.
_NO_SETTINGS = {
    *("architectures", "transformers_version", "problem_type", "use_cache", "_commit_hash"),
    *("inference_mode", "revision", "torch_dtype", "dtype", "_attn_implementation_autoset"),
}


def optimizer_facts(optimizer: Any) -> list[Facts]:
    """Describe the settings of each group; the learning rate is the one that a schedule scales."""
    groups: list[Facts] = []
    for group in unwrap_optimizer(optimizer).param_groups:
        facts = {
            name: plain(value)
            for name, value in group.items()
            if name not in _OF_GROUPS and not isinstance(value, list)
        }
        if "initial_lr" in group:
            facts["lr"] = plain(group["initial_lr"])
        groups.append(facts)
    return groups


# Of a group: its parameters, and what chooses a kernel or is written by `load_state_dict`.
_OF_GROUPS = {
    *("params", "param_names", "initial_lr"),
    *("foreach", "fused", "capturable", "differentiable"),
}


def schedule_facts(lr_scheduler: Any) -> tuple[str | None, Facts]:
    """Describe a schedule.

    Returns:
        Its kind with the settings that its state does not hold, such as the function of a
        ``LambdaLR``, and the settings that its state holds, such as the gamma of a ``StepLR``.
    """
    lr_scheduler = own_schedule(lr_scheduler)
    if lr_scheduler is None:
        return None, {}
    kind = type(lr_scheduler).__name__
    functions = getattr(lr_scheduler, "lr_lambdas", None)
    if isinstance(functions, list):
        names = list(dict.fromkeys(map(_schedule_name, functions)))
        kind = ", ".join(names)
    state_dict = getattr(lr_scheduler, "state_dict", dict)
    return kind, _settings_of(state_dict())


def _settings_of(state: Any) -> Facts:
    if not isinstance(state, Mapping):
        return {}
    found: Facts = {}
    for name, value in state.items():
        if name in _OF_SCHEDULES:
            continue
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for number, part in enumerate(value):  # the parts of a SequentialLR
                inner = _settings_of(part)
                found |= {f"{name.strip('_')}.{number}.{key}": v for key, v in inner.items()}
        else:
            found[str(name)] = plain(value)
    return found


# Of a schedule: its place, the rates of the optimizer, and functions.
_OF_SCHEDULES = {
    *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"),
    *("T_cur", "T_i", "base_lrs", "lr_lambdas", "verbose"),
}


def _schedule_name(function: Any) -> str:
    """Name the function of a schedule: those of transformers as their users do."""
    inner = function.func if isinstance(function, partial) else function
    name = getattr(inner, "__name__", "")
    found = re.fullmatch(r"_get_(\w+?)(_schedule)?(_with_warmup)?(_lr_lambda|_lambda)", name)
    if found is None or not isinstance(function, partial):
        return callable_facts(function)
    settings = {k: v for k, v in function.keywords.items() if k != "num_training_steps"}
    if not settings.get("num_warmup_steps"):
        settings.pop("num_warmup_steps", None)
    inside = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    return f"{found[1]}({inside})" if inside else found[1]


def callable_facts(function: Any, depth: int = 0) -> str:
    """Describe a function or an object that is called: by name, settings, and a digest of its code.

    The digest covers what a user edits: the code with its constants, the functions of the same
    module that it calls, and the numbers and texts in its closure, its defaults and its globals.
    The code of installed libraries is covered by their versions.
    """
    if isinstance(function, partial):
        inside = [_argument(value, depth) for value in function.args]
        inside += [f"{key}={_argument(v, depth)}" for key, v in function.keywords.items()]
        return f"{callable_facts(function.func, depth)}({', '.join(inside)})"
    if isinstance(function, MethodType):
        return f"{callable_facts(function.__func__, depth)} of {_object_facts(function.__self__)}"
    if isinstance(function, FunctionType):
        name = function.__qualname__
        if _is_installed(function):
            return f"{function.__module__}.{name}"
        return f"{name} (code {_code_digest(function, depth)})"
    if isinstance(function, type) or not hasattr(function, "__dict__"):
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{getattr(function, '__module__', None) or 'builtins'}.{name}"
    return _object_facts(function)


def _argument(value: Any, depth: int) -> str:
    if value is None or isinstance(value, _SCALARS):
        return repr(value)
    if callable(value) and depth < _DEPTH and not isinstance(value, nn.Module):
        return callable_facts(value, depth + 1)
    return type(value).__qualname__


def _object_facts(value: Any) -> str:
    """Describe an object by its class and its plain attributes; of a loss module those of all."""
    name = type(value).__qualname__
    attributes = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        if next(value.parameters(), None) is not None:
            return name  # a model, which is described as such
        attributes |= dict(value.named_buffers())
    inside = [
        f"{key}={_digest(repr(part.tolist())) if isinstance(part, Tensor) else repr(part)}"
        for key, part in attributes.items()
        if key != "training"
        and (isinstance(part, _SCALARS) or (isinstance(part, Tensor) and part.numel() <= 10_000))
    ]
    return f"{name}({', '.join(inside)})"


def _is_installed(function: FunctionType) -> bool:
    if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(function.__module__), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file or file.startswith(sys.base_prefix)


def _code_digest(function: FunctionType, depth: int) -> str:
    return _digest(*_code_parts(function, depth))


def _code_parts(function: FunctionType, depth: int) -> Iterator[str]:
    code = function.__code__
    yield from _code_of(code)
    yield from map(repr, filter(_is_plain, function.__defaults__ or ()))
    yield from (f"{k}={v!r}" for k, v in (function.__kwdefaults__ or {}).items() if _is_plain(v))
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    outer = {name: _content(cell) for name, cell in cells}
    used, stored = _names_of(code)
    found = {name: function.__globals__.get(name) for name in used} | outer
    for name, value in sorted(found.items()):
        if name in stored:  # a counter, which moves
            continue
        if _is_plain(value):
            yield f"{name}={value!r}"
        elif isinstance(value, partial | FunctionType) and depth < _DEPTH:
            is_own = isinstance(value, partial) or value.__module__ == function.__module__
            if is_own and value is not function:
                yield f"{name}={callable_facts(value, depth + 1)}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, _SCALARS)


def _code_of(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_of(constant)
        elif isinstance(constant, frozenset):  # its order is another in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _names_of(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the globals that some code reads, and all names outside of it that it assigns to."""
    used, stored = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            used.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            stored.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_used, inner_stored = _names_of(constant)
            used, stored = used | inner_used, stored | inner_stored
    return used, stored


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
