"""A ``decode`` that runs the model, as one that lets it write a text for each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.models import config_of, model_name, unwrap_model
from manualloop.notices import say
from manualloop.strategy.base import Strategy
from manualloop.types import Batch

if TYPE_CHECKING:
    from manualloop.evaluation.table import Table

Decode: TypeAlias = "Callable[[Any, Batch], list[Any] | tuple[list[Any], list[Any]]]"
"""``decode(outputs, batch)`` returns one object of Python for each row.

With two lists, the first holds the predictions and the second the references.
"""

AnyDecode: TypeAlias = "Decode | Callable[[Any, Any, nn.Module], Any]"
"""A ``decode`` of the user's: one with a parameter ``model`` gets the model that is evaluated."""

_CACHE = ("past_key_values", "cache")  # of transformers; the second since 5.24
_WIDTH = 100  # characters of a text that a line shows


@dataclass(frozen=True)
class Decoding:
    """A ``decode`` that is given the model, if it has a parameter for it.

    Attributes:
        function: The user's function.
        model: The model that is evaluated.
        strategy: The strategy, under whose precision the model runs.
        takes_model: Whether the function has a parameter ``model``, to let it write. A closure may
            hold it all the same.
        uses_outputs: Whether the function uses the outputs: one that lets the model write does not.
        num_shown: Number of rows whose texts are logged.
    """

    function: AnyDecode
    model: nn.Module
    strategy: Strategy
    takes_model: bool
    uses_outputs: bool
    num_shown: int

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """Return what the function makes of a batch."""
        function: Any = self.function
        with _right_padding_refused(self.model):
            if not self.takes_model:
                return function(outputs, batch)
            with self.strategy.autocast():
                return function(outputs, batch, model=self.model)


def with_model(decode: AnyDecode, model: nn.Module, strategy: Strategy) -> Decoding:
    """Return a ``decode`` of two arguments, with what its attributes tell about it."""
    number = getattr(decode, "shows", 0)
    num_shown = max(number, 0) if isinstance(number, int) else 0
    function: Any = decode
    while isinstance(function, partial):
        function = function.func
    uses_outputs = getattr(function, "uses_outputs", True) is not False
    return Decoding(decode, model, strategy, _takes_model(decode), uses_outputs, num_shown)


def _takes_model(function: Callable[..., Any]) -> bool:
    """Tell whether a function has a parameter ``model`` that it does not hold already."""
    try:
        parameter = inspect.signature(function).parameters.get("model")
    except (TypeError, ValueError):  # of C
        return False
    return parameter is not None and parameter.default is parameter.empty


def show_samples(table: Table, number: int) -> None:
    """Log the texts of the first rows of a table."""
    if not number:
        return
    found, right = table.columns["predictions"], table.columns.get("references")
    texts = found.rows(table.order)[:number]
    wanted = [None] * len(texts) if right is None else right.rows(table.order)[:number]
    numbers = range(len(texts)) if table.index is None else table.index.tolist()
    for row, text, reference in zip(numbers, texts, wanted, strict=False):
        shown = "" if reference is None else f"; the right one: {_short(reference)}"
        say(f"row {row}: the model writes {_short(text)}{shown}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


@contextmanager
def _right_padding_refused(model: nn.Module) -> Iterator[None]:
    """Refuse to continue prompts that are padded on the right, in a ``decode`` of any kind.

    The model would write what it finds likely after padding, without an error. The first two calls
    of the model tell: the first fills a cache, the second has a token after the padding.

    Raises:
        DataError: A prompt is padded on the right.
    """
    inner = unwrap_model(model)
    is_encoder_decoder = getattr(config_of(inner), "is_encoder_decoder", False)
    if is_encoder_decoder or not callable(getattr(inner, "generate", None)):
        yield
        return
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: Any, columns: Mapping[str, Any]) -> None:
        mask = columns.get("attention_mask")
        if len(seen) == 2 or not isinstance(mask, Tensor) or mask.ndim != 2:
            return
        seen.append(mask)
        ends_in_padding = (seen[0][:, -1] == 0) & seen[0].any(1)
        if len(seen) == 1:  # without a cache it may be no more than a forward pass
            fills_cache = any(columns.get(name) is not None for name in _CACHE)
            is_refused = fills_cache and ends_in_padding.any()
        else:
            is_next = mask.shape == (len(seen[0]), seen[0].shape[1] + 1)
            is_refused = is_next and (mask[ends_in_padding, -1] != 0).any()
        if is_refused:
            raise DataError(
                f"decode lets {model_name(module)} continue prompts that are padded on the right: "
                "it would write what comes after padding. Let them be padded on the left: "
                "decode=manualloop.tasks.generated(tokenizer)."
            )

    hook = inner.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
