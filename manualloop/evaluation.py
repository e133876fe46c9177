"""``evaluate_loop`` and ``predict_loop``: what a model says about data it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from manualloop.data.order import OrderedBatchSampler, num_batches
from manualloop.errors import DataError, ModelError
from manualloop.metrics import as_metric
from manualloop.preflight import explain
from manualloop.progress import ProgressBar
from manualloop.strategy import Strategy, strategy_for
from manualloop.tasks import IGNORE_INDEX, TASKS, count_items, infer_task, require_loss
from manualloop.types import Batch, LossFn

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch) -> predictions``, one for each row (or each label)."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A table of predictions, one row for each row of the dataset, in its order.

    Attributes:
        index: int64 ``(rows,)``: row numbers in the dataset.
        predictions: ``(rows,)`` class numbers or values, ``(rows, classes)`` for multi-label.
        scores: float32 ``(rows, classes)``: probability of each class; None for a regression, or
            with a ``postprocess`` of your own.
        references: The labels, or None if the data has none.
    """

    index: NDArray[np.int64]
    predictions: NDArray[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.index)


def evaluate_loop(
    model: nn.Module,
    eval_dataloader: Iterable[Any],
    metric: Any = None,
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    loss_fn: LossFn | None = None,
    progress_bar: bool = False,
) -> dict[str, float]:
    """Score a model on every row of a loader.

    The loss is the mean over all items, so it does not depend on how rows were batched. Every
    submodule's mode and the random state of training are as before when it returns or raises.
    Of the outputs only what the metric needs is kept, never the logits.

    Args:
        model: Moved to the strategy's device if no strategy has prepared it.
        eval_dataloader: Of dicts that the model takes.
        metric: A name (``"accuracy"``, ``"glue/mrpc"``), an ``evaluate`` module, a torchmetrics
            metric, ``fn(predictions, references) -> dict``, or a sequence of these. None: only
            the loss.
        strategy: None: the one that prepared the model, else ``prepare_strategy("auto")``.
        postprocess: ``postprocess(outputs, batch)`` makes predictions of the model's outputs;
            None: by task (argmax, above 0.5, the value).
        loss_fn: As in ``train_steps``. Outputs are those of its last forward pass.
        progress_bar: Show a bar.

    Returns:
        ``loss``, if there are labels or a ``loss_fn``, and what the metric computes.

    Raises:
        DataError: The loader gives no batch, or a metric is asked for and there are no labels.
        MetricError: The metric cannot score these predictions.

    >>> model = nn.Linear(1, 1)
    >>> evaluate_loop(model, [{"x": torch.zeros(2, 1)}], strategy=None,
    ...               loss_fn=lambda model, batch: 0 * model(batch["x"]).mean())
    {'loss': 0.0}
    """
    strategy = strategy_for(model, strategy)
    model = strategy.prepare_model(model)
    scorer = None if metric is None else as_metric(metric)
    total_loss, total_items = 0.0, 0
    with evaluation_mode(model, strategy.device):
        for batch in _shown(eval_dataloader, "Evaluating", progress_bar and strategy.is_main):
            outputs, loss = _forward(model, batch, strategy, loss_fn)
            if loss is None and scorer is None:
                loss = require_loss(model, batch, outputs)
            mean_loss, num_items = loss if isinstance(loss, tuple) else (loss, None)
            if mean_loss is not None:
                num_items = count_items(model, batch) if num_items is None else int(num_items)
                if num_items:  # else its mean is 0/0
                    total_loss += float(mean_loss) * num_items
                    total_items += num_items
            if scorer is not None:
                predictions, references = _for_metric(model, outputs, batch, postprocess)
                scorer.add_batch(predictions=predictions, references=references)
    scores: dict[str, float] = {} if scorer is None else scorer.compute()
    return {"loss": total_loss / total_items, **scores} if total_items else scores


