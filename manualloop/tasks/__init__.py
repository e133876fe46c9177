"""What people train, as functions: from rows to batches, from outputs to predictions, losses.

Each of these functions returns plain data, or a function that ``prepare_dataloaders`` takes as
``preprocess`` or ``transform``, ``evaluate_loop`` as ``decode`` or metric, or ``train_loop`` as
``loss_fn`` or ``terms``. Nothing is registered: a function of the same shape takes the place of
each of them.

Names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME: dict[str, str] = {
    "answer_windows": "question_answering",
    "best_spans": "answer_spans",
    "boxes": "object_detection",
    "chat": "chats",
    "check_isolation": "isolation",
    "complete": "completions",
    "cut": "plain",
    "detected": "object_detection",
    "detection_terms": "object_detection",
    "distil": "language_losses",
    "dpo": "preferences",
    "fill_in_middle": "infilling",
    "flatten_choices": "multiple_choice",
    "generated": "generation",
    "images": "image_classification",
    "images_and_masks": "segmentation",
    "lm_loss": "language_losses",
    "margins": "preferences",
    "mask_tokens": "masking",
    "pack": "plain",
    "preference_pairs": "pairs",
    "preferred": "preferences",
    "reference_logps": "references",
    "reward": "preferences",
    "source_target": "generation",
    "span_logits": "answer_spans",
    "squad": "answer_spans",
    "tag_words": "token_classification",
    "upsampled": "segmentation",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)  # of a completion, without modules and private names


if TYPE_CHECKING:  # the same names, for readers that do not run __getattr__
    from manualloop.tasks.answer_spans import best_spans as best_spans
    from manualloop.tasks.answer_spans import span_logits as span_logits
    from manualloop.tasks.answer_spans import squad as squad
    from manualloop.tasks.chats import chat as chat
    from manualloop.tasks.completions import complete as complete
    from manualloop.tasks.generation import generated as generated
    from manualloop.tasks.generation import source_target as source_target
    from manualloop.tasks.image_classification import images as images
    from manualloop.tasks.infilling import fill_in_middle as fill_in_middle
    from manualloop.tasks.isolation import check_isolation as check_isolation
    from manualloop.tasks.language_losses import distil as distil
    from manualloop.tasks.language_losses import lm_loss as lm_loss
    from manualloop.tasks.masking import mask_tokens as mask_tokens
    from manualloop.tasks.multiple_choice import flatten_choices as flatten_choices
    from manualloop.tasks.object_detection import boxes as boxes
    from manualloop.tasks.object_detection import detected as detected
    from manualloop.tasks.object_detection import detection_terms as detection_terms
    from manualloop.tasks.pairs import preference_pairs as preference_pairs
    from manualloop.tasks.plain import cut as cut
    from manualloop.tasks.plain import pack as pack
    from manualloop.tasks.preferences import dpo as dpo
    from manualloop.tasks.preferences import margins as margins
    from manualloop.tasks.preferences import preferred as preferred
    from manualloop.tasks.preferences import reward as reward
    from manualloop.tasks.question_answering import answer_windows as answer_windows
    from manualloop.tasks.references import reference_logps as reference_logps
    from manualloop.tasks.segmentation import images_and_masks as images_and_masks
    from manualloop.tasks.segmentation import upsampled as upsampled
    from manualloop.tasks.token_classification import tag_words as tag_words
