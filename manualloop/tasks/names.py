"""The names of the classes: which a model has, which the data have, and which of them count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.models import (
    config_of,
    is_sharded,
    model_name,
    num_classes,
    own_config,
    unwrap_model,
)
from manualloop.notices import say
from manualloop.tasks.task import infer_task
from manualloop.tasks.trained import note_training, tell_other_texts
from manualloop.types import SplitNotes

Names = tuple[str, ...]
"""The name of each class, by its number."""

_WITHOUT_CLASSES = ("masked_lm", "causal_lm", "seq2seq_lm", "ctc", "multiple_choice", "regression")
_NUM_SHOWN = 10


def class_names(model: nn.Module, loader: Any) -> Names | None:
    """Return the names of the classes that a model predicts, by number; None if they have none.

    They are those of the model's config, unless these are LABEL_0, LABEL_1 and so on; else those of
    the data that it was trained on in this process; else those of the data that the loader was
    prepared from.

    Args:
        model: The model, wrapped or not.
        loader: A loader of ``prepare_dataloaders`` or any other.

    Raises:
        DataError: Both have names, and a number means one class in the model and another one in the
            loader.

    >>> class_names(nn.Linear(2, 2), [{"labels": torch.tensor([0, 1])}]) is None
    True
    """
    tell_other_texts(model, notes_of(loader))
    own, of_data = names_of(model), notes_of(loader).names
    if own is None or of_data is None:
        return of_data if own is None else own
    if not are_numbered_alike(of_data, own):
        raise DataError(
            f"The loader numbers its classes {show_names(of_data)}, but {model_name(model)} has "
            f"{show_names(own)} ({place_of_names(model)}). Prepare the loader for this model, so "
            "that a number means the same class in both: prepare_dataloaders(datasets, tokenizer, "
            "model=model)."
        )
    return own


def learn_names(model: nn.Module, loader: Any) -> Names | None:
    """Note that a model is trained on the classes of a loader; return their names.

    Raises:
        DataError: As in ``class_names``.
    """
    notes = notes_of(loader)
    note_training(model, notes)
    if notes.names is not None and names_in_config(model) is None:
        _known[unwrap_model(model)] = _Known(notes.names, None)
    return class_names(model, loader)


def load_names(model: nn.Module, names: Names, place: str) -> None:
    """Note that a model gets weights that were trained on classes of some names.

    Args:
        model: The model.
        names: The names that the weights were trained on.
        place: Where the weights come from.

    Raises:
        DataError: The model has one of these classes under another number.
    """
    own = names_of(model)
    if own is None:
        _known[unwrap_model(model)] = _Known(names, None)
    elif any(name in own and own.index(name) != number for number, name in enumerate(names)):
        id2label = dict(enumerate(names))
        label2id = {name: number for number, name in id2label.items()}
        raise DataError(
            f"The weights in {place} were trained on the classes {show_names(names)}, but "
            f"{model_name(model)} has {show_names(own)}. Nothing was loaded. Build the model anew, "
            "and load the checkpoint before prepare_dataloaders(..., model=model), which then "
            "numbers labels as it does; or build the model with these classes: "
            f"id2label={id2label}, label2id={label2id}."
        )
    elif not are_numbered_alike(names, own):
        say(
            f"the weights in {place} were trained on the classes {show_names(names)}, and "
            f"{model_name(model)} has {show_names(own)}: train it before its predictions count."
        )


def place_of_names(model: nn.Module) -> str:
    """Return where the names of a model's classes come from, in words."""
    return "from other data" if names_in_config(model) is None else "config.id2label"


def notes_of(loader: Any) -> SplitNotes:
    """Return what was noted about a loader's split when it was prepared; nothing of others."""
    notes = getattr(getattr(loader, "dataset", None), "split_notes", None)
    return notes if isinstance(notes, SplitNotes) else SplitNotes()


def splits_of(loader: Any) -> dict[str, SplitNotes]:
    """Return the notes on all splits that a loader was prepared with, by name; of others none."""
    splits = getattr(loader, "splits", None)
    if not isinstance(splits, dict):
        return {}
    return {name: notes for name, notes in splits.items() if isinstance(notes, SplitNotes)}


def names_of(model: nn.Module | None) -> Names | None:
    """Return the names of a model's classes, of its config or of its data; None if it has none."""
    if model is None:
        return None
    model = unwrap_model(model)
    known = _known.get(model)
    names = names_by_number(getattr(own_config(model), "id2label", None), model)
    return known.names if names is None and known is not None else names


def names_in_config(model: nn.Module) -> Names | None:
    """Return the names in a model's config; None if it has only LABEL_0, LABEL_1 and so on."""
    return names_by_number(getattr(config_of(model), "id2label", None), model)