def predict_loop(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    progress_bar: bool = False,
) -> Predictions:
    """Predict every row of a loader, in the order of the dataset.

    Args:
        model: As for ``evaluate_loop``.
        dataloader: Of dicts that the model takes, with or without labels. Of a prepared loader
            the order is known even if it shuffles.
        strategy: As for ``evaluate_loop``.
        postprocess: As for ``evaluate_loop``.
        progress_bar: Show a bar.

    Raises:
        DataError: The loader gives no batch, or shuffles in a way that cannot be undone.

    >>> class Half(nn.Module):
    ...     def forward(self, x):
    ...         return {"logits": x / 2}
    >>> batches = [{"x": torch.tensor([[2.0, 4.0]])}, {"x": torch.tensor([[8.0, 6.0]])}]
    >>> predict_loop(Half(), batches).predictions
    array([1, 0])
    """
    strategy = strategy_for(model, strategy)
    model = strategy.prepare_model(model)
    index = _dataset_rows(dataloader)
    predictions: list[Tensor] = []
    scores: list[Tensor] = []
    references: list[Tensor] = []
    with evaluation_mode(model, strategy.device):
        for batch in _shown(dataloader, "Predicting", progress_bar and strategy.is_main):
            outputs, _ = _forward(model, batch, strategy, None)
            if postprocess is not None:
                predictions.append(postprocess(outputs, batch).cpu())
            else:
                logits, task = _logits(outputs), infer_task(model, batch.get("labels"))
                predictions.append(TASKS[task].predict(logits).cpu())
                if task in _PROBABILITIES:
                    scores.append(_PROBABILITIES[task](logits.float()).cpu())
            if "labels" in batch:
                references.append(batch["labels"].cpu())
    rows = sum(map(len, predictions))
    index = np.arange(rows) if index is None else index[:rows]
    order = np.argsort(index, kind="stable")

    def table(parts: list[Tensor]) -> Any:
        return torch.cat(parts).numpy()[order] if parts else None

    return Predictions(index[order], table(predictions), table(scores), table(references))


@contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model into eval mode and inference mode, and every submodule back afterwards.

    The random states of the CPU and of the model's CUDA device are put back too, so that
    evaluating in the middle of training changes nothing in it.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda_devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda_devices), torch.inference_mode():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _shown(loader: Iterable[Any], name: str, shown: bool) -> Iterator[Any]:
    """Give the batches of a loader, at least one, under a bar."""
    bar = ProgressBar(num_batches(loader), name=name, unit="batch", shown=shown)
    number = 0
    try:
        for number, batch in enumerate(loader, start=1):
            yield batch
            if bar.is_due():
                bar.show(number)
    finally:
        bar.close(number)
    if number == 0:
        raise DataError(
            "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and "
            "that the loader is not a generator that was read before."
        )


def _forward(
    model: nn.Module, batch: Any, strategy: Strategy, loss_fn: LossFn | None
) -> tuple[Any, Any]:
    """Return the outputs for a batch and its loss: a mean, ``(mean, items)``, or None."""
    inputs = strategy.to_device(batch)
    loss: Any
    with strategy.autocast():
        if loss_fn is not None:
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
            try:
                loss = loss_fn(model, inputs)
            finally:
                hook.remove()
            return (seen[-1] if seen else None), loss
        try:
            outputs = model(**inputs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            explain(error, model, [batch], (), 0)
            raise
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return outputs, loss


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model's {type(outputs).__name__} has no logits to make predictions of. Pass "
            "postprocess=lambda outputs, batch: outputs[0].argmax(-1)."
        )
    return logits


def _for_metric(
    model: nn.Module, outputs: Any, batch: Any, postprocess: Postprocess | None
) -> tuple[Tensor, Tensor]:
    """Return predictions and references of a batch, without those labelled -100."""
    if "labels" not in batch:
        raise DataError(
            f"The metric needs labels: the batch has only {', '.join(batch)}. For rows without "
            "labels use predict_loop."
        )
    labels: Tensor = batch["labels"]
    task = infer_task(model, labels)
    if postprocess is not None:
        predictions = postprocess(outputs, batch)
    else:
        predictions = TASKS[task].predict(_logits(outputs))
    predictions, labels = predictions.cpu(), labels.cpu()
    if task == "multi_label_classification":
        return predictions, labels.int()
    if predictions.numel() == labels.numel():
        labels = labels.reshape(predictions.shape)
        if not labels.is_floating_point():
            kept = labels != IGNORE_INDEX
            return predictions[kept], labels[kept]
    return predictions, labels


def _dataset_rows(loader: Iterable[Any]) -> NDArray[np.int64] | None:
    """Return the dataset's row numbers in the loader's order; None: it is the dataset's."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, OrderedBatchSampler):
        return np.array(sampler.rows(), dtype=np.int64)
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise DataError(
            "The loader shuffles, so predictions could not be put in the dataset's order. Build "
            "it with shuffle=False, or use prepare_dataloaders."
        )
    return None


_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "single_label_classification": lambda logits: logits.softmax(dim=-1),
    "multi_label_classification": lambda logits: logits.sigmoid(),
}
