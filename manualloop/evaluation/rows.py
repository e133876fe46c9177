"""What is kept of each row of a batch: its prediction, its reference, its probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isnan
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.batches import Kept, num_rows
from manualloop.errors import ConfigError, DataError, MetricError, ModelError
from manualloop.evaluation.decoding import Decoding
from manualloop.evaluation.forms import to_array
from manualloop.evaluation.layout import Layout, logits_name
from manualloop.evaluation.losses import Made
from manualloop.mistakes import scalar_floats_message
from manualloop.notices import say
from manualloop.tasks.task import IGNORE_INDEX, Task, best_class
from manualloop.types import Batch

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch)`` returns predictions: one a row, or in the shape of the labels."""

Values: TypeAlias = "NDArray[Any] | list[Any]"
"""A column of a batch: an array whose first axis is the rows, or a list of objects."""

MadeBy: TypeAlias = Literal["rule", "postprocess", "decode"]
"""What makes predictions: the rule of the task, or a function of the user's."""


class Ask(NamedTuple):
    """What is asked of each row.

    Attributes:
        postprocess: Function that makes the predictions; None for the rule of the task.
        decode: Function that makes an object of each row; None for none.
        references: Whether rows without a label are refused.
        predictions: Whether predictions are asked for; otherwise only probabilities are.
        scores: Whether probabilities are asked for: True, False, or None for where there are some.
        kept: Whether the columns that skip the model are asked for.
        aligned: Whether predictions without a label, and labels without a prediction, are left out
            as for a metric. Where they are kept, those of a causal language model are shifted.
        classes: Whether a metric counts every label that is not -100 as a class.
    """

    postprocess: Postprocess | None = None
    decode: Decoding | None = None
    references: bool = True
    predictions: bool = True
    scores: bool | None = False
    kept: bool = False
    aligned: bool = True
    classes: bool = False

    @property
    def made_by(self) -> MadeBy:
        """What makes the predictions."""
        if self.decode is not None:
            return "decode"
        return "rule" if self.postprocess is None else "postprocess"


class Entries(NamedTuple):
    """What is kept of the rows of a batch.

    Attributes:
        num_rows: Number of rows.
        predictions: Predictions, or decoded objects.
        references: Labels, or decoded objects; None if there are none.
        scores: Probabilities; None if there are none.
        kept: Columns that skip the model, by name.
        num_nan: Number of rows with logits that are NaN.
        misfit: Description of predictions that do not stand beside the labels one by one; None if
            they do.
    """

    num_rows: int
    predictions: Values
    references: Values | None
    scores: NDArray[np.float32 | np.float64] | None
    kept: dict[str, list[Any]]
    num_nan: int
    misfit: str | None


def entries_of(made: Made, ask: Ask, layout: Layout, *, is_sound: bool) -> Entries:
    """Return what is kept of the rows of a batch.

    Args:
        made: The batch and its outputs.
        ask: What is asked of each row.
        layout: The axis of the classes, as far as the batches before have told it.
        is_sound: Whether it is known that no logits are NaN.

    Raises:
        DataError: The batch has no labels, or a function did not return one entry a row.
        ModelError: There is nothing to predict from.
    """
    batch, labels = made.batch, _labels_of(made.batch)
    rows = num_rows(batch) if labels is None else len(labels)
    logits = _needed_logits(made, ask, layout)
    scores = None if ask.scores is False else _probabilities(made, ask, logits, rows)
    predictions: Values
    references: Values | None = None
    misfit = None
    if ask.decode is not None:
        predictions, references = _decoded(ask.decode(made.outputs, batch), rows)
        if references is None and not ask.predictions:
            raise _unused("decode")
        if references is None and labels is not None:
            references = _values(_one_axis(made.task, labels))
        num_nan = 0 if is_sound or scores is None else int(np.isnan(scores).any(1).sum())
    else:
        predicted, num_nan = _predicted(made, ask, logits, rows, is_sound=is_sound)
        if labels is not None:
            predicted, labels, misfit = _beside(made, ask, predicted, labels)
            references = _values(labels)
            by_rule = ask.postprocess is None and made.task.rules.predict is best_class
            if ask.classes and by_rule and logits is not None:
                layout.note_labels(made, logits, references)
        elif ask.postprocess is None and made.task.name == "token_classification":
            predicted = _without_padding(batch, predicted)
        # An argmax is new; anything else may be a view that would keep all the outputs.
        is_new = ask.postprocess is None and made.task.rules.predict is best_class
        predictions = to_array(predicted) if is_new else to_array(predicted).copy()
    if references is None and ask.references:
        raise _no_labels(batch)
    kept = _kept_columns(batch, rows) if ask.kept else {}
    return Entries(rows, predictions, references, scores, kept, num_nan, misfit)


