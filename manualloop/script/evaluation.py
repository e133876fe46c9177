"""The function ``evaluate`` of a script, and what is done with its scores."""

from __future__ import annotations

from collections.abc import Iterator

from manualloop.checkpoint.manifest import is_lower_better, metric_name
from manualloop.script.job import Job
from manualloop.script.scores import NEVER_NAN, PREDICTIONS
from manualloop.script.text import Line, Note, Part, literal, when


def evaluate(job: Job) -> Part:
    """The function that scores the model."""
    if job.evaluation is None:
        return Part([])
    scores = job.scores
    predicts = bool(scores.keys() - {"perplexity"})
    may_skip = job.may_lack_items and not job.returns_items
    reading: list[Line] = [
        "for batch in eval_dataloader:",
        [
            "# Weighted by items: the mean of the batches' means would be another number.",
            *when(not job.returns_items, f"items = {job.items()}"),
            *when(may_skip, "if items == 0:", ["continue"]),
            *to_device(job),
            *_forward(job),
            *when(job.returns_items, "if items == 0:", ["continue"]),
            f"loss_sum += {'loss' if job['loss_fn'] else 'outputs.loss'}.item() * items",
            "num_items += items",
            *when(predicts and job.leaves_out, 'kept = batch["labels"] != -100'),
            *(_collect(job) if predicts else ()),
        ],
    ]
    if not job.makes_eval_loader:
        reading = [
            "# A loader draws a number at each pass, which dropout would miss afterwards.",
            "with torch.random.fork_rng():",
            reading,
        ]
    lines: list[Line] = [
        "@torch.no_grad()",
        "def evaluate():",
        [
            "model.eval()  # without dropout",
            *when(predicts, "loss_sum, num_items, predictions, references = 0.0, 0, [], []"),
            *when(not predicts, "loss_sum, num_items = 0.0, 0"),
            *reading,
            *when(job.is_distributed, *_gather(predicts)),
            "model.train()",
            "return {",
            ['"loss": loss_sum / num_items,', *(f'"{k}": {s.text},' for k, s in scores.items())],
            "}",
        ],
    ]
    imports = [score.imports for score in scores.values()]
    if job.is_distributed:
        imports.append("from accelerate.utils import gather_object")
    return Part(lines, ("import torch", *imports), "The scores, on rows that were not trained on.")


def _collect(job: Job) -> Iterator[Line]:
    predicted, labels = PREDICTIONS[job.task.name], 'batch["labels"]'
    chosen = "[kept]" if job.leaves_out else ""
    yield f"predictions += {predicted}{chosen}.tolist()"
    yield f"references += {labels}{chosen}.tolist()"


def _gather(predicts: bool) -> list[Line]:
    return [
        "# Every process has scored its share of the rows, none of them twice.",
        "found = gather_object([(loss_sum, num_items)])",
        "loss_sum, num_items = map(sum, zip(*found))",
        *when(
            predicts,
            "predictions = gather_object(predictions)",
            "references = gather_object(references)",
        ),
    ]


def to_device(job: Job) -> list[Line]:
    """The line that moves a batch to the device of the model."""
    device = "accelerator.device" if job.is_distributed else "device"
    if isinstance(job.batch, list | tuple):
        return [f"batch = [tensor.to({device}) for tensor in batch]"]
    return [f"batch = {{name: tensor.to({device}) for name, tensor in batch.items()}}"]


def _forward(job: Job) -> list[Line]:
    if job["loss_fn"] is not None:
        return autocast(job, [own_loss(job, counts=job.returns_items)])
    return autocast(job, ["outputs = model(**batch)"])


def own_loss(job: Job, *, counts: bool) -> str:
    """Return the line that calls the ``loss_fn``.

    Args:
        job: The call.
        counts: Whether the items that it returns are used.
    """
    items = f", {'items' if counts else '_'}" if job.returns_items else ""
    return f"loss{items} = {job['loss_fn'].__name__}(model, batch)"


