"""Optimizer and schedule of a script, from their names or from the objects."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn

from manualloop.optimizers.schedules import PlannedLR
from manualloop.script.job import Job
from manualloop.script.loading import FILL_IN, is_plain
from manualloop.script.text import Call, Line, Note, Part, literal, when
from manualloop.strategy.select import best_accelerator


def optimizer(job: Job) -> Part:
    """The device, the optimizer and the schedule."""
    schedule_lines, imports = _schedule(job)
    length, needs_math = _length(job)
    lines: list[Line] = [
        *_device(job),
        *_optimizer(job),
        *when(
            job["max_grad_norm"] is not None and not clips_all(job),
            "# Their order decides the last bits of the norm.",
            'parameters = [p for group in optimizer.param_groups for p in group["params"]]',
        ),
        *length,
        *schedule_lines,
        *_prepared(job),
    ]
    kind = type(job.optimizers[0])
    if not _is_of_torch(kind) and FILL_IN not in str(lines):
        imports.append(f"from {kind.__module__} import {kind.__name__}")
    imports += ["import math"] if needs_math else []
    title = "The optimizer, and a learning rate for each of its updates."
    return Part(lines, ("import torch", *imports), title)


def accelerator(job: Job) -> Part:
    """The Accelerator, which every process makes first."""
    if not job.is_distributed:
        return Part([])
    precision = [f'mixed_precision="{job.precision}"'] if job.precision != "no" else []
    return Part(
        [
            Note(
                "The same script runs in every process: torchrun --nproc_per_node 2 script.py. "
                "Without cpu=True, on a machine without an accelerator, each process would train "
                "alone."
            ),
            Call(
                "accelerator = Accelerator(",
                ["cpu=not torch.accelerator.is_available()", *precision],
            ),
        ],
        ("from accelerate import Accelerator", "import torch"),
    )


def _device(job: Job) -> list[Line]:
    if job.is_distributed:
        return []
    if job["strategy"] is not None or job.strategy.device.type != (best_accelerator() or "cpu"):
        return [f'device = torch.device("{job.strategy.device}")', "model.to(device)"]
    return [
        'device = torch.device("cpu")',
        "if torch.accelerator.is_available():",
        ["device = torch.accelerator.current_accelerator()"],
        "model.to(device)",
    ]


def _optimizer(job: Job) -> list[Line]:
    (found,) = job.optimizers
    kind, groups = type(found), found.param_groups
    name = f"torch.optim.{kind.__name__}" if _is_of_torch(kind) else kind.__name__
    options = _options(job) if _is_of_torch(kind) or is_importable(kind) else None
    notes = []
    if "AdamW" in name and options is not None and options.get("weight_decay") == 0.0:
        notes.append("Without torch's default decay of 0.01")
    if options is not None and options.get("fused"):
        notes.append("fused: one kernel updates all parameters")
    if options is not None and len(groups) == 1 and holds_all(job.model, groups):
        return [
            *when(notes, f"# {'; '.join(notes)}."),
            Call(f"optimizer = {name}(", ["model.parameters()", *_keywords(options)]),
        ]
    if options is not None and _is_decay_pair(job.model, groups):
        options.pop("weight_decay", None)
        return [
            "# Biases and the weights of normalisations, with one axis, are not decayed.",
            "trained = [p for p in model.parameters() if p.requires_grad]",
            f"optimizer = {name}(",
            [
                "[",
                [
                    "{",
                    [
                        '"params": [p for p in trained if p.ndim >= 2],',
                        f'"weight_decay": {groups[0]["weight_decay"]},',
                    ],
                    "},",
                    '{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},',
                ],
                "],",
                *(f"{keyword}," for keyword in _keywords(options)),
            ],
            ")",
        ]
    return [f"optimizer = ...  # {FILL_IN}: the {kind.__name__} of {len(groups)} groups, as before"]


def _is_of_torch(kind: type) -> bool:
    return getattr(torch.optim, kind.__name__, None) is kind


def is_importable(thing: Any) -> bool:
    """Tell whether another script can import a function or a class by its name."""
    module = sys.modules.get(thing.__module__)
    is_there = getattr(module, getattr(thing, "__qualname__", ""), None) is thing
    return is_there and thing.__module__ != "__main__"


def _options(job: Job) -> dict[str, Any] | None:
    """Return the options of the optimizer that are not the defaults of its class.

    None: an optimizer that is built with them is another one.
    """
    (optimizer,) = job.optimizers
    group = dict(optimizer.param_groups[0])
    if job["lr_scheduler"] is not None:
        group["lr"] = group.get("initial_lr", group.get("lr"))  # before a schedule has changed it
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(optimizer).__init__).parameters.items()
    }
    found = {name: group.get(name, value) for name, value in optimizer.defaults.items()}
    options = {
        name: value
        for name, value in found.items()
        if name in defaults and (name == "lr" or value != defaults[name])
    }
    if not all(map(is_plain, options.values())):
        return None  # a rate that is a tensor, for instance
    try:
        built = type(optimizer)([nn.Parameter(torch.zeros(1))], **options)
    except Exception:  # of a class of anybody's
        return None
    names = {name for one in (group, built.param_groups[0]) for name in one} - _OF_GROUP
    is_same = all(group.get(name, ...) == built.param_groups[0].get(name, ...) for name in names)
    return options if is_same else None


_OF_GROUP = {"params", "param_names", "initial_lr"}


def _keywords(options: dict[str, Any]) -> list[str]:
    return [f"{name}={literal(value)}" for name, value in options.items()]


def clips_all(job: Job) -> bool:
    """Tell whether clipping sees the parameters of the model, in their order."""
    return holds_all(job.model, job.optimizers[0].param_groups)


def holds_all(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    """Tell whether the groups hold all trainable parameters, in their order."""
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    held = [id(p) for group in groups for p in group["params"] if p.requires_grad]
    return held == trained


def _is_decay_pair(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    if len(groups) != 2 or groups[1].get("weight_decay") != 0.0:
        return False
    trained = [p for p in model.parameters() if p.requires_grad]
    pair = [[id(p) for p in trained if p.ndim >= 2], [id(p) for p in trained if p.ndim < 2]]
    others = [{n: v for n, v in g.items() if n not in ("params", "weight_decay")} for g in groups]
    return pair == [[id(p) for p in g["params"]] for g in groups] and others[0] == others[1]


def _length(job: Job) -> tuple[list[Line], bool]:
    """Return the line that counts the updates of the run."""
    if job["max_steps"] is not None:
        return ["num_training_steps = MAX_STEPS"], False
    if job.preparation is None:
        num_batches = "len(train_dataloader)"
    elif job.is_distributed:
        rows = "len(train_dataset)"
        if job.loader.batch_sampler.drop_last:
            rows = "len(train_dataset) // BATCH_SIZE * BATCH_SIZE"
        size = "(BATCH_SIZE * accelerator.num_processes)"
        num_batches = f"math.ceil({rows} / {size})"
    else:
        num_batches = "len(training_batches(epoch=0))"
    if not job.accumulates:
        return [f"num_training_steps = NUM_EPOCHS * {num_batches}"], job.is_distributed
    return [
        f"num_batches = {num_batches}",
        "# Updates, not batches: the schedule is stepped once an update.",
        "num_training_steps = NUM_EPOCHS * math.ceil(num_batches / ACCUMULATION)",
    ], True


def _schedule(job: Job) -> tuple[list[Line], list[str]]:
    schedule = job["lr_scheduler"]
    if isinstance(schedule, list | tuple):
        schedule = schedule[0]
    if schedule is None:
        return ["# The learning rate stays as it is: there is no schedule."], []
    if isinstance(schedule, str):
        return _named(schedule, job["num_warmup_steps"], "num_training_steps")
    if isinstance(schedule, PlannedLR) and set(schedule.settings) <= _OF_NAMED:
        settings = schedule.settings
        return _named(
            settings["name"], settings["num_warmup_steps"], str(settings["num_training_steps"])
        )
    kind = type(schedule)
    names = [n for n in inspect.signature(kind.__init__).parameters if n not in _NOT_OPTIONS]
    values = {name: getattr(schedule, name, ...) for name in names}
    is_torch = kind.__module__.startswith("torch.optim.")
    if is_torch and all(map(is_plain, values.values())) and _is_same(schedule, values):
        arguments = [f"{name}={literal(value)}" for name, value in values.items()]
        begin = f"lr_scheduler = torch.optim.lr_scheduler.{kind.__name__}("
        return [Call(begin, ["optimizer", *arguments])], []
    return [f"lr_scheduler = ...  # {FILL_IN}: the {kind.__name__} of the optimizer, as before"], []


def _is_same(schedule: Any, values: dict[str, Any]) -> bool:
    """Tell whether a schedule that is built with these values is this one."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in schedule.base_lrs]
    try:
        built = type(schedule)(torch.optim.SGD(groups), **values)
    except Exception:  # one that needs the momentum of the optimizer, for instance
        return False
    return bool(built.state_dict() == schedule.state_dict())


_OF_NAMED = {"name", "num_training_steps", "num_warmup_steps"}
_NOT_OPTIONS = ("self", "optimizer", "last_epoch", "verbose")


def _named(name: str, num_warmup: float, num_training: str) -> tuple[list[Line], list[str]]:
    warmup, imports = repr(num_warmup), ["from transformers import get_scheduler"]
    if 0 < num_warmup < 1:
        imports.append("import math")
        warmup = f"math.ceil({num_warmup} * {num_training})"
    elif isinstance(num_warmup, float):
        warmup = repr(int(num_warmup))
    arguments = [
        literal(name),
        "optimizer",
        f"num_warmup_steps={warmup}",
        f"num_training_steps={num_training}",
    ]
    return [Call("lr_scheduler = get_scheduler(", arguments)], imports


def _prepared(job: Job) -> list[Line]:
    if not job.is_distributed:
        return []
    return [
        Note(
            "accelerate moves the model, and averages the gradients of the processes. It does not "
            "get the schedule, which it would step once for each process, nor the loader, of which "
            "it would give some rows twice."
        ),
        "model, optimizer = accelerator.prepare(model, optimizer)",
    ]
