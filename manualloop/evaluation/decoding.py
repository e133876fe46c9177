"""A ``decode`` that runs the model, as one that lets it write a text for each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.evaluation.rows import Decode
from manualloop.evaluation.table import Table
from manualloop.models import config_of, model_name, unwrap_model
from manualloop.notices import say
from manualloop.strategy.base import Strategy

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
        takes_model: Whether the function has a parameter ``model``.
    """

    function: AnyDecode
    model: nn.Module
    strategy: Strategy
    takes_model: bool

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """Return what the function makes of a batch."""
        function: Any = self.function
        with _right_padding_refused(self.model):
            if not self.takes_model:
                return function(outputs, batch)
            with self.strategy.autocast():
                return function(outputs, batch, model=self.model)


def with_model(decode: AnyDecode | None, model: nn.Module, strategy: Strategy) -> Decode | None:
    """Return a ``decode`` of two arguments; None for none."""
    if decode is None:
        return None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return Decoding(decode, model, strategy, takes_model(decode))


def takes_model(function: Callable[..., Any]) -> bool:
    """Tell whether a function has a parameter ``model`` that it does not hold already."""
    try:
        parameter = inspect.signature(function).parameters.get("model")
    except (TypeError, ValueError):  # of C
        return False
    return parameter is not None and parameter.default is parameter.empty


def lets_write(decode: Decode | None) -> Literal["no", "perhaps", "yes"]:
    """Tell whether a ``decode`` of ``with_model`` lets the model write; a closure may hold it."""
    if decode is None:
        return "no"
    return "yes" if getattr(decode, "takes_model", False) else "perhaps"


def uses_outputs(decode: AnyDecode | None) -> bool:
    """Tell whether a ``decode`` uses the outputs: one that lets the model write does not."""
    function = decode.function if isinstance(decode, Decoding) else decode
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "uses_outputs", True) is not False


def show_samples(decode: Decode | None, table: Table) -> None:
    """Log the texts of the first rows, if the function asks for it by an attribute ``shows``."""
    function = decode.function if isinstance(decode, Decoding) else decode
    number = getattr(function, "shows", 0)
    found, right = table.columns["predictions"], table.columns.get("references")
    if not isinstance(number, int) or number < 1:
        return
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