def _needed_logits(made: Made, ask: Ask, layout: Layout) -> Tensor | None:
    """Return the logits with the classes last; None where nothing is made of them."""
    if ask.scores and ask.postprocess is not None:
        return _find_logits(made.outputs)
    if not ask.scores and (ask.postprocess is not None or ask.decode is not None):
        return None
    logits = found = logits_of(made.outputs, made.task)
    if logits.ndim > 2:
        logits = layout.classes_last(made, logits)
    _require_classes(made.task, logits, found, made.outputs)
    return logits


def _predicted(
    made: Made, ask: Ask, logits: Tensor | None, rows: int, *, is_sound: bool
) -> tuple[Tensor, int]:
    """Return the predictions of a batch, and the number of its rows with logits that are NaN."""
    num_nan = 0
    if ask.postprocess is not None:
        predicted = _processed(ask.postprocess(made.outputs, made.batch))
        if not ask.predictions and not predicted.is_floating_point():
            raise _unused("postprocess")
    else:
        assert logits is not None
        predicted = made.task.rules.predict(logits)
        num_nan = 0 if is_sound else count_nan_rows(logits, predicted)
    if not predicted.ndim and rows == 1:  # squeeze() drops the axis of a lone row
        predicted = predicted[None]
    if not predicted.ndim or predicted.shape[0] != rows:
        raise DataError(
            f"{predicted.shape[0] if predicted.ndim else 'No'} predictions for a batch of "
            f"{rows} rows. Let postprocess return one for each row, such as "
            "outputs.logits.argmax(-1)."
        )
    return predicted, num_nan


