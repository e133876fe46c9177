"""Whether what a model makes of a row depends on the padding beside it, tried on the model at hand.

Models that number positions from the first column see how far a row is padded on the left, and
classifiers that take the last token before the padding must know the pad token. Otherwise a row has
another loss in another batch, and nothing shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from manualloop.errors import DataError, ManualLoopError, ModelError
from manualloop.models import (
    coarsest_dtype,
    config_of,
    evaluation_mode,
    forward_columns,
    has_soft_prompt,
    is_sharded,
    model_name,
    text_config,
    unwrap_model,
)
from manualloop.notices import say
from manualloop.tasks.float32 import in_float32
from manualloop.tasks.isolation import RAISED_BY_MODELS, inputs_of, parts_of_loss
from manualloop.tasks.positions import report_positions
from manualloop.tasks.task import IGNORE_INDEX, infer_task
from manualloop.types import LossFn

_OF_ROWS = ("single_label_classification", "multi_label_classification", "regression")
_NUM_ROWS = 4  # that are compared
_ROUNDING = 1e-3  # relative, in float32; other kinds of numbers have more


def require_padding_unseen(
    model: nn.Module,
    batch: Any,
    inputs: Any,
    loss_fn: LossFn | None = None,
    *,
    refuses: bool = True,
) -> None:
    """Refuse a batch whose padding changes what a model makes of its rows.

    The model is tried with the first batch that is padded on the left and, if it makes one
    prediction a row, with the first that is padded with another token than its config names. What
    came out is remembered.

    Args:
        model: The model.
        batch: The batch, on the CPU if the loader gave it there.
        inputs: The batch on the model's device.
        loss_fn: Function that calls the model; None where it is called with the columns.
        refuses: Whether to refuse it, rather than log that it is so.

    Raises:
        DataError: The mask has another length than the tokens, or the model sees the padding.
        ModelError: The model does not know the pad token.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or not 2 <= mask.ndim <= 3:
        return
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != mask.ndim:
        return
    if ids.shape != mask.shape:
        raise DataError(_other_length_message(ids, mask))
    known = _KNOWN.setdefault(model, set())
    if _PLACES not in known and report_positions(model, batch):
        known.add(_PLACES)
    if not mask.numel() or (mask.device.type != "cpu" and _ON_DEVICE in known):  # a look waits
        return
    key: Any = _PADS
    first = mask[..., 0].cpu()
    first = first.float() if first.dtype == torch.bfloat16 else first  # NumPy has no such numbers
    begins = first.numpy() != 0  # which takes a fifth of the time of torch
    if not begins.all() and mask[torch.from_numpy(~begins)].any():  # some may have no tokens at all
        function, held = parts_of_loss(loss_fn)
        key = ("left", function, *map(ref, held))
    elif known.isdisjoint((_BY_ROW, _PADS)):
        known.add(_BY_ROW if _predicts_rows(model) else _PADS)
    is_open = key == _PADS and _PADS not in known
    is_full = is_open and bool(mask.all())
    is_known = is_open and not is_full and _are_known_pads(model, ids, mask)
    if is_known and not has_soft_prompt(model):  # whose model gets embeddings in place of tokens
        known.add(_PADS)
    if key in known or is_full:
        if mask.device.type != "cpu":
            known.add(_ON_DEVICE)
        return
    told = (_TOLD, key)
    if told in known and not refuses:
        return
    error = None
    if is_sharded(model):
        say(_sharded_message(model, key == _PADS))
    else:
        error = _error_of(model, inputs, loss_fn, key == _PADS)
    if error is not None:
        if refuses:
            raise error
        say(f"{error}")
        known.add(told)  # what uses the outputs is refused nevertheless
        return
    known.add(key)
    if mask.device.type != "cpu":
        known.add(_ON_DEVICE)


