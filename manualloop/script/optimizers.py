"""Optimizer and schedule of a script, from their names or from the objects."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from manualloop.schedules import PlannedLR
from manualloop.script.job import Job
from manualloop.script.sources import FILL_IN
from manualloop.script.text import Call, Line, Note, Part, literal, when


def optimizer(job: Job) -> Part:
    """The device, the optimizer and the schedule."""
    schedule_lines, imports = _schedule(job)
    length, needs_math = _length(job)
    lines: list[Line] = [
        *_device(job),
        *_optimizer(job),
        *length,
        *schedule_lines,
        *_prepared(job),
    ]
    kind = type(job.optimizers[0])
    if not kind.__module__.startswith("torch."):
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
    if job["strategy"] is not None:
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
    name = kind.__name__
    if kind.__module__.startswith("torch."):
        name = f"torch.optim.{name}"
    options = _options(found)
    if _holds_all(job.model, groups):
        return [
            *when(
                "AdamW" in name and options.get("weight_decay") == 0.0,
                "# torch's own default decays the weights by 0.01; the Trainer's does not.",
            ),
            *when(options.get("fused"), "# fused: one kernel updates all parameters."),
            Call(f"optimizer = {name}(", ["model.parameters()", *_keywords(options)]),
        ]
    if _is_decay_pair(job.model, groups):
        options.pop("weight_decay", None)
        return [
            "# Biases and the weights of normalisations, with one axis, are not decayed.",
            "trained = [p for p in model.parameters() if p.requires_grad]",
            "optimizer = " + name + "(",
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


def _options(optimizer: Any) -> dict[str, Any]:
    """Return the options of an optimizer that are not the defaults of its class."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(optimizer).__init__).parameters.items()
    }
    group = optimizer.param_groups[0]
    found = {name: group.get(name, value) for name, value in optimizer.defaults.items()}
    if "lr" in found:
        found["lr"] = group.get("initial_lr", found["lr"])  # before a schedule has changed it
    always = {"lr"} & found.keys()
    return {
        name: value
        for name, value in found.items()
        if name in defaults and (name in always or value != defaults[name])
    }


def _keywords(options: dict[str, Any]) -> list[str]:
    return [f"{name}={literal(_plain(value))}" for name, value in options.items()]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _holds_all(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    """Tell whether the only group is that of all trainable parameters, in their order."""
    if len(groups) > 1:
        return False
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    held = [id(p) for p in groups[0]["params"] if p.requires_grad]
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
    if is_torch and all(isinstance(v, bool | int | float | str) for v in values.values()):
        arguments = [f"{name}={literal(value)}" for name, value in values.items()]
        begin = f"lr_scheduler = torch.optim.lr_scheduler.{kind.__name__}("
        return [Call(begin, ["optimizer", *arguments])], []
    return [f"lr_scheduler = ...  # {FILL_IN}: the {kind.__name__} of the optimizer, as before"], []


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