def autocast(job: Job, lines: list[Line]) -> list[Line]:
    """Return the lines of a forward pass in its precision."""
    if job.precision == "no":
        return lines
    if job.is_distributed:
        return ["with accelerator.autocast():", lines]
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[job.precision]
    return [f"with torch.autocast(device.type, dtype={dtype}):", lines]


def on_scores(job: Job) -> list[Line]:
    """The lines that evaluate, print, and keep what is the best."""
    if job.evaluation is None:
        return []
    best, main = job["best_metric"], job.is_distributed
    lines: list[Line] = ["metrics = evaluate()"]
    shown = 'print(f"step {step}: {metrics}")'
    lines += ["if accelerator.is_main_process:", [shown]] if main else [shown]
    if best is None:
        return lines
    name, sign = literal(metric_name(best)), "<" if is_lower_better(best) else ">"
    kept, values = ["best_metrics"], ["metrics"]
    is_better = f"metrics[{name}] {sign} best_metrics[{name}]"
    if may_be_nan(job):
        worst = "math.inf" if is_lower_better(best) else "-math.inf"
        lines += [
            Note("NaN is the worst: as nothing is greater or less, it would stay the best."),
            f"score = {worst} if math.isnan(metrics[{name}]) else metrics[{name}]",
        ]
        is_better = f"score {sign} best_score"
        kept, values = [*kept, "best_score"], [*values, "score"]
    if job["patience"]:
        kept, values = [*kept, "num_since_best"], [*values, "0"]
    lines += [
        f"if not best_metrics or {is_better}:",
        [
            f"{', '.join(kept)} = {', '.join(values)}",
            *when(job["checkpoint_dir"] is not None, 'save("best", keep=1)'),
        ],
    ]
    if job["patience"]:
        lines += ["else:", ["num_since_best += 1"]]
    return lines


def may_be_nan(job: Job) -> bool:
    """Tell whether the score that decides may be NaN, as a correlation of constants is."""
    return job["best_metric"] is not None and metric_name(job["best_metric"]) not in NEVER_NAN


def saving(job: Job) -> Part:
    """The function that writes a checkpoint."""
    if job["checkpoint_dir"] is None:
        return Part([])
    tokenizer = getattr(job.loader, "tokenizer", None)
    is_pretrained = hasattr(job.model, "save_pretrained")
    model = "accelerator.unwrap_model(model)" if job.is_distributed else "model"
    held = ["optimizer", *when(job["lr_scheduler"] is not None, "lr_scheduler")]
    items = [f"{name}.state_dict()" for name in held]
    lines: list[Line] = [
        "def save(kind, keep):",
        [
            *when(
                job.is_distributed,
                "if not accelerator.is_main_process:",
                ["return"],
            ),
            "# A folder appears with one rename: a kill leaves no half checkpoint.",
            'unfinished = RUN / "unfinished"',
            "shutil.rmtree(unfinished, ignore_errors=True)",
            *when(
                is_pretrained,
                f"{model}.save_pretrained(unfinished)",
                *when(tokenizer is not None, "tokenizer.save_pretrained(unfinished)"),
            ),
            *when(
                not is_pretrained,
                "unfinished.mkdir(parents=True)",
                f'torch.save({model}.state_dict(), unfinished / "model.pt")',
            ),
            f"state = [{', '.join(items)}]",
            'torch.save(state, unfinished / "training.pt")',
            'unfinished.rename(RUN / f"{kind}-{step:08d}")',
            'for old in sorted(RUN.glob(f"{kind}-*"))[:-keep]:',
            ["shutil.rmtree(old)"],
        ],
    ]
    where = "# The weights load with from_pretrained. Nothing here resumes a run that was killed."
    mkdir = "RUN.mkdir(parents=True)  # each run has a folder of its own"
    head: list[Line] = [
        where,
        f"RUN = Path({literal(str(job['checkpoint_dir']))})",
        *(["if accelerator.is_main_process:", [mkdir]] if job.is_distributed else [mkdir]),
        "",
        "",
    ]
    return Part([*head, *lines], ("import shutil", "from pathlib import Path", "import torch"))
