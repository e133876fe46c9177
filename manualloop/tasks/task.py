"""A task: what a model and its batches mean for the loop, found once and passed on.

The class of the model, its config and the labels of a batch decide what an item is and what the
outputs predict. ``resolve_task`` looks at them when a loop begins; for each later batch it compares
what it can without a cost, and looks again only where that has changed.

An item is what the mean loss of a batch is a mean over. Adding up mean losses takes their numbers:

| task | items of a batch |
|---|---|
| single_label_classification, multiple_choice | rows whose label is not -100 |
| multi_label_classification | elements of ``labels``, rows x classes, that are not -100 |
| regression | elements of ``labels``, rows x outputs |
| token_classification, masked_lm, seq2seq_lm | labels that are not -100 |
| causal_lm | labels that are not -100, without each row's first: the model shifts them |
| semantic_segmentation | pixels that are not the config's ``semantic_loss_ignore_index`` |
| ctc | rows |
| frame_classification | frames of sound, ``labels`` without its axis of classes |
| question_answering | positions inside the input, of starts and of ends: two means |
| any, without labels | rows, if all tensors of the batch share axis 0 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import Kept, shared_rows
from manualloop.errors import DataError
from manualloop.mistakes import targets_message
from manualloop.models import has_soft_prompt, own_config, unwrap_model
from manualloop.tasks.otherwise import ATTENDED, objection_to, wants_shifted_labels
from manualloop.tasks.places import count_positions
from manualloop.types import Batch

Counts: TypeAlias = tuple[float, ...]
"""The items of a batch, for each of the means that its loss is the sum of.

There is one, except for question answering, whose loss has two. There is none if nothing tells.
"""

IGNORE_INDEX = -100
"""The label that PyTorch's cross-entropy leaves out of the mean."""

_FEW = 64  # labels; a list of them takes 1 us


def count_kept(labels: Tensor, ignored: int = IGNORE_INDEX) -> int:
    """Count the labels that are not ignored.

    On the CPU no ATen operation is called: few labels are counted as a list, more through NumPy,
    which costs 20 us where its code is not in the cache. For labels on an accelerator the host
    waits, so leave batches on the CPU.
    """
    if labels.device.type == "cpu":
        if labels.ndim == 1 and labels.numel() <= _FEW:
            return labels.numel() - labels.tolist().count(ignored)
        return int(np.count_nonzero(labels.numpy() != ignored))
    return int(torch.count_nonzero(labels != ignored))


def count_labels(batch: Batch) -> Counts:
    """Count the labels that are not ignored."""
    return (count_kept(batch["labels"]),)


def count_shifted_labels(batch: Batch) -> Counts:
    """Count the labels of a causal language model: no position predicts the first token."""
    shifted = batch.get("shift_labels")
    return (count_kept(batch["labels"][..., 1:] if shifted is None else shifted),)


def count_elements(batch: Batch) -> Counts:
    """Count the numbers in the labels."""
    return (int(batch["labels"].numel()),)


def count_targets(batch: Batch) -> Counts:
    """Count the multi-label targets that are not -100.

    Raises:
        DataError: A target is beyond 0 and 1, of which the loss would make a number all the same.
    """
    labels: Tensor = batch["labels"]
    if not labels.numel() or not labels.is_floating_point():
        return (labels.numel(),)
    least, most = labels.aminmax()
    if least >= 0 and most <= 1:
        return (labels.numel(),)
    if (found := wrong_target(labels)) is not None:
        raise DataError(f"{targets_message(found[1], f'row {found[0]} of a batch')}.")
    return (int(torch.count_nonzero(labels != IGNORE_INDEX)),)


def wrong_target(labels: Tensor) -> tuple[int, float] | None:
    """Return row and value of the first multi-label target that is neither 0 to 1 nor -100."""
    is_wrong = ((labels < 0) | (labels > 1)) & (labels != IGNORE_INDEX)
    if not is_wrong.any():
        return None
    return int(is_wrong.nonzero()[0, 0]), float(labels[is_wrong][0])


def count_texts(batch: Batch) -> Counts:
    """Count the rows: torch's CTC divides each by the length of its text before it averages."""
    return (int(batch["labels"].shape[0]),)


def count_attended(batch: Batch) -> Counts:
    """Count the tokens that are attended to."""
    mask = batch.get("attention_mask")
    return count_elements(batch) if mask is None else (int((mask == 1).sum()),)


def count_frames(batch: Batch) -> Counts:
    """Count the frames, of which each has a 0 or 1 for each class: the loss takes the largest."""
    return (int(batch["labels"].shape[:-1].numel()),)


