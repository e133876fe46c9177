"""What of a call cannot be written as a script, each with the reason and what to do instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from manualloop.checkpoint.manifest import metric_name
from manualloop.data.kept import inner_collate
from manualloop.data.nested import NestedCollate
from manualloop.data.preparation import Preparation, preparation_of
from manualloop.models import unwrap_model
from manualloop.optimizers.access import schedule_free
from manualloop.optimizers.schedules import schedules_of
from manualloop.script.job import Job, seconds_of, source_of
from manualloop.script.optimizers import is_importable
from manualloop.script.scores import PREDICTIONS, find_scores
from manualloop.script.trial import TOGETHER, problems_of_batches, problems_of_grouping
from manualloop.strategy.accelerated import Accelerated
from manualloop.strategy.single import SingleDevice
from manualloop.tasks.loss import declared_items
from manualloop.tasks.places import POSITIONS
from manualloop.tasks.task import count_targets


def problems_of(job: Job) -> Iterator[str]:
    """Yield what cannot be written out, each with the reason and what to do."""
    for name, reason in _NOT_WRITTEN.items():
        if job.arguments.get(name):
            yield f"{name}= is not written out: {reason}"
    if job["resume"] is True:
        yield "resume=True needs a checkpoint, and a script begins anew. Leave resume out."
    yield from _problems_of_strategy(job)
    yield from _problems_of_model(job)
    yield from _problems_of_optimizers(job)
    yield from _problems_of_data(job)
    yield from _problems_of_loss(job)
    yield from _problems_of_scores(job)
    for name, needed in (("evaluate_every", "evaluate"), ("checkpoint_every", "checkpoint_dir")):
        is_share = isinstance(job[name], str) and "epoch" in job[name] and job[name] != "epoch"
        if job[needed] is not None and is_share and job["max_steps"] is not None:
            yield (
                f"{name}={job[name]!r} with max_steps is not written out. Give a number of "
                f"updates: {name}=100."
            )
    for name in ("evaluate_every", "checkpoint_every"):
        decides = name == "evaluate_every" and job["patience"]
        is_share = isinstance(job[name], str) and "epoch" in job[name] and job[name] != "epoch"
        if is_share and job.may_skip and (decides or job["on_nonfinite"] == "skip"):
            yield (
                f"{name}={job[name]!r} is not written out where updates may be skipped, as the "
                f'number of updates is not known before. Use {name}="epoch", or a number.'
            )
    if job["evaluate"] is not None and seconds_of(job["evaluate_every"]):
        yield (
            f"evaluate_every={job['evaluate_every']!r} depends on the clock. Give a number of "
            'updates or "epoch", so that the script evaluates at the same places.'
        )


_NOT_WRITTEN = {
    "step_fn": (
        "it replaces the update, which is what a script shows. Eject the call without it, and "
        "change the update in the script."
    ),
    "on_step": (
        "it gets a Step of this library. Eject the call without it, and write what it does behind "
        "optimizer.step()."
    ),
    "trackers": (
        "they get the records of this library. Eject the call without them, and log in the script."
    ),
    "extras": (
        "they belong to step_fn, on_step or evaluate, which use them in ways of their own. Eject "
        "the call without them."
    ),
}


def _problems_of_strategy(job: Job) -> Iterator[str]:
    strategy: Any = job.strategy
    if getattr(strategy, "compile", False):
        yield (
            "compile= is not written out. Eject the call without it, and add "
            "model.compile(dynamic=True) behind model.to(device)."
        )
    if isinstance(strategy, SingleDevice):
        return
    if not isinstance(strategy, Accelerated):
        yield (
            f"strategy is a {type(strategy).__name__}, which is not written out. Eject the call "
            'with strategy="auto", or with an Accelerator.'
        )
        return
    accelerator = strategy.accelerator
    dynamo = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", "NO")
    if str(getattr(dynamo, "value", dynamo)) != "NO" or accelerator.ddp_handler is not None:
        yield (
            "the Accelerator compiles the model, or has a DistributedDataParallelKwargs, which is "
            "not written out. Eject the call without, and pass it to the Accelerator of the script."
        )
    kind = str(getattr(strategy.accelerator.distributed_type, "value", ""))
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        yield (
            f"the Accelerator is one of {kind}, which shards the model. A script is written for "
            "processes that each hold all of it."
        )
    if job.precision not in ("no", "bf16"):
        yield (
            f'mixed_precision="{job.precision}" with an Accelerator is not written out. Use "bf16".'
        )
    if job.preparation is None:
        yield (
            "with an Accelerator the script distributes the rows itself, and of a loader of your "
            "own it knows none. Make it with prepare_dataloaders."
        )


def _problems_of_model(job: Job) -> Iterator[str]:
    yield from job.loading.problems
    inner = unwrap_model(job.model)
    if inner.training and not all(module.training for module in inner.modules()):
        names = [name for name, module in inner.named_modules() if not module.training]
        yield (
            f"{len(names)} modules of the model are in eval mode ({names[0]} is the first), and a "
            "script would put all of them into training. Call model.train()."
        )


def _problems_of_optimizers(job: Job) -> Iterator[str]:
    own = {id(parameter) for parameter in job.model.parameters()}
    for optimizer in job.optimizers:
        if optimizer is None:
            continue
        if optimizer.state:
            yield (
                f"the {type(optimizer).__name__} has made updates already, and a script begins "
                "anew. Build a new one."
            )
        if schedule_free([optimizer]):
            yield (
                f"a {type(optimizer).__name__} has other weights in evaluations, which is not "
                "written out. Eject the call with another optimizer, and change it in the script."
            )
        if (name := _changed_step(optimizer)) is not None:
            yield (
                f"the {type(optimizer).__name__} {name}, which is not written out. Eject the call "
                "with the optimizer as it is built, and make the change in the script."
            )
        groups = optimizer.param_groups
        if any(id(p) not in own for group in groups for p in group["params"]):
            yield (
                f"the {type(optimizer).__name__} updates parameters that are not the model's. "
                "Put them into the model."
            )
    schedules = job["lr_scheduler"]
    listed = schedules if isinstance(schedules, list | tuple) else [schedules]
    if len(listed) > 1 or len(job.optimizers) > 1:
        yield (
            f"{len(job.optimizers)} optimizers are not written out. Eject the call with one, and "
            "add the others to the script: each is stepped behind optimizer.step()."
        )
    for schedule in schedules_of([one for one in listed if not isinstance(one, str)]):
        rates = [group["lr"] for group in schedule.optimizer.param_groups]
        if rates != schedule.get_last_lr():
            yield (
                f"the learning rates are {rates}, and {schedule.get_last_lr()} by the "
                f"{type(schedule).__name__}. Change them before the schedule is built."
            )
        if getattr(schedule, "last_epoch", 0) > 0:
            yield (
                f"the {type(schedule).__name__} has made {schedule.last_epoch} steps already, and "
                "a script begins anew. Build a new one."
            )


def _changed_step(optimizer: Any) -> str | None:
    """Return what was done to the steps of an optimizer after it was built; None: nothing."""
    if any(hooks for name, hooks in vars(optimizer).items() if re.search("step.*hooks$", name)):
        return "has hooks"
    step = getattr(vars(optimizer).get("step"), "__func__", vars(optimizer).get("step"))
    is_of_torch = getattr(step, "__module__", "torch.").startswith("torch.")  # a schedule's
    return None if is_of_torch else "has a step() of its own"


def _problems_of_data(job: Job) -> Iterator[str]:
    loaders = {"the training loader": job.loader}
    if job.evaluation is not None:
        loaders["the loader of evaluate"] = job.evaluation.loader
    for name, loader in loaders.items():
        made = preparation_of(loader)
        if made is None:
            continue
        if not hasattr(loader.dataset, "__len__"):
            yield f"{name} reads a stream, which is not written out. Use a dataset with a length."
            continue
        if isinstance(inner_collate(loader.collate_fn), NestedCollate):
            yield f"{name} compares several lists of tokens a row, which is not written out."
        if getattr(loader.tokenizer, "padding_side", None) == "left" and any(
            position in loader.dataset.column_names for position in POSITIONS
        ):
            yield f"{name} pads on the left, which moves the positions of answers. Pad right."
        for argument in made.others:
            is_order = argument in ("max_tokens", "pack") and loader is not job.loader
            if argument != "preprocess" and not is_order:
                yield (
                    f"{name} was made with {argument}=, which is not written out: "
                    f"{_UNWRITTEN_DATA[argument]}"
                )
    if job.preparation is not None and hasattr(job.loader.dataset, "column_names"):
        yield from _problems_of_splits(job, job.preparation)
    batch = job.batch
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if job.preparation is None and not (
        isinstance(parts, Iterable)
        and not isinstance(parts, Tensor)
        and all(isinstance(part, Tensor) for part in parts)
    ):
        yield (
            f"the first batch is a {type(batch).__name__}, and a script is written for batches "
            "that are dicts or lists of tensors. Let the collate_fn return a dict of tensors."
        )
    if job.preparation is not None and job.preparation.kept and job["loss_fn"] is not None:
        yield "loss_fn may read columns of keep=, which the script leaves out. Leave keep= out."


def _problems_of_splits(job: Job, made: Preparation) -> Iterator[str]:
    """Yield what of prepared rows and batches is otherwise than the script would make it."""
    yield from problems_of_grouping(job, made)
    is_padded = made.collate_fn is None and "pack" not in made.others
    if is_padded:
        yield from problems_of_batches(job, "the training loader", job.loader, made)
    if job.evaluation is None or job.evaluation.preparation is None:
        return
    name, loader, other = (
        "the loader of evaluate",
        job.evaluation.loader,
        job.evaluation.preparation,
    )
    if loader.batch_sampler.drop_last:
        yield (
            f"{name} drops rows, and a script scores all. Prepare another one of the same rows: "
            'prepare_dataloaders({"validation": rows}, tokenizer, model=model).'
        )
    trained = set(job.loader.dataset.column_names) - made.kept
    scored = set(loader.dataset.column_names) - other.kept
    if trained != scored:
        yield f"only one of the loaders has a column {min(trained ^ scored)!r}. {TOGETHER}"
    elif other.collate_fn is not made.collate_fn or loader.tokenizer is not job.loader.tokenizer:
        yield f"{name} has another collate_fn or tokenizer than that of the training. {TOGETHER}"
    elif is_padded:
        yield from problems_of_batches(job, name, loader, other)


_UNWRITTEN_DATA = {
    "transform": "what it draws is a function of seed, epoch and row. Eject the call without it.",
    "pack": "the packs are made by this library. Eject the call without pack and max_tokens.",
    "max_tokens": "the batches are cut by a plan of this library. Use batch_size, and "
    "group_by_length=True to save padding.",
}


def _problems_of_loss(job: Job) -> Iterator[str]:
    if job.task.objection and job["loss_fn"] is None and job["terms"] is None:
        yield job.task.objection
    loss_fn, terms = job["loss_fn"], job["terms"]
    if job.weighs and job.returns_items and declared_items(loss_fn) is None:
        yield (
            "loss_fn counts its items itself, and a script needs them before the first backward "
            "pass. Declare them: loss_fn.items = lambda batch: ... returns the number of items."
        )
    if terms is not None and (job.weighs or job.evaluation is not None):
        yield (
            "terms are written out for updates of one batch, without an evaluation: each term is "
            "weighted by items of its own. Eject the call without evaluate, accumulation and ranks."
        )
    if terms is not None and hasattr(terms, "of_model"):
        yield "terms that ask for the model are not written out. Pass a function of outputs, batch."
    if job.task.count is count_targets and job.ignores and loss_fn is None and terms is None:
        yield (
            "labels of -100 leave out single classes of a row, and the loss of the model does not "
            "know them. Fill them, or pass a loss_fn that leaves them out."
        )
    if (job.weighs or job.evaluation is not None) and not job.items():
        yield (
            f"the loss of a {job.task.name.replace('_', ' ')} head is a sum of means over items "
            "of their own, and their weights are not written out. Use "
            "gradient_accumulation_steps=1 and one process, without evaluate."
        )
    own: Any = loss_fn or terms
    needs_items = own is not None and (job.weighs or job.evaluation is not None)
    is_here = getattr(own, "__module__", None) == "__main__"
    if needs_items and is_here and declared_items(own) is not None:
        yield (
            "the items of a batch are declared beside a function that is defined in the script "
            "that runs, and would not be copied with it. Move both into a module."
        )
    for name, function in (("loss_fn", loss_fn), ("terms", terms)):
        if function is not None:
            yield from problems_of_function(name, function)
    made = job.preparation
    if made is not None and made.collate_fn is not None:
        yield from problems_of_function("collate_fn", made.collate_fn)


def problems_of_function(argument: str, function: Any) -> Iterator[str]:
    """Yield why a function of the user's cannot be imported by a script, if it cannot."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    what = f"{argument} is {'a lambda' if '<lambda>' in name else name or type(function).__name__}"
    if not inspect.isfunction(function) or "<" in name:
        yield (
            f"{what}, which a script cannot import. Make it a function of a module: "
            f"def {argument}({'model, batch' if argument == 'loss_fn' else 'outputs, batch'}): ..."
        )
    elif module != "__main__" and not is_importable(function):
        yield (
            f"{what}, and {module} has another {name}, which a script would import. Give them "
            "names of their own."
        )
    elif module == "__main__" and source_of(function) is None:
        yield (
            f"{what}, defined in the script that runs, and its source uses names that are defined "
            "there. Move it into a module."
        )


def _problems_of_scores(job: Job) -> Iterator[str]:
    if job.evaluation is None:
        return
    found, problems = find_scores(job.evaluation.metric)
    yield from problems
    predicts = found.keys() - {"perplexity"}
    if predicts and job["loss_fn"] is not None:
        yield (
            "metrics of a run with a loss_fn are not written out, as nothing tells which outputs "
            "are predictions. Leave the metric out of evaluate, and add it to the script."
        )
    elif predicts and job.task.name not in PREDICTIONS:
        yield (
            f"the predictions of a {job.task.name.replace('_', ' ')} head are not written out. "
            "Leave the metric out of evaluate, and add it to the script."
        )
    best = job["best_metric"]
    if best is not None and not problems and metric_name(best) not in {*found, "loss"}:
        yield (
            f"best_metric={best!r} is not among the results of evaluate: "
            f"{', '.join(['loss', *found])}."
        )