def _without_padding(batch: Any, predicted: Tensor) -> Tensor:
    """Ignore the predictions of tokens that are padding, of a batch without labels."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != predicted.shape:
        return predicted
    return predicted.masked_fill(mask.to(predicted.device) == 0, IGNORE_INDEX)


def _beside(
    made: Made, ask: Ask, predicted: Tensor, labels: Tensor | list[Any]
) -> tuple[Tensor, Tensor | list[Any], str | None]:
    """Put predictions and labels beside each other, as it was asked; tell what does not fit."""
    by_rule = ask.postprocess is None
    if by_rule and made.task.name == "multi_label_classification":
        _require_rows_of_targets(predicted, labels)
    if ask.aligned:
        return _aligned(made, ask.postprocess, predicted, labels)
    if by_rule and made.task.rules.shifts_labels and isinstance(labels, Tensor):
        labels = _next_labels(made.batch, labels)
    return predicted, labels, None


def _unused(name: str) -> ConfigError:
    return ConfigError(
        f"{name} returned predictions, and no metric takes them: the metric scores the "
        f"probabilities that the logits give. Leave {name} out, or add a metric of predictions."
    )


def _kept_columns(batch: Any, rows: int) -> dict[str, list[Any]]:
    columns = batch.items() if isinstance(batch, Mapping) else ()
    kept = {name: list(column) for name, column in columns if isinstance(column, Kept)}
    return {name: column for name, column in kept.items() if len(column) == rows}


def _labels_of(batch: Any) -> Tensor | list[Any] | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(labels)
    is_column = (isinstance(labels, Tensor) and labels.ndim > 0) or isinstance(labels, list)
    return labels if is_column else None


def _no_labels(batch: Any) -> DataError:
    found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    return DataError(
        f"The metric needs labels: the batch has only {found}. For rows without labels use "
        'predict_loop; if they have another name, let collate_fn return {"labels": ...}, or let '
        "decode return two lists: predictions and references."
    )


def logits_of(outputs: Any, task: Task) -> Tensor:
    """Return the logits among a model's outputs.

    Raises:
        ModelError: There are none.
    """
    logits = _find_logits(outputs)
    if outputs is None:
        raise ModelError(
            "There are no outputs to predict from: loss_fn has called a method of the model, and "
            "not the model itself. Let it call model(...), or let decode run the model: "
            "decode=lambda outputs, batch, model: ...."
        )
    if logits is None:
        parts: Any = ()
        if isinstance(outputs, Mapping):
            parts = outputs.items()
        elif isinstance(outputs, tuple | list):
            parts = enumerate(outputs)
        names = [name for name, part in parts if isinstance(part, Tensor) and part.ndim]
        part = f"outputs[{names[0]!r}]" if names else "outputs.output"
        fix = part
        if task.name == "multi_label_classification":
            fix = f"({part} > 0).long()"
        elif task.name != "regression":
            fix = f"{part}.argmax(-1)"
        raise ModelError(
            f"The model's {type(outputs).__name__} has no logits to predict from. Return them as "
            f'{{"logits": ...}}, or pass postprocess=lambda outputs, batch: {fix}.'
        )
    return logits


def _find_logits(outputs: Any) -> Tensor | None:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", outputs)
    return logits if isinstance(logits, Tensor) else None


def _require_classes(task: Task, logits: Tensor, given: Tensor, outputs: Any) -> None:
    """Refuse an argmax that would be 0 for every row, or that would run over the rows.

    Args:
        task: The task.
        logits: Logits, the classes last.
        given: The logits as the model returned them.
        outputs: Outputs of the model.

    Raises:
        ModelError: There is only one logit for each label.
    """
    if task.rules.predict is not best_class or (logits.ndim > 1 and logits.shape[-1] > 1):
        return
    name = logits_name(outputs)
    squeezed = ""
    if logits.ndim > 1:
        squeezed = ".squeeze(-1)" if given.shape[-1] == 1 else ".squeeze(1)"
    raise ModelError(
        f"The logits of shape {tuple(given.shape)} have one number for each label, of which the "
        "argmax is always class 0. To choose one of two classes by its sign: "
        f"postprocess=lambda outputs, batch: ({name} > 0).long(){squeezed}. "
        'For a regression make the labels floats: {**batch, "labels": batch["labels"].float()}.'
    )


def _probabilities(
    made: Made, ask: Ask, logits: Tensor | None, rows: int
) -> NDArray[np.float32 | np.float64] | None:
    """Return the probabilities of a batch; None where there are none, and need not be."""
    rule = made.task.rules.probabilities
    if ask.scores is None and (rule is None or ask.postprocess):
        return None
    if ask.scores is None and logits is None:
        logits = _find_logits(made.outputs)
    is_wide = logits is not None and logits.ndim == 2 and logits.shape[1] > 1
    if ask.postprocess is not None and (rule is None or not is_wide):
        return None  # what postprocess returns may be probabilities
    if rule is None:
        name = logits_name(made.outputs)
        is_share = logits is not None and bool(((logits >= 0) & (logits <= 1)).all())
        what, found = ("probability", name) if is_share else ("logit", f"{name}.sigmoid()")
        raise MetricError(
            f"The metric scores probabilities of classes, and a {made.task.name} has none here. "
            f"Leave it out. For one {what} a row that tells two classes: postprocess=lambda "
            f"outputs, batch: {found}."
        )
    if logits is None or not is_wide or logits.shape[0] != rows:
        if ask.scores is None and ask.decode is not None:
            return None
        if logits is None or ask.scores:
            found = "no" if logits is None else f"of shape {tuple(logits.shape)}"
            raise MetricError(
                f"The metric scores probabilities of classes, and the logits are {found}, not "
                f"({rows}, classes). Leave it out, or return them from the model."
            )
        if logits.ndim != 2:
            return None
    # In float32 a probability beyond 1 - 6e-8 is 1: rows with logits 17 apart would be tied.
    wide = logits.cpu().double()
    probabilities = rule(wide)
    if torch.equal(probabilities, wide):  # the model's own, which add up to 1 in float32 alone
        probabilities = wide.float()
    array: NDArray[np.float32 | np.float64] = probabilities.numpy()
    return array


def _decoded(result: Any, rows: int) -> tuple[list[Any], list[Any] | None]:
    """Return the predictions that ``decode`` made, and the references if it made some.

    Raises:
        DataError: They are not lists with one object a row.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2
    for values in result if is_pair else (result,):
        found = f"a {type(values).__name__}"
        if isinstance(values, Tensor | np.ndarray):
            found = f"a {type(values).__name__} of shape {tuple(values.shape)}"
        elif isinstance(values, list):
            if len(values) == rows:
                continue
            found = f"{len(values)} objects"
        raise DataError(
            f"decode returned {found} for a batch of {rows} rows. Let it return a list with one "
            "object for each row, such as outputs.logits.argmax(-1).tolist() or "
            "tokenizer.batch_decode(ids), or two such lists: predictions and references."
        )
    predictions, references = result if is_pair else (result, None)
    return _own(predictions), None if references is None else _own(references)