def count_rows(batch: Any) -> Counts:
    """Count the rows of a batch without labels; nothing, where nothing tells how many there are."""
    rows = shared_rows(batch)
    return () if rows is None else (rows,)


def count_nothing(batch: Any) -> Counts:
    """Return no count."""
    return ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one task: a row of ``TASKS``.

    Attributes:
        count: Function from a batch with labels to the numbers of its items.
        predict: Function from logits to predictions.
        probabilities: Function from logits to the probability of each class; None for tasks
            without one.
        shifts_labels: Whether a position predicts the label after it.
        float_labels: Whether the loss wants floating point labels.
        is_aligned: Whether each label has a prediction in its place.
    """

    count: Callable[[Batch], Counts]
    predict: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None = None
    shifts_labels: bool = False
    float_labels: bool = False
    is_aligned: bool = True


def best_class(logits: Tensor) -> Tensor:
    """Return the number of the largest logit."""
    return logits.argmax(dim=-1)


def _class_map(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:  # trained with a binary cross-entropy
        return (logits[:, 0] > 0).long()
    return logits.argmax(dim=1)


def _above_half(logits: Tensor) -> Tensor:
    return (logits > 0).int()  # sigmoid(x) > 0.5


def _as_value(logits: Tensor) -> Tensor:
    return logits.squeeze(-1)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


TASKS: dict[str, Rules] = {
    "single_label_classification": Rules(count_labels, best_class, _softmax),
    "multi_label_classification": Rules(
        count_elements, _above_half, Tensor.sigmoid, float_labels=True
    ),
    "regression": Rules(count_elements, _as_value, float_labels=True),
    "token_classification": Rules(count_labels, best_class),
    "multiple_choice": Rules(count_labels, best_class),
    "masked_lm": Rules(count_labels, best_class),
    "seq2seq_lm": Rules(count_labels, best_class),
    "causal_lm": Rules(count_shifted_labels, best_class, shifts_labels=True),
    "question_answering": Rules(count_positions, best_class),
    "semantic_segmentation": Rules(count_labels, _class_map),
    "ctc": Rules(count_texts, best_class, is_aligned=False),
    "frame_classification": Rules(count_frames, best_class, is_aligned=False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a model and one kind of batch mean for the loop. Made by ``resolve_task``.

    Attributes:
        name: Key of ``TASKS``.
        rules: How the task predicts.
        count: Function from a batch of this kind to the numbers of its items.
        model: The model it was resolved for.
        kind: What of the batch decided: the labels' axes and dtype, whether it has positions, or
            how many tensors are listed.
        columns: Names of its columns; none of a batch that has none.
        looks: What batches are looked at for before the model is called: "padding" or "documents",
            which it may see where it must not, and columns that skip it ("kept").
        settings: The attributes of the model's config.
        problem_type: ``problem_type`` among the settings, which a model of transformers writes at
            its first forward pass.
        objection: Message that the model's loss is no mean over what is counted; None if it is one.
        ignored: The label that counts neither in the loss nor in a metric.
        by_values: Whether the labels are taken for multi-label targets only because those of the
            first batch are all 0 and 1.
    """

    name: str
    rules: Rules
    count: Callable[[Any], Counts]
    model: nn.Module
    kind: object
    columns: tuple[str, ...]
    looks: frozenset[str]
    settings: Mapping[str, Any]
    problem_type: object
    objection: str | None = None
    ignored: int = IGNORE_INDEX
    by_values: bool = False


