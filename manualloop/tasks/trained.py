"""What a model is trained on, beside what it has and what it is given later in the process."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from manualloop.models import config_of, num_classes, unwrap_model
from manualloop.notices import say
from manualloop.types import SplitNotes


def note_training(model: nn.Module, notes: SplitNotes) -> None:
    """Remember what a model is trained on, and log outputs for which the data name no class."""
    model = unwrap_model(model)
    _TRAINED[model], _TOLD[model] = notes, set()
    number, names = num_classes(model), notes.names or ()
    if number is None or not names or number <= len(names):
        return
    own: Any = getattr(config_of(model), "id2label", None) or {}
    places = range(len(names), number)
    if any(own.get(place, f"LABEL_{place}") != f"LABEL_{place}" for place in places):
        return  # classes of the model's that these data lack
    say(
        f"the model has {number} outputs, and the data name {len(names)} classes: no row is of the "
        f"classes {len(names)} to {number - 1}. Load it with as many: from_pretrained(name, "
        f"num_labels={len(names)})"
    )


def tell_other_texts(model: nn.Module, notes: SplitNotes) -> None:
    """Log that texts are made otherwise than those that a model was trained on, if they are."""
    model = unwrap_model(model)
    before = _TRAINED.get(model)
    if before is None or notes is before or not notes.texts or not before.texts:
        return
    found = []
    if notes.texts != before.texts:
        found.append([f"of {', '.join(one.texts)}" for one in (notes, before)])
    if _are_cut_otherwise(notes, before):
        found.append([f"cut off at {one.max_length or 'no'} tokens" for one in (notes, before)])
    here, there = (", ".join(words) for words in zip(*found, strict=True)) if found else ("", "")
    if found and (here, there) not in _TOLD[model]:
        _TOLD[model].add((here, there))
        say(
            f"these texts are {here}, and those that the model was trained on {there}. Give "
            "prepare_dataloaders the same arguments in both places"
        )


def _are_cut_otherwise(notes: SplitNotes, before: SplitNotes) -> bool:
    """Tell whether some text is cut off here, or would have been where the model was trained."""
    here, there = notes.max_length, before.max_length
    if here == there:
        return False
    if here is not None and (there is None or here < there):
        return bool(notes.num_cut)
    return notes.lengths is None or there is None or notes.lengths[-1] > there


_TRAINED: WeakKeyDictionary[nn.Module, SplitNotes] = WeakKeyDictionary()
_TOLD: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