def names_by_number(id2label: Any, model: nn.Module) -> Names | None:
    """Return the names in an ``id2label``; None if it tells no more than the numbers do.

    Args:
        id2label: Names by number, as in a config.
        model: The model.
    """
    if not isinstance(id2label, Mapping):
        return None
    if not all(str(number).isdigit() for number in id2label):
        return None
    by_number = {int(number): str(name) for number, name in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        return None
    names = tuple(by_number[number] for number in range(len(by_number)))
    is_unclear = len(set(names)) < len(names)
    return None if is_unclear or are_numbers(names) or not _has_classes(model) else names


def _has_classes(model: nn.Module) -> bool:
    # The config of any other head has an id2label as well, without a meaning.
    is_answering = type(unwrap_model(model)).__name__.endswith("ForQuestionAnswering")
    return not is_answering and infer_task(model) not in _WITHOUT_CLASSES


def are_numbers(names: Sequence[str]) -> bool:
    """Tell whether names repeat the numbers of the classes, and tell no more than these.

    >>> are_numbers(["LABEL_0", "LABEL_1"]), are_numbers(["0", "1"]), are_numbers(["1", "0"])
    (True, True, False)
    """
    return all(name in (f"LABEL_{number}", str(number)) for number, name in enumerate(names))


def are_numbered_alike(names: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether each number means the same class, as far as both have names for it.

    Names that differ in case or in spaces alone are taken for the same only in the same place, and
    only where neither is among the names of the other side as it is written.

    >>> are_numbered_alike(["neg", "pos"], ["NEG", "POS"])
    True
    >>> are_numbered_alike(["neg", "pos"], ["pos", "neg"])
    False
    >>> are_numbered_alike(["a", "A"], ["A", "a"])
    False
    """
    here, there = frozenset(names), frozenset(others)
    return all(
        name == other or (folded(name) == folded(other) and name not in there and other not in here)
        for name, other in zip(names, others, strict=False)
    )


def folded(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores.

    >>> folded("Not spam ") == folded("not_spam")
    True
    """
    return "".join(part for part in name.casefold() if part not in " \t\n-_")


def show_names(names: Sequence[str]) -> str:
    """Return names with their numbers, for a line.

    >>> show_names(["neg", "pos"])
    '0 = neg, 1 = pos'
    """
    shown = [f"{number} = {name}" for number, name in enumerate(names[:_NUM_SHOWN])]
    more = [f"... ({len(names)} classes)"] if len(names) > _NUM_SHOWN else []
    return ", ".join(shown + more)


class Naming(NamedTuple):
    """The classes of some splits.

    Attributes:
        names: Name of each class, by number; None if the data have no names.
        numbered: Names of the splits whose labels became numbers, or other numbers.
        refused: Names of the splits with a class that was refused.
        is_numbered: Whether the labels are the numbers of these names; else they are made of them,
            such as rows of 0 and 1.
    """

    names: Names | None = None
    numbered: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    is_numbered: bool = False


def name_model(model: nn.Module | None, naming: Naming) -> None:
    """Name the classes in a model's config, and log what was done to labels and model."""
    if naming.names is None:
        return
    done = []
    if naming.numbered:
        done.append(f"numbered so in {', '.join(naming.numbered)}")
    if model is not None and _give_names(model, naming.names):
        done.append(f"named so in the config of {model_name(model)}")
    if done:
        say(f"classes are {show_names(naming.names)}: {'; '.join(done)}")


class _Known(NamedTuple):
    """Names that a model has from data.

    Attributes:
        names: The names.
        weights: Some numbers of each trainable weight when the data were prepared for it; None if
            it was trained on them.
    """

    names: Names
    weights: Tensor | None


# Of a model that is trained, its weights decide what a number means, in whatever loop or loader.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _give_names(model: nn.Module, names: Names) -> bool:
    """Name the classes of a model; tell whether its config has other names now."""
    before = names_of(model)
    if before == names and not are_given(model):
        return False
    is_put = put_names(model, config_of(model), names)
    all_names = (is_put and names_in_config(model)) or names
    _known[unwrap_model(model)] = _Known(all_names, _sample(model))
    return is_put and before != all_names


def put_names(model: nn.Module, config: Any, names: Names) -> bool:
    """Put the names of the classes into the config of a classifier; tell whether it is one.

    A model with more outputs than there are names keeps LABEL_n for the others.
    """
    number = num_classes(model)
    if number is None or number < 2 or not hasattr(config, "id2label") or not _has_classes(model):
        return False
    all_names = (*names, *(f"LABEL_{n}" for n in range(len(names), number)))[:number]
    config.id2label = dict(enumerate(all_names))
    config.label2id = {name: n for n, name in enumerate(all_names)}
    return True


def are_given(model: nn.Module) -> bool:
    """Tell whether a model has its names from other data, and has not been trained since."""
    known = _known.get(unwrap_model(model))
    if known is None or known.weights is None or known.names != names_of(model):
        return False
    weights = _sample(model)
    return weights is not None and torch.equal(weights, known.weights)


def _sample(model: nn.Module) -> Tensor | None:
    weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    if is_sharded(model) or any(weight.is_meta for weight in weights):
        return None
    flat = [weight.reshape(-1) for weight in weights if weight.numel()]
    return torch.cat([w[[0, w.numel() // 2, -1]].double().cpu() for w in flat] or [torch.empty(0)])