def resolve_task(model: nn.Module, batch: Any, known: Task | None = None) -> Task:
    """Find the task of a model by its head, its config and the labels of a batch.

    Args:
        model: A model of transformers, or any module; wrapped or not.
        batch: A batch as the loader gave it; of any type, only the labels of a mapping tell.
        known: The task of a batch before; returned if it holds for this batch too.

    >>> import torch
    >>> task = resolve_task(nn.Linear(1, 1), {"labels": torch.tensor([[5, 6], [7, -100]])})
    >>> task.name, task.count({"labels": torch.tensor([[-100, 3]])})
    ('token_classification', (1,))
    """
    columns: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    labels = columns.get("labels")
    kind: object
    if isinstance(labels, Tensor):
        axes = labels.ndim
        kind = axes, labels.dtype, axes > 1 and labels.shape[-1] > 1
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor | np.ndarray):
        labels, kind = None, (_LISTED, len(batch))
    else:
        labels, kind = None, "start_positions" in columns
    if known is not None and known.model is not model:
        known = None
    if known is not None and (chosen := known.settings.get("problem_type")) != known.problem_type:
        # In its first forward pass the model has written down what was inferred before it.
        known = replace(known, problem_type=chosen) if chosen == known.name else None
    names = tuple(columns)
    if known is not None and known.kind == kind:
        if known.columns == names:
            return known
        return replace(known, columns=names, looks=_looks_for(columns))
    inner = unwrap_model(model)
    config = own_config(inner)
    # A batch without labels does not tell; the labels of those before it did.
    name = _task_of(inner, config, labels) if known is None or labels is not None else known.name
    count = count_rows if labels is None else TASKS[name].count
    if kind is True and _has_position_loss(inner):
        name, count = "question_answering", count_positions
    elif known is not None and _is_listed(kind) and _is_listed(known.kind):
        count = count_nothing  # columns do not change in number: these are rows, or it is not clear
    elif labels is not None:
        count = _special_count(model, inner, config, name) or count
    has_targets = labels is not None and labels.ndim > 1 and labels.shape[-1] > 1
    if has_targets and name == "multi_label_classification" and _has_bce_loss(inner, config):
        count = count_targets
    settings, objection = getattr(config, "__dict__", {}), objection_to(inner, batch)
    ignored = ignored_pixel(config) if name == "semantic_segmentation" else IGNORE_INDEX
    by_values = name == "multi_label_classification" and not _names_its_task(inner, config)
    looks = _looks_for(columns)
    rest = settings.get("problem_type"), objection, ignored, by_values
    return Task(name, TASKS[name], count, model, kind, names, looks, settings, *rest)


_TELLING = {"attention_mask": "padding"}
_TELLING |= dict.fromkeys(("position_ids", "seq_idx", "cu_seq_lens_q"), "documents")


def _looks_for(columns: Mapping[str, Any]) -> frozenset[str]:
    kept = ("kept",) if Kept in map(type, columns.values()) else ()
    return frozenset((*kept, *(_TELLING[name] for name in columns if name in _TELLING)))


def _special_count(
    model: nn.Module, inner: nn.Module, config: Any, name: str
) -> Callable[[Batch], Counts] | None:
    """Return how a model counts the items of labels, if not by the rule of its task."""
    if name == "causal_lm":
        return count_labels if has_soft_prompt(model) else None
    if name == "semantic_segmentation":
        if getattr(config, "num_labels", None) == 1:
            return count_elements  # ignored pixels add 0 to the sum, and are counted
        return partial(_count_pixels, ignored=ignored_pixel(config))
    return count_attended if type(inner).__name__ in ATTENDED else None


def ignored_pixel(config: Any) -> int:
    """Return the label of pixels that count neither in the loss nor in a metric of a model."""
    ignored = getattr(config, "loss_ignore_index", 255)  # UperNet
    return int(getattr(config, "semantic_loss_ignore_index", ignored))


def _count_pixels(batch: Batch, ignored: int) -> Counts:
    return (count_kept(batch["labels"], ignored),)


_LISTED = "a list of tensors"


def _is_listed(kind: object) -> bool:
    return isinstance(kind, tuple) and kind[0] == _LISTED


class Counted(NamedTuple):
    """The items of a window.

    Attributes:
        counts: Items of each micro-batch.
        task: Task of the last one.
        looks: What they are looked at for: see ``Task``.
    """

    counts: list[Counts]
    task: Task
    looks: frozenset[str]


def count_window(model: nn.Module, batches: Iterable[Any], known: Task | None = None) -> Counted:
    """Count the items of each micro-batch of a window.

    Args:
        model: The model.
        batches: The micro-batches, of which there is at least one.
        known: The task of the window before, if there is one.
    """
    counts, looks = [], frozenset[str]()
    for batch in batches:
        known = resolve_task(model, batch, known)
        looks |= known.looks
        counts.append(known.count(batch))
    return Counted(counts, cast("Task", known), looks)


def count_items(model: nn.Module, batch: Batch) -> int:
    """Count the items that the model's mean loss over this batch is a mean of.

    Args:
        model: The model; its task decides what an item is.
        batch: A mapping from column name to tensor. Without a tensor of ``labels`` every row is
            an item.

    Raises:
        DataError: There are no labels, and nothing tells how many rows there are.

    >>> import torch
    >>> labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    >>> count_items(nn.Linear(1, 1), {"labels": labels})
    3
    """
    check_arguments(model=model, batch=batch)
    counts = resolve_task(model, batch).count(batch)
    if not counts:
        raise DataError(
            f"Nothing tells how many rows a {type(batch).__name__} has, whose tensors and lists "
            "have different lengths along axis 0. Give the batch a tensor of labels."
        )
    return int(sum(counts))


