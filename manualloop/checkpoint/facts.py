"""Facts about the objects of a run, as plain data: by them a resumed run is compared.

Each is what the script has built, before a step was made or a state loaded: the same script gives
the same facts in every process.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from manualloop.checkpoint.functions import (
    describe_function,
    function_facts,
    method_code,
    moved_by,
)
from manualloop.internals import unwrap_optimizer
from manualloop.models import config_of, digest_of_weights, unwrap_model
from manualloop.objects import walk
from manualloop.optimizers.schedules import PlannedLR, own_schedule
from manualloop.passing import is_clock, without_root

Facts = dict[str, Any]
"""Plain data by name: numbers, texts, and lists of them."""

_SCALARS = (bool, int, float, str)


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
    return describe_function(value) if callable(value) else type(value).__qualname__


def described(name: str, value: Any) -> Facts:
    """Describe an argument by its name; of a function also the values that it reads.

    >>> described("max_grad_norm", 1.0), described("loss_fn", len)
    ({'max_grad_norm': 1.0}, {'loss_fn': 'builtins.len'})
    """
    if not callable(value):
        return {name: plain(value)}
    text, values = function_facts(value)
    return {name: text} | {f"{key} of {name}": read for key, read in values.items()}


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
    settings = module_settings(whole)
    by_kind: dict[str, Counter[str]] = {}
    for _, kind, name, value in settings:
        by_kind.setdefault(f"{kind}.{name}", Counter())[value] += 1
    facts["modules"] = {name: _counted(values) for name, values in by_kind.items()}
    facts["places of modules"] = _digest(*map(repr, settings))
    kinds = {type(module).__qualname__: type(module) for module in whole.modules()}
    code = {name.removeprefix("FSDP"): method_code(kind, "forward") for name, kind in kinds.items()}
    return facts | {f"code of {name}": text for name, text in code.items() if text is not None}


def held_models(functions: Mapping[str, Any], parts: Mapping[str, Any]) -> Facts:
    """Describe the models that functions hold, such as the reference of a loss, by their weights.

    Those that the state of a run holds, too, are trained or saved, and are left out.

    Args:
        functions: The functions by their names.
        parts: The parts of the state by their names.
    """
    own = {id(weight) for _, model in _models_in(parts) for weight in model.parameters()}
    facts: Facts = {}
    for name, function in functions.items():
        found = [
            f"{path.removeprefix(name).lstrip('.') or name}: {type(unwrap_model(model)).__name__} "
            f"(weights {digest_of_weights(model)})"
            for path, model in _models_in({name: function})
            if next(model.parameters(), None) is not None
            and own.isdisjoint(map(id, model.parameters()))
        ]
        facts[f"models of {name}"] = ", ".join(sorted(found)) or None
    return facts


def _models_in(owners: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Give the modules that some objects hold by their paths, without those inside of others."""
    inner: set[int] = set()
    for path, part in walk(owners, skips_empty=True):
        module = part.value
        if issubclass(type(module), nn.Module) and id(module) not in inner:
            inner.update(map(id, module.modules()))
            yield path, module


def _counted(values: Counter[str]) -> str:
    """Return values with their numbers: "0.1", or "0.1 (37 times), 0.0 (2 times)"."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({number} times)" for value, number in sorted(values.items())[:9])


def module_settings(model: nn.Module) -> list[tuple[str, str, str, str]]:
    """List path, class, name and value of the plain attributes of all modules."""
    modules = dict(model.named_modules())
    moving = {kind: moved_by(kind, "forward") for kind in set(map(type, modules.values()))}
    found: list[tuple[str, str, str, Any]] = []
    for path, module in modules.items():
        kind = type(module).__name__.removeprefix("FSDP")  # what fully_shard makes of a class
        for name, value in vars(module).items():
            if name.startswith("_") or _MOVES.search(name) or name in moving[type(module)]:
                continue
            parts = value if isinstance(value, tuple) else (value,)
            if all(isinstance(part, _SCALARS) for part in parts):
                found.append((path, kind, name, value))
    are_clocks = map(is_clock, [value for *_, value in found])
    return [
        (path, kind, name, repr(value))
        for (path, kind, name, value), is_time in zip(found, are_clocks, strict=True)
        if not is_time
    ]


# What a forward pass changes, or what saves memory and changes no number.
_MOVES = re.compile(r"training$|cache|gradient_checkpointing|^name_or_path$|^num_batches_tracked$")


def _config_facts(config: Any) -> Facts:
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return {}
    return {
        key: plain(without_root(value) if isinstance(value, str) else value)
        for key, value in to_dict().items()
        if key not in _NO_SETTINGS
    }


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


def schedule_class(lr_scheduler: Any) -> str | None:
    """Name the class whose state a schedule has; those given by name have a ``LambdaLR``'s."""
    lr_scheduler = own_schedule(lr_scheduler)
    if lr_scheduler is None:
        return None
    if isinstance(lr_scheduler, tuple):  # of several optimizers
        return ", ".join(str(schedule_class(one)) for one in lr_scheduler)
    kind = LambdaLR if isinstance(lr_scheduler, PlannedLR) else type(lr_scheduler)
    return kind.__name__


def schedule_facts(lr_scheduler: Any) -> tuple[str | None, Facts]:
    """Describe a schedule.

    Returns:
        Its kind with the settings that its state does not hold, such as the function of a
        ``LambdaLR``, and the settings that its state holds, such as the gamma of a ``StepLR``.
    """
    lr_scheduler = own_schedule(lr_scheduler)
    if lr_scheduler is None:
        return None, {}
    if isinstance(lr_scheduler, tuple):  # of several optimizers
        parts = [schedule_facts(one) for one in lr_scheduler]
        of_all = {f"{i}.{name}": v for i, (_, own) in enumerate(parts) for name, v in own.items()}
        return ", ".join(str(kind) for kind, _ in parts), of_all
    kind = type(lr_scheduler).__name__
    functions = getattr(lr_scheduler, "lr_lambdas", None)
    if isinstance(lr_scheduler, PlannedLR):
        kind = _planned_name(lr_scheduler.settings)
    elif isinstance(functions, list):
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
        elif name == "milestones" and isinstance(value, Mapping):  # a MultiStepLR's, counted
            found[name] = sorted(int(at) for at, number in value.items() for _ in range(number))
        else:
            found[str(name)] = plain(value)
    return found


# Of a schedule: its place, the rates of the optimizer, and functions.
_OF_SCHEDULES = {
    *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"),
    *("T_cur", "T_i", "base_lrs", "lr_lambdas", "verbose"),
}


def _planned_name(settings: Facts) -> str:
    """Name a schedule that was given by name; its length is that of the run."""
    given = {k: v for k, v in settings.items() if k not in ("name", "num_training_steps")}
    if not given["num_warmup_steps"]:
        del given["num_warmup_steps"]
    inside = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"{settings['name']}({inside})" if inside else str(settings["name"])


def _schedule_name(function: Any) -> str:
    """Name the function of a schedule: those of transformers as their users do."""
    inner = function.func if isinstance(function, partial) else function
    name = getattr(inner, "__name__", "")
    found = re.fullmatch(r"_get_(\w+?)(_schedule)?(_with_warmup)?(_lr_lambda|_lambda)", name)
    if found is None or not isinstance(function, partial):
        return describe_function(function)
    settings = {k: v for k, v in function.keywords.items() if k != "num_training_steps"}
    if not settings.get("num_warmup_steps"):
        settings.pop("num_warmup_steps", None)
    inside = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    return f"{found[1]}({inside})" if inside else found[1]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
