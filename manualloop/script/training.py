"""The training loop of a script: updates, and what is due behind each."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from manualloop.checkpoint.manifest import is_lower_better
from manualloop.script.evaluation import autocast, may_be_nan, on_scores, own_loss, to_device
from manualloop.script.job import Job, seconds_of
from manualloop.script.optimizers import clips_all
from manualloop.script.text import Call, Line, Note, Part, code, when
from manualloop.times import TIME_OR_EPOCHS, parse_seconds

WINDOWS = Part(
    [
        code(
            '''
            def windows(batches, size):
                """Group the batches of an epoch into updates; the last may have fewer."""
                batches = iter(batches)
                while window := list(islice(batches, size)):
                    yield window
            '''
        )
    ],
    ("from itertools import islice",),
)


def loop(job: Job) -> list[Part]:
    """The loop over epochs, windows and batches, with everything that it needs before."""
    lines: list[Line] = [*_start(job), *_epochs(job), *_end(job)]
    imports = ["import torch"]
    if job["progress_bar"]:
        imports.append("from tqdm.auto import tqdm")
    if job["max_steps"] is not None:
        imports.append("from itertools import count")
    if _tells_time(job):
        imports.append("import time")
    if may_be_nan(job):
        imports.append("import math")
    if job.is_distributed and job.accumulates:
        imports.append("from contextlib import nullcontext")
    if _leaves_early(job):
        lines = ["def train():", lines, "", "", "train()"]
    training = Part(lines, tuple(imports), "The training.")
    return [WINDOWS, training] if job.accumulates else [training]


def _tells_time(job: Job) -> bool:
    saves = job["checkpoint_dir"] is not None and seconds_of(job["checkpoint_every"])
    return bool(saves or job["max_time"])


def _divides_epochs(job: Job) -> bool:
    names = [*when(job.evaluation is not None, "evaluate_every")]
    names += when(job["checkpoint_dir"] is not None, "checkpoint_every")
    cadences = [job[str(name)] for name in names]
    return any(isinstance(c, str) and "epoch" in c and _share(c) != 1 for c in cadences)


def _leaves_early(job: Job) -> bool:
    return bool(job["max_steps"] is not None or job["patience"] or job["max_time"])


def _start(job: Job) -> list[Line]:
    bar = "tqdm(range(num_training_steps))"
    if job.is_distributed:
        bar = "tqdm(range(num_training_steps), disable=not accelerator.is_main_process)"
    return [
        *when(_leaves_early(job) and job["checkpoint_dir"] is not None, "global step"),
        *when(job["progress_bar"], f"progress_bar = {bar}"),
        *when(job.precision == "fp16", "scaler = torch.amp.GradScaler(device.type)"),
        *_no_best(job),
        *when(job["patience"], "num_since_best = 0"),
        *when(_notes_scores(job), "scored_at = 0"),
        *when(_tells_time(job), "begin = saved_at = time.monotonic()"),
        *when(_divides_epochs(job), "num_steps_per_epoch = num_training_steps // NUM_EPOCHS"),
        "step = 0",
        "model.train()",
    ]


def _no_best(job: Job) -> list[Line]:
    best = job["best_metric"]
    if not may_be_nan(job):
        return when(best, "best_metrics = {}")
    return [f"best_metrics, best_score = {{}}, {'' if is_lower_better(best) else '-'}math.inf"]


def _notes_scores(job: Job) -> bool:
    return job.may_skip and job["max_steps"] is None and _is_scored_inside(job)


def _epochs(job: Job) -> list[Line]:
    epochs = "count()" if job["max_steps"] is not None else "range(NUM_EPOCHS)"
    source = "training_batches(epoch)" if job.preparation is not None else "train_dataloader"
    if job.accumulates:
        head = f"for window in windows({source}, ACCUMULATION):"
        update = _window(job)
    elif job.is_distributed:
        head, update = f"for batch, is_spare in {source}:", _one_of_a_rank(job)
    else:
        head, update = f"for batch in {source}:", _one(job)
    announced = _set_epoch(job)
    epoch = "epoch" if announced or job.preparation is not None else "_"
    return [
        f"for {epoch} in {epochs}:",
        [
            *announced,
            head,
            [*update, *_apply(job), *_behind_update(job)],
            *_behind_epoch(job),
        ],
    ]


def _end(job: Job) -> list[Line]:
    """What is due behind the last update, where nobody knew before which one that is."""
    if not job.may_skip or job["max_steps"] is not None:
        return []
    lines: list[Line] = []
    if _is_scored_inside(job):
        lines += ["if scored_at != step:  # the last updates were skipped", on_scores(job)]
    if job["checkpoint_dir"] is not None and not _is_by_epoch(job["checkpoint_every"]):
        lines += ['if not (RUN / f"last-{step:08d}").exists():', [_save(job)]]
    return lines


def _is_scored_inside(job: Job) -> bool:
    return job.evaluation is not None and not _is_by_epoch(job["evaluate_every"])


def _set_epoch(job: Job) -> list[Line]:
    if job.preparation is not None:
        return []
    loader: Any = job.loader
    if hasattr(loader, "set_epoch"):
        return ["train_dataloader.set_epoch(epoch)"]
    names = ("batch_sampler", "sampler", "dataset")
    return [
        f"train_dataloader.{name}.set_epoch(epoch)"
        for name in names
        if hasattr(getattr(loader, name, None), "set_epoch")
    ]


def _forward(job: Job) -> list[Line]:
    if job["loss_fn"] is not None:
        return autocast(job, [own_loss(job, counts=not job.weighs)])
    if job["terms"] is not None:
        found = f"{job['terms'].__name__}(model(**batch), batch)"
        return autocast(job, [f"loss = sum(mean for mean, items in {found} if items)"])
    return autocast(job, ["loss = model(**batch).loss"])


def _backward(job: Job) -> str:
    if job.is_distributed:
        return "accelerator.backward(loss)"
    if job.precision == "fp16":
        return "scaler.scale(loss).backward()  # small gradients would be 0 in float16"
    return "loss.backward()"


def _one(job: Job) -> list[Line]:
    """One batch is the whole update, and its mean loss the loss of it."""
    is_counted = job.may_lack_items and not job.returns_items
    return [
        *when(is_counted, f"items = {job.items()}"),
        *to_device(job),
        *_forward(job),
        *when(
            job.may_lack_items or job.returns_items,
            "if items == 0:",
            ["continue  # no label to learn from: the mean is 0 / 0"],
        ),
        _backward(job),
    ]


def _one_of_a_rank(job: Job) -> list[Line]:
    """One batch a process; the update is that of all of them together."""
    return [
        Note(
            "The loss is the mean over the items of all processes. DDP averages the processes' "
            "gradients, which is right only if all have as many items: so each loss is weighted by "
            "its share of the items."
        ),
        f"items = 0 if is_spare else {job.items()}",
        "counted = torch.tensor(items, device=accelerator.device)",
        "total = accelerator.reduce(counted).item()",
        *to_device(job),
        *_forward(job),
        f"loss = loss * (items * accelerator.num_processes / {_divisor(job)})",
        *when(job.may_lack_items, "loss = loss.nan_to_num()  # a mean over no item is 0 / 0"),
        _backward(job),
        "loss = accelerator.reduce(loss.detach()) / accelerator.num_processes",
        *_without_items(job),
    ]


def _divisor(job: Job) -> str:
    return "max(total, 1)" if job.may_lack_items else "total"


def _without_items(job: Job) -> list[Line]:
    """The lines that skip an update in which no batch has a label."""
    clear: list[Line] = ["optimizer.zero_grad()"] if job.is_distributed else []
    left: list[Line] = [*clear, "continue  # no label to learn from"]
    return when(job.may_lack_items, "if total == 0:", left)


def _window(job: Job) -> list[Line]:
    """Several batches in one update, weighted by their items."""
    batch = "batch, is_spare" if job.is_distributed else "batch"
    items = job.items() if not job.is_distributed else f"0 if is_spare else {job.items()}"
    scale = "items / total"
    total: list[Line] = ["total = sum(num_items)"]
    if job.is_distributed:
        scale = f"items * accelerator.num_processes / {_divisor(job)}"
        total = [
            "counted = torch.tensor(sum(num_items), device=accelerator.device)",
            "total = accelerator.reduce(counted).item()  # of all processes",
        ]
    inner: list[Line] = [
        *to_device(job),
        *_forward(job),
        *when(
            job.may_lack_items and not job.is_distributed,
            "if items == 0:",
            ["continue  # its mean is 0 / 0"],
        ),
        f"loss = loss * ({scale})",
        *when(
            job.may_lack_items and job.is_distributed,
            "loss = loss.nan_to_num()  # a mean over no item is 0 / 0",
        ),
        _backward(job),
        "window_loss += loss.detach()",
    ]
    if job.is_distributed:
        inner = [
            "# Gradients are exchanged once an update, with those of the last batch.",
            "is_last = number == len(window) - 1",
            "with nullcontext() if is_last else accelerator.no_sync(model):",
            inner,
        ]
        pairs = "for number, ((batch, _), items) in enumerate(zip(window, num_items)):"
    else:
        pairs = "for batch, items in zip(window, num_items):"
    return [
        Note(
            "The lesson of accumulation: the loss of an update is the mean over the items of all "
            "its batches. Dividing each batch's mean by their number gives the rows of a short "
            "batch too much weight; each counts by its share of the items instead."
        ),
        Call("num_items = [", [f"{items} for {batch} in window"], "]"),
        *total,
        "window_loss = 0.0",
        pairs,
        inner,
        *when(
            job.is_distributed,
            "loss = accelerator.reduce(window_loss) / accelerator.num_processes",
        ),
        *_without_items(job),
        *when(not job.is_distributed, "loss = window_loss"),
    ]


def _apply(job: Job) -> list[Line]:
    """Clip, look at the loss, update the weights, step the schedule."""
    norm = job["max_grad_norm"]
    lines: list[Line] = []
    if norm is not None:
        clip = "torch.nn.utils.clip_grad_norm_"
        if job.is_distributed:
            clip = "accelerator.clip_grad_norm_"
        if job.precision == "fp16":
            lines.append("scaler.unscale_(optimizer)  # the norm is that of the true gradients")
        clipped = "model.parameters()" if clips_all(job) else "parameters"
        lines.append(f"grad_norm = {clip}({clipped}, {float(norm)})")
    watched = "loss" if norm is None else "loss + grad_norm"
    if job["on_nonfinite"] == "raise":
        lines += [
            f"if not torch.isfinite({'loss' if job.precision == 'fp16' else watched}):",
            [
                'raise FloatingPointError(f"the loss of step {step + 1} is {loss}")',
            ],
        ]
    if job["on_nonfinite"] == "skip":
        lines += [
            f"if not torch.isfinite({'loss' if job.precision == 'fp16' else watched}):",
            ["optimizer.zero_grad()", "continue  # leaves the weights as they are"],
        ]
    schedule = job["lr_scheduler"] is not None
    if job.precision == "fp16":
        return [*lines, *_scaled(schedule)]
    return [
        *lines,
        "optimizer.step()",
        *when(schedule, "lr_scheduler.step()"),
        "optimizer.zero_grad()",
        "step += 1",
    ]


def _scaled(schedule: bool) -> list[Line]:
    return [
        "scale = scaler.get_scale()",
        "scaler.step(optimizer)",
        "scaler.update()",
        "optimizer.zero_grad()",
        "if scaler.get_scale() < scale:",
        ["continue  # an overflow: the update was skipped, and the schedule waits"],
        *when(schedule, "lr_scheduler.step()"),
        "step += 1",
    ]


def _behind_update(job: Job) -> list[Line]:
    lines: list[Line] = []
    if job["progress_bar"]:
        lines.append("progress_bar.update(1)")
        if isinstance(job["log_every"], int):
            lines += [
                f"if step % {job['log_every']} == 0:  # to read a loss waits for the device",
                ["progress_bar.set_postfix(loss=loss.item())"],
            ]
    return [*lines, *_due(job, in_epoch=True)]


def _behind_epoch(job: Job) -> list[Line]:
    return _due(job, in_epoch=False)


def _due(job: Job, *, in_epoch: bool) -> list[Line]:
    """Return what is due behind an update, or behind an epoch."""
    lines: list[Line] = []
    if job.evaluation is not None and _is_by_epoch(job["evaluate_every"]) != in_epoch:
        scored: list[Line] = [*on_scores(job), *when(_notes_scores(job), "scored_at = step")]
        if job["patience"]:
            scored += [f"if num_since_best >= {job['patience']}:", [*_leave(job)]]
        lines += [f"if {_condition(job, 'evaluate_every')}:", scored] if in_epoch else scored
    if in_epoch and job["max_time"]:
        seconds = parse_seconds("max_time", job["max_time"])
        lines += [f"if time.monotonic() - begin > {seconds}:", [*_leave(job)]]
    if job["checkpoint_dir"] is not None and _is_by_epoch(job["checkpoint_every"]) != in_epoch:
        save = _save(job)
        if in_epoch:
            reset = when(seconds_of(job["checkpoint_every"]), "saved_at = time.monotonic()")
            lines += [f"if {_condition(job, 'checkpoint_every')}:", [save, *reset]]
        else:
            lines.append(save)
    if job["max_steps"] is not None:
        lines += ["if step == num_training_steps:", ["break" if in_epoch else "return"]]
    return lines


def _leave(job: Job) -> list[Line]:
    return [*when(job["checkpoint_dir"] is not None, _save(job)), "return"]


def _save(job: Job) -> str:
    return f'save("last", keep={job["keep_checkpoints"]})'


def _is_by_epoch(cadence: Any) -> bool:
    return isinstance(cadence, str) and "epoch" in cadence and _share(cadence) == 1


def _condition(job: Job, name: str) -> str:
    cadence, last = job[name], "step == num_training_steps"
    if isinstance(cadence, int):
        return f"step % {cadence} == 0 or {last}"
    if seconds := seconds_of(cadence):
        return f"time.monotonic() - saved_at > {seconds:g} or {last}"
    share = _share(cadence)
    scaled = "step" if share.denominator == 1 else f"step * {share.denominator}"
    before = "(step - 1)" if share.denominator == 1 else f"(step - 1) * {share.denominator}"
    period = "num_steps_per_epoch"
    if share.numerator > 1:
        period = f"({share.numerator} * {period})"
    return f"{scaled} // {period} > {before} // {period}"


def _share(cadence: str) -> Fraction:
    parts = TIME_OR_EPOCHS.fullmatch(cadence)
    assert parts is not None
    return Fraction(parts[1] or 1)
