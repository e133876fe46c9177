"""``eject``: a call of ``train_loop`` as the script that one would write by hand."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from manualloop.script import batches, evaluation, optimizers, sources, training
from manualloop.script.call import job_of
from manualloop.script.job import Job
from manualloop.script.text import WIDTH, script_of


def eject(*arguments: Any, **options: Any) -> str:
    """Return the script that one would write by hand instead of a call of ``train_loop``.

    It is plain PyTorch and transformers, or accelerate where the strategy is accelerate's, with the
    parts that this call needs and no others. Run on its own, it ends with the same weights to the
    last bit as the call, if both begin with ``torch.manual_seed``, the same model and the same
    rows. Lines that only you can complete are marked ``FILL IN``: where model and rows come from,
    if nothing tells. Nothing is trained and nothing is written.

    Args:
        *arguments: Arguments of ``train_loop``: the model, the loader, and so on. ``evaluate`` is a
            ``partial`` of ``evaluate_loop``, which can be looked into.
        **options: Arguments of ``train_loop`` by name.

    Returns:
        The text of the script, formatted as by ``ruff format``.

    Raises:
        ConfigError: The call cannot be made, or something in it cannot be written out; a line for
            each problem.

    >>> import torch
    >>> from torch import nn
    >>> rows = [{"x": torch.ones(4, 1), "labels": torch.zeros(4, 1)}]
    >>> class Line(nn.Linear):
    ...     def forward(self, x, labels):
    ...         return {"loss": ((super().forward(x) - labels) ** 2).mean()}
    >>> script = eject(Line(1, 1), rows, num_epochs=2, progress_bar=False)
    >>> [line for line in script.splitlines() if "FILL IN" in line]
    ['model = ...  # FILL IN: the Line as it was before the training', \
'train_dataloader = ...  # FILL IN: your loader, built as before']
    """
    job = job_of(arguments, options)
    return script_of(
        _docstring(job),
        [
            sources.settings(job),
            sources.process(),
            optimizers.accelerator(job),
            sources.given(job),
            sources.functions(job),
            sources.rows(job),
            batches.batches(job),
            optimizers.optimizer(job),
            evaluation.evaluate(job),
            evaluation.saving(job),
            *training.loop(job),
        ],
    )


def _docstring(job: Job) -> str:
    name = type(job.model).__name__
    told = (
        "It ends with the weights of the call, to the last bit, if that has the same seed, model "
        "and rows. It checks nothing: mistakes in the data show up late, or never."
    )
    lines = wrap(f"Train a {name}: a call of train_loop, written out.", WIDTH - len(_QUOTES))
    if not job.loading.draws:
        told += (
            " The model is read from a folder, which draws no random numbers: to compare, seed the "
            "call behind the making of its model, directly before train_loop."
        )
    return "\n".join([*lines, "", *wrap(told, WIDTH), ""])


_QUOTES = '"""'