_PADS, _ON_DEVICE, _TOLD = "its pad token", "a batch on the device", "logged"
_BY_ROW, _PLACES = "one prediction a row", "positions for the longest row"
_KNOWN: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""What is known not to matter to a model, or was logged, and of what it makes a prediction."""


def _predicts_rows(model: nn.Module) -> bool:
    """Tell whether a model makes one prediction of a row, perhaps from its last token."""
    return config_of(model) is not None and infer_task(model) in _OF_ROWS


def _text_config(model: nn.Module) -> Any:
    return text_config(config_of(model))


def _are_known_pads(model: nn.Module, ids: Tensor, mask: Tensor) -> bool:
    pad = getattr(_text_config(model), "pad_token_id", None)
    return isinstance(pad, int) and bool((ids[mask == 0] == pad).all())


def _error_of(
    model: nn.Module, inputs: Any, loss_fn: LossFn | None, is_on_right: bool
) -> ManualLoopError | None:
    """Return the error about a model that sees the padding of a batch; None if none does.

    Looked at are the model and those that the loss holds, each with the columns that it gets.
    """
    inner = unwrap_model(model, adapters=False)
    try:
        calls = _calls_of(inner, inputs, loss_fn)
    except Exception:
        return None  # the pass that follows raises it too, and explains it
    for module, columns in calls.items():
        try:
            with evaluation_mode(module, columns["input_ids"].device):
                if (error := _error_of_call(module, columns, is_on_right)) is not None:
                    return error
        except RAISED_BY_MODELS as error:
            say(
                f"nothing tells whether {model_name(module)} sees padding: it could not be called "
                f"with a row alone ({type(error).__name__}: {error!s:.100})."
            )
    return None


def _calls_of(
    model: nn.Module, inputs: Any, loss_fn: LossFn | None
) -> dict[nn.Module, dict[str, Any]]:
    """Return the columns with which a model, and those that a loss holds, are called."""
    calls: dict[nn.Module, dict[str, Any]] = {}

    def note(module: nn.Module, args: Any, columns: Mapping[str, Any]) -> None:
        call = {**dict(zip(forward_columns(module), args, strict=False)), **columns}
        if _num_padded(call) > _num_padded(calls.get(module, {})):  # a proof may use a few tokens
            calls[module] = call

    if loss_fn is None:
        note(model, (), inputs_of(model, inputs))
    else:
        held = [unwrap_model(part, adapters=False) for part in parts_of_loss(loss_fn)[1]]
        modules = dict.fromkeys([model, *held])
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
        try:
            with evaluation_mode(model, inputs["input_ids"].device, loss_fn=loss_fn):
                loss_fn(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _num_padded(columns: Mapping[str, Any]) -> int:
    ids, mask = columns.get("input_ids"), columns.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
        return 0
    return int((mask == 0).sum())


def _error_of_call(
    module: nn.Module, columns: dict[str, Any], is_on_right: bool
) -> ManualLoopError | None:
    ids, mask = columns["input_ids"], columns["attention_mask"]
    difference = _difference(module, columns)
    if difference <= 1:
        return None
    if _predicts_rows(module) and not _are_known_pads(module, ids, mask):
        pad, config = int(ids[mask == 0][0]), _text_config(module)
        before, config.pad_token_id = config.pad_token_id, pad
        with_pad = _difference(module, columns)
        config.pad_token_id = before
        if with_pad < difference:
            return ModelError(_pad_message(module, before, pad))
    if is_on_right and has_soft_prompt(module):
        return ModelError(_prompt_message(module))
    return None if is_on_right else DataError(_left_message(module))


def _difference(module: nn.Module, columns: dict[str, Any]) -> float:
    """Return by how much the logits of rows differ from those of the rows alone.

    In multiples of what rounding may make, which is that of float32 where the model can be called
    in it; the median over rows and tokens, because rounding may send single tokens to other
    experts.
    """
    device = columns["input_ids"].device
    dtype = coarsest_dtype(module, device)
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps and not _is_quantized(module):
        try:
            with in_float32(device):
                return _difference_in(torch.float32, module, columns)
        except RAISED_BY_MODELS:
            pass  # of kernels for half precision alone
    return _difference_in(dtype, module, columns)


def _is_quantized(module: nn.Module) -> bool:
    return getattr(config_of(module), "quantization_config", None) is not None


def _difference_in(dtype: torch.dtype, module: nn.Module, columns: dict[str, Any]) -> float:
    width, found = columns["input_ids"].shape[-1], []
    for cut in _cuts(columns["attention_mask"]):
        padded = _logits_of(module, columns, Cut(cut.row, slice(None)))
        alone = _logits_of(module, columns, cut)
        number = cut.place.stop - cut.place.start
        if padded is None or alone is None:
            continue
        if padded.ndim > 2 and padded.shape[1] == width and alone.shape[1:2] == (number,):
            padded = padded[:, cut.place]  # one for each token
        if (apart := _apart(padded, alone, dtype)) is not None:
            found.append(apart)
    return float(torch.cat(found).median()) if found else 0.0


class Cut(NamedTuple):
    """A row, and the place of those of its tokens that are used."""

    row: int
    place: slice


def _cuts(mask: Tensor) -> list[Cut]:
    """Return the rows that are padded most, on the left if any is, with the place of their tokens.

    Rows whose mask has gaps are left out.
    """
    width = mask.shape[-1]
    there = (mask != 0).reshape(len(mask), -1, width).any(1).int().cpu()
    begins, numbers = there.argmax(1), there.sum(1)
    most = begins if bool(begins.any()) else width - numbers
    cuts = []
    for row in most.argsort(descending=True)[:_NUM_ROWS].tolist():
        begin, number = int(begins[row]), int(numbers[row])
        place = slice(begin, begin + number)
        if number and int(most[row]) and bool(there[row, place].all()):
            cuts.append(Cut(row, place))
    return cuts


def _logits_of(module: nn.Module, columns: dict[str, Any], cut: Cut) -> Any:
    """Return the logits of a row, or of a part of it; those of labels if there are some for each.

    Args:
        module: The model.
        columns: The columns that it is called with.
        cut: The row, and the part of it that the model gets.
    """
    shape = columns["input_ids"].shape
    row = {name: part_of(name, column, shape, cut) for name, column in columns.items()}
    labels = row.pop("labels", None)
    if getattr(config_of(module), "is_encoder_decoder", False) and isinstance(labels, Tensor):
        labels = columns["labels"][cut.row : cut.row + 1]
        if cut.place != slice(None):
            labels = labels[:, int((labels[0] != IGNORE_INDEX).int().argmax()) :]
        row = {name: c for name, c in row.items() if not name.startswith("decoder_")}
        row["labels"] = labels
    outputs = module(**row)
    named = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    found = [outputs, named.get("logits"), named.get("last_hidden_state")]
    logits = next((one for one in found if isinstance(one, Tensor)), None)
    if logits is not None and "labels" in row and logits.shape[1] == labels.shape[1]:
        return logits[labels != IGNORE_INDEX]
    return logits


def part_of(name: str, column: Any, shape: torch.Size, cut: Cut) -> Any:
    """Return what a column has for a row and, where it has something for each token, for some.

    Args:
        name: Its name, which tells columns that are of no token, whatever their shape is.
        column: The column.
        shape: The shape of the tokens, ``(rows, tokens)`` or ``(rows, choices, tokens)``.
        cut: The row, and the place of its tokens.
    """
    if not isinstance(column, Tensor) or not column.ndim:
        return column
    rows, tokens = slice(cut.row, cut.row + 1), (slice(None),) * (len(shape) - 2)
    before = column.ndim - len(shape)
    if name.endswith("position_ids") and before >= 0 and column.shape[before + 1 :] == shape[1:]:
        rows = rows if column.shape[before] == shape[0] else slice(None)  # one row for all
        return column[(slice(None),) * before + (rows, *tokens, cut.place)]
    if len(column) != shape[0]:
        return column
    if column.shape[: len(shape)] == shape and not name.startswith(_OF_OTHERS):
        return column[(rows, *tokens, cut.place)]
    return column[rows]


_OF_OTHERS = ("pixel", "image", "video", "visual", "audio", "speech", "input_features")
"""Beginnings of the names of columns of images and sounds."""


def _apart(padded: Any, alone: Any, dtype: torch.dtype) -> Tensor | None:
    """Return the differences of logits, in multiples of rounding; None if nothing compares.

    Args:
        padded: The logits of a row that is padded.
        alone: Those of the row alone.
        dtype: The kind of numbers that the model computes with.
    """
    if padded is None or alone is None or padded.shape != alone.shape or not alone.numel():
        return None
    rounding = max(_ROUNDING, *(8 * torch.finfo(kind).eps for kind in (dtype, padded.dtype)))
    both: Tensor = torch.stack((padded, alone)).cpu().double()
    if both.shape[-1] > 2:  # a number that all logits of a token have makes no difference
        both = both - both.mean(-1, keepdim=True)
    size = float(both[1].abs().max()) or 1.0
    return (both[0] - both[1]).abs().amax(-1).flatten() / (rounding * size)


def _sharded_message(model: nn.Module, is_of_pads: bool) -> str:
    name = model_name(model)
    head = f"nothing tells whether {name} sees padding: it is sharded, and is not tried. "
    if is_of_pads:
        return f"{head}model.config.pad_token_id has to be the pad token of the batches."
    return (
        f"{head}A model that numbers positions from the first column does: pad on the right, "
        'tokenizer.padding_side = "right".'
    )


def _left_message(model: nn.Module) -> str:
    name = model_name(model)
    return (
        f"A batch is padded on the left, and {name} sees how far: what it makes of a row depends "
        "on the longest row of its batch. It numbers positions from the first column. Pad on the "
        'right, before the loader is made: tokenizer.padding_side = "right". To generate, '
        "manualloop.tasks.generated pads prompts on the left itself."
    )


def _pad_message(model: nn.Module, known: Any, pad: int) -> str:
    config = "model.config"
    if _text_config(model) is not config_of(model):
        config = "model.config.get_text_config()"
    return (
        f"{model_name(model)} predicts from the last token of a row that is not "
        f"{config}.pad_token_id, which is {known}, and the batch is padded with {pad}: of a "
        f"shorter row it would take padding. Name the token: {config}.pad_token_id = {pad}."
    )


def _prompt_message(model: nn.Module) -> str:
    return (
        f"{model_name(model)} predicts from the last place of a row, which is padding in the "
        "shorter rows of a batch: with a soft prompt of PEFT it gets embeddings, and nothing tells "
        "it the padding. Take adapters that leave it its tokens, such as LoraConfig or "
        "PrefixTuningConfig, or batches of one row: batch_size=1."
    )


def _other_length_message(ids: Tensor, mask: Tensor) -> str:
    return (
        f"input_ids have the shape {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}: the "
        "mask does not tell which of these tokens are padding. Leave it out, so that the loader "
        'makes it of the tokens: dataset.remove_columns("attention_mask").'
    )