_ANSWERING = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
# Heads whose question answering loss is another.
_BEAM_SEARCHING = (
    "FlaubertForQuestionAnswering",
    "XLMForQuestionAnswering",
    "XLNetForQuestionAnswering",
)

_TASK_OF_HEAD = {
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    **dict.fromkeys(("LMHeadModel", "WithLMHead", "ForVisionText2Text"), "causal_lm"),
    "BertGenerationDecoder": "causal_lm",
    "ForSemanticSegmentation": "semantic_segmentation",
    "ForCTC": "ctc",
    **dict.fromkeys(("MarianMTModel", "EncoderDecoderModel"), "seq2seq_lm"),
    **dict.fromkeys(("ForSpeechToText", "ForTextToText"), "seq2seq_lm"),
}


def is_known_head(model: nn.Module) -> bool:
    """Tell whether a model is a head of transformers, by its config or by the name of its class."""
    model = unwrap_model(model)
    return _task_of_class(type(model)) is not None or hasattr(own_config(model), "id2label")


def _has_position_loss(inner: nn.Module) -> bool:
    """Tell whether the loss is the mean of those of start and of end positions."""
    name = type(inner).__name__
    return name.endswith(_ANSWERING) and name not in _BEAM_SEARCHING


def _has_bce_loss(inner: nn.Module, config: Any) -> bool:
    """Tell whether the loss of multi-label targets is known: transformers' binary cross-entropy."""
    return type(inner).__name__.endswith("Classification") and config is not None


def _task_of_class(kind: type[nn.Module]) -> str | None:
    task = _task_of_name(kind.__name__)
    if task == "causal_lm" and wants_shifted_labels(kind):
        return "masked_lm"  # which counts as they do
    return task


@cache
def _task_of_name(name: str) -> str | None:
    return next((task for head, task in _TASK_OF_HEAD.items() if name.endswith(head)), None)


def infer_task(model: nn.Module, labels: Tensor | None = None) -> str:
    """Name the task of a model, by its head, its config and the labels, as transformers does.

    Args:
        model: A transformers model, or any module, whose task the labels decide.
        labels: The labels of one batch, ``(rows,)``, ``(rows, classes)`` or ``(rows, tokens)``;
            None for rows without labels, which are taken for a classification unless the model
            says otherwise.
    """
    inner = unwrap_model(model)
    return _task_of(inner, own_config(inner), labels)


def _task_of(inner: nn.Module, config: Any, labels: Tensor | None) -> str:
    name = type(inner).__name__
    if task := _task_of_class(type(inner)):
        return task
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq_lm" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
    axes = 0 if labels is None else labels.ndim
    for (head, number), of_parts in _TASK_OF_PARTS.items():
        if name.endswith(head) and number == axes:
            return of_parts
    # The rule of transformers' ForSequenceClassificationLoss, which the model writes into its
    # config at the first forward pass.
    chosen = getattr(config, "problem_type", None)
    if isinstance(chosen, str) and chosen in TASKS:
        return chosen
    is_classifier = name.endswith("Classification")
    if is_classifier and getattr(config, "num_labels", None) == 1:
        return "regression"
    if labels is None:
        return "single_label_classification"
    is_row = labels.ndim > 1 and labels.shape[-1] > 1  # more than one number for each
    if is_classifier and (is_row or labels.is_floating_point()):
        return "multi_label_classification"
    if not labels.is_floating_point():
        is_class = is_classifier or labels.ndim < 2 or labels.shape[1:] == (1,)
        return "single_label_classification" if is_class else "token_classification"
    return "multi_label_classification" if is_row and are_targets(labels) else "regression"


_TASK_OF_PARTS = {
    ("ForEntitySpanClassification", 2): "token_classification",  # entities, with a class each
    ("ForAudioFrameClassification", 3): "frame_classification",
}
"""Classifiers of the parts of a row, and how many axes their labels have."""


def are_targets(labels: Tensor) -> bool:
    """Tell whether all labels are 0, 1 or ignored, as those of several classes a row."""
    return bool(((labels == 0) | (labels == 1) | (labels == IGNORE_INDEX)).all())


def _names_its_task(inner: nn.Module, config: Any) -> bool:
    """Tell whether the class or the config of a model names its task, whatever the labels are."""
    chosen = getattr(config, "problem_type", None)
    return chosen in TASKS or type(inner).__name__.endswith("Classification")