def _own(value: Any) -> Any:
    """Return a copy of decoded objects that keeps no tensor of the model's alive."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {name: _own(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_own, value))
    return value


def _processed(predictions: Any) -> Tensor:
    """Return what ``postprocess`` returned as a tensor.

    Raises:
        DataError: It is neither a tensor nor an array.
    """
    if isinstance(predictions, np.ndarray):
        return torch.from_numpy(predictions)
    if isinstance(predictions, Tensor):
        return predictions
    raise DataError(
        f"postprocess returned a {type(predictions).__name__}, not a tensor. To return an object "
        "of Python for each row, pass the function as decode=."
    )


def _next_labels(batch: Any, labels: Tensor) -> Tensor:
    """Put each label of a causal language model beside the prediction of the token before it."""
    if "shift_labels" in batch:
        shifted: Tensor = batch["shift_labels"]
        return shifted
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def _aligned(
    made: Made, postprocess: Postprocess | None, predicted: Tensor, labels: Tensor | list[Any]
) -> tuple[Tensor, Tensor | list[Any], str | None]:
    """Put predictions and labels beside each other; tell what does not fit."""
    rules, batch = made.task.rules, made.batch
    if postprocess is None and "shift_labels" in batch:
        labels = batch["shift_labels"]
    if isinstance(labels, list):
        return predicted, labels, "the labels are a list"
    if postprocess is None:
        if "shift_labels" not in batch and rules.shifts_labels:
            predicted, labels = predicted[..., :-1], labels[..., 1:]
        if not rules.is_aligned:
            return predicted, labels, f"the labels of a {made.task.name} have no place each"
    if labels.ndim == predicted.ndim + 1 and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    elif predicted.ndim == labels.ndim + 1 and predicted.shape[-1] == 1:
        predicted = predicted.squeeze(-1)
    if predicted.shape == labels.shape:
        return predicted, labels, _moved(made, predicted) if postprocess else None
    shapes = f"{tuple(predicted.shape)}, and that of the labels {tuple(labels.shape)}"
    if postprocess is None and predicted.shape == labels.shape[:-1]:
        shapes += ' (labels that are 0 or 1 for each class are floats: batch["labels"].float())'
    return predicted, labels, f"the shape of the predictions is {shapes}"


def _moved(made: Made, predicted: Tensor) -> str | None:
    """Describe the predictions of next tokens in the place of the tokens that they come after.

    They have the shape of the labels, so that nothing else tells. The first batch is looked at.
    """
    logits = _find_logits(made.outputs)
    if made.number or not made.task.rules.shifts_labels or logits is None:
        return None
    if logits.shape[:-1] != predicted.shape or not bool((logits.argmax(-1) == predicted).all()):
        return None
    if not bool((predicted[..., 1:] != predicted[..., :-1]).any()):  # the same in any place
        return None
    return "each prediction is that of the next token, whose label stands one place after it"


def _one_axis(task: Task, labels: Tensor | list[Any]) -> Tensor | list[Any]:
    """Return labels ``(rows, 1)`` of one for each row as ``(rows,)``."""
    is_single = task.name in ("single_label_classification", "regression")
    if is_single and isinstance(labels, Tensor) and labels.shape[1:] == (1,):
        return labels.squeeze(-1)
    return labels


def _values(labels: Tensor | list[Any]) -> Values:
    """Return a copy of labels: those of a worker's batch keep its file open."""
    return _own(labels) if isinstance(labels, list) else to_array(labels).copy()


def _require_rows_of_targets(predicted: Tensor, labels: Tensor | list[Any]) -> None:
    """Refuse one float a row where the model predicts several classes."""
    if isinstance(labels, list) or labels.ndim != 1:
        return
    if predicted.ndim > 1 and predicted.shape[-1] > 1:
        found = f"of shape {tuple(labels.shape)}"
        raise DataError(scalar_floats_message(found, "labels", predicted.shape[-1]))


def count_nan_rows(logits: Tensor, predictions: Tensor) -> int:
    """Count the rows with a NaN among their logits."""
    if predictions.shape == logits.shape[:-1] and not predictions.is_floating_point():
        logits = logits.gather(-1, predictions.unsqueeze(-1))  # NaN is the largest of a row
    if not isnan(float(logits.sum())):
        return 0
    return int(logits.isnan().reshape(len(logits), -1).any(1).sum())


def tell_nan(num_rows: int) -> None:
    """Log that some predictions mean nothing."""
    rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
    say(
        f"the logits of {rows} are NaN: their predictions and scores mean nothing.",
        from_every_rank=True,
    )
