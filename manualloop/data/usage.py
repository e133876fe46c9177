"""The line on which columns of a split are used and which are dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from manualloop.data.functions import RAW, Functions
from manualloop.data.splits import Split
from manualloop.models import model_name
from manualloop.tasks.places import POSITIONS

if TYPE_CHECKING:
    from manualloop.data.survey import Survey


def note_of(
    raw: Iterable[str],
    split: Split,
    found: Survey,
    functions: Functions,
    model: nn.Module | None,
    hidden: str | None,
) -> str:
    """Return the line on which columns a split uses and drops."""
    (texts, label), kinds = found.columns, split.kinds
    takes, keep = functions.takes, functions.keep
    kept = [name for name in kinds if takes(name, kinds[name])]
    inputs = [name for name in kept if name != "labels"]
    note = f"using {', '.join(texts or inputs)}{' -> labels' if 'labels' in kept else ''}"
    if also := [name for name in keep if name in kinds or name == label]:
        note += f"; keeping {', '.join(also)}"
    known = (*kept, *texts, *also, label, RAW)
    if dropped := [name for name in (*raw, *kinds) if name not in known]:
        note += f"; dropped: {', '.join(dict.fromkeys(dropped))}{taker_of(model)}"
    if hidden is not None:
        note += f"; every {label} is {hidden}, so there are no labels"
    elif not ("labels" in kept or {*POSITIONS} <= {*kept}) and split.is_train and (dropped or also):
        source = getattr(functions.preprocess, "label_column", None)
        reason = "label_column= names them"
        if source is not None and source not in raw:
            reason = f"preprocess= makes them of a column {source!r}, which is not there"
        note += f"; there are no labels: {reason}"
    return note


def taker_of(model: nn.Module | None) -> str:
    """Return words on what takes the columns; none if it is unknown."""
    return "" if model is None else f" (not in {model_name(model)}.forward)"
