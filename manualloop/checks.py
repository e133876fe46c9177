"""Checks for the mistakes that can be seen before the first update.

``check_run`` looks at the model and its optimizer, ``check_batches`` at the first window of a run.
When a later batch fails inside the model, ``explain`` looks at that batch in the same way.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from manualloop.batches import columns_of, model_inputs
from manualloop.data.labels import BY_TOKEN, check_class_ids, check_spans, warn_of_classes_as_values
from manualloop.data.splits import fix_all, fix_of
from manualloop.errors import ConfigError, DataError, ManualLoopError, ModelError
from manualloop.internals import unwrap_optimizer
from manualloop.mistakes import (
    arrays_message,
    device_message,
    devices_message,
    dtypes_message,
    filter_missing,
    integers_call,
    misaligned_message,
    no_class_message,
    no_columns_message,
    no_head_message,
    no_items_message,
    no_labels_message,
    no_pad_message,
    scalar_floats_message,
    targets_message,
    text_message,
    type_message,
)
from manualloop.models import (
    config_of,
    devices_of,
    forward_of,
    is_sharded,
    model_name,
    num_labels,
    part_in_eval_mode,
    unwrap_model,
)
from manualloop.notices import say, warn
from manualloop.optimizers.access import parameters_of
from manualloop.optimizers.prepare import require_trainable
from manualloop.optimizers.together import class_of, each
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.tasks.lookahead import look_at_texts
from manualloop.tasks.task import Task, infer_task, resolve_task, wrong_target
from manualloop.tasks.tokens import check_tokens, is_of_tokens, limits_of, refuse_copies
from manualloop.types import Place


def check_run(state: TrainState, strategy: Strategy, *, calls_step: bool = True) -> None:
    """Refuse a model that cannot be trained, or an optimizer of another model.

    Args:
        state: The state of the run.
        strategy: The strategy of the run.
        calls_step: Whether the loop itself makes the updates, rather than a ``step_fn``.

    Raises:
        ModelError: The model has no trainable parameter, or float16 weights under a loss scale, or
            the optimizer holds parameters that are not the model's.
        ConfigError: The optimizer needs a closure, or one that is stepped in the loop body would
            see gradients that are multiplied by a loss scale.
    """
    trainable = require_trainable(state.model)
    if strategy.world_size == 1:  # ranks may get their weights when they are sharded
        _check_devices(state.model, (), ())
    _check_precision(state.model, trainable, strategy)
    own = {id(parameter) for parameter in trainable}
    updated = parameters_of(state.optimizer)
    if not any(id(parameter) in own for parameter in updated):
        raise ModelError(
            f"None of the optimizer's {len(updated)} parameters is a trainable parameter of this "
            f"{model_name(state.model)}. Build it from the model after loading it: "
            "prepare_optimizer(model)."
        )
    if calls_step:
        for optimizer in each(state.optimizer):
            _refuse_closure(optimizer)
    if is_sharded(state.model) and not hasattr(state.model, "set_requires_gradient_sync"):
        return  # the optimizer holds flat parameters of its own
    _check_owners(state, updated, strategy)
    if (part := part_in_eval_mode(state.model)) is not None:
        say(
            f"{part} is in eval mode, as from_pretrained returns a model, and stays in it: it is "
            "trained without dropout. To train with dropout, call model.train() before."
        )
    others = _check_other_optimizers(state, strategy)
    _report_left_alone(state.model, [*updated, *others])


def _refuse_closure(optimizer: Any) -> None:
    parameters = inspect.signature(type(unwrap_optimizer(optimizer)).step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is _POSITIONAL][1:]
    if needed:
        name = class_of(optimizer)
        raise ConfigError(
            f"{name}.step() needs {', '.join(needed)}: it computes the loss several times an "
            f"update. Use another optimizer, such as prepare_optimizer(model), or call {name} in a "
            "step_fn of your own."
        )


_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _check_owners(state: TrainState, updated: Sequence[Tensor], strategy: Strategy) -> None:
    """Refuse parameters of an optimizer that nobody else has, or that ranks would not share."""
    known = {id(parameter) for parameter in state.parameter_names().values()}
    foreign = [parameter for parameter in updated if id(parameter) not in known]
    name = model_name(state.model)
    if foreign:
        raise ModelError(
            f"The optimizer holds {len(foreign)} of its {len(updated)} parameters alone, the first "
            f"of shape {tuple(foreign[0].shape)}: this {name} does not have them (any more). Build "
            "the optimizer after the last change of the model: prepare_optimizer(model). If they "
            'belong to a loss with weights, keep that in the state: extras={"loss": loss_fn}.'
        )
    if strategy.world_size == 1:
        return
    own = {id(parameter) for parameter in state.model.parameters()}
    for key, extra in state.extras.items():
        if isinstance(extra, nn.Module) and not isinstance(extra, DistributedDataParallel):
            theirs = {id(parameter) for parameter in extra.parameters()} - own
            if any(id(parameter) in theirs for parameter in updated):
                raise ModelError(
                    f"The optimizer updates parameters of extras[{key!r}], whose gradients would "
                    "differ from rank to rank. Wrap it: "
                    "torch.nn.parallel.DistributedDataParallel(module)."
                )


def _check_other_optimizers(state: TrainState, strategy: Strategy) -> list[Tensor]:
    """Return the parameters of optimizers that the loop does not step itself."""
    others: list[Tensor] = []
    for key, extra in state.extras.items():
        if not hasattr(extra, "param_groups"):
            continue
        if strategy.scales_losses:
            raise ConfigError(
                f"The {class_of(extra)} in extras[{key!r}] would update with gradients that are "
                f'multiplied by the loss scale of mixed_precision="{strategy.precision}". Let the '
                "loop step both: TrainState(model, [optimizer, other])."
            )
        others += parameters_of(extra)
    return others


def _report_left_alone(model: nn.Module, updated: Sequence[Tensor]) -> None:
    in_optimizer = {id(parameter) for parameter in updated}
    left = [
        (name, parameter)
        for name, parameter in unwrap_model(model, adapters=False).named_parameters()
        if parameter.requires_grad and id(parameter) not in in_optimizer
    ]
    if left:
        numbers = sum(parameter.numel() for _, parameter in left)
        say(
            f"no optimizer updates {len(left)} trainable parameters ({numbers} numbers), the first "
            f"of them {left[0][0]}. Build it after the last change of the model, or freeze them: "
            "parameter.requires_grad_(False)."
        )


def _check_precision(
    model: nn.Module, trainable: Sequence[nn.Parameter], strategy: Strategy
) -> None:
    dtypes = {parameter.dtype for parameter in trainable}
    fix = "load the model in float32, from_pretrained(name, dtype=torch.float32)"
    if torch.float16 in dtypes and strategy.scales_losses:
        raise ModelError(
            f"The weights of {model_name(model)} are float16: gradients of a scaled loss cannot "
            f'be unscaled in that dtype. Keep mixed_precision="fp16", and {fix}.'
        )
    for dtype in dtypes & {torch.bfloat16, torch.float16}:
        name = str(dtype).removeprefix("torch.")
        warn(
            f"The trainable weights of {model_name(model)} are {name}: small updates are rounded "
            f"away. For mixed precision {fix}, and prepare_strategy(mixed_precision="
            f'"{"bf16" if dtype == torch.bfloat16 else "fp16"}").'
        )


class _Facts(NamedTuple):
    """What is asked of a model about each micro-batch."""

    model: nn.Module
    columns: list[str]
    takes_any: bool
    is_by_token: bool  # known by the head; other models do not tell
    is_of_transformers: bool
    num_labels: int | None


def check_batches(
    model: nn.Module,
    batches: Sequence[Any],
    place_of: Callable[[int], Place],
    starts: Sequence[int],
    *,
    needs_labels: bool = True,
    needs_items: bool = True,
    tokenizer: Any = None,
) -> Task | None:
    """Refuse micro-batches that the model cannot learn from; return the task of the last.

    Args:
        model: Model that gets the batches.
        batches: Consecutive micro-batches.
        place_of: Function from the number of rows before a batch in its epoch to its name.
        starts: Number of rows of the epoch before each batch.
        needs_labels: Whether the batches need labels; False where the model only predicts.
        needs_items: Whether to refuse batches whose labels are all ignored.
        tokenizer: The tokenizer that made them; None if it is unknown.

    Raises:
        DataError: Text, a missing or impossible label, a token that the model does not know, ...
        ModelError: The model has no head, or does not take these columns.
    """
    places = [place_of(start) for start in starts]
    is_by_token, is_of_transformers = infer_task(model) in BY_TOKEN, config_of(model) is not None
    columns, takes_any = forward_of(model)
    facts = _Facts(model, columns, takes_any, is_by_token, is_of_transformers, num_labels(model))
    num_items: float = 0
    task: Task | None = None
    limits: Any = None
    _check_devices(model, batches, places)
    for batch, place in zip(batches, places, strict=True):
        _check_columns(facts, batch, needs_labels)
        if isinstance(batch.get("input_ids"), Tensor):
            limits = limits or limits_of(model)
            check_tokens(model, batch, place, limits)
        task = resolve_task(model, batch, task)
        labels = batch.get("labels")
        if task.name == "question_answering":
            check_spans(batch, place.row)
        elif facts.is_of_transformers:
            _check_type(labels, task, place)
        if isinstance(labels, Tensor):
            _check_labels(facts, batch, labels, task, place)
        counts = task.count(batch)
        num_items += sum(counts) if counts else 1  # nothing tells how many
    if needs_labels and needs_items and num_items == 0:
        raise DataError(no_items_message(batches, places[0].batch))
    if needs_items:
        if needs_labels and task is not None and task.name == "masked_lm":
            refuse_copies(model, batches, places[0])
        if task is not None and task.name in _OF_TOKENS:
            look_at_texts(model, batches, tokenizer=tokenizer)
    return task


_OF_TOKENS = ("causal_lm", "masked_lm", "token_classification")


EXPLAINED = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors of a model or a loss that a mistake in the batch may explain."""


def explain(
    error: Exception,
    model: nn.Module,
    batches: Sequence[Any],
    place_of: Callable[[int], Place],
    starts: Sequence[int],
    *,
    needs_labels: bool = True,
) -> None:
    """Raise the mistake in the data that explains an error from the model, if there is one."""
    try:
        # Later batches may have only ignored labels, which explain no error.
        check_batches(
            model, batches, place_of, starts, needs_labels=needs_labels, needs_items=False
        )
    except ManualLoopError as mistake:
        raise mistake from error
    explain_loss(error, model, batches, place_of, starts)


def explain_loss(
    error: Exception,
    model: nn.Module,
    batches: Sequence[Any],
    place_of: Callable[[int], Place],
    starts: Sequence[int],
) -> None:
    """Raise the mistake in a batch that explains an error from a ``loss_fn``, if there is one.

    Only what the loss has complained of is looked for: a ``loss_fn`` may use a batch in any way.

    Raises:
        DataError: A label or a column is of a type or a value that the loss does not take.
    """
    text = str(error)
    if _NO_PAD.search(text):
        raise ModelError(no_pad_message(model)) from error
    if is_of_tokens(error):
        _explain_tokens(error, model, batches, place_of, starts)
    is_of_arrays = isinstance(error, AttributeError | TypeError) and _NO_TENSOR.search(text)
    if _OF_DEVICES.search(text):
        _check_devices(model, batches, [*map(place_of, starts)], error)
    if (message := dtypes_message(model, batches[0], place_of(starts[0]).batch, text)) is not None:
        raise DataError(message) from error
    found = _NO_CLASS.search(text)
    if found is None and not is_of_arrays and not _NO_TYPE.search(text):
        return
    for batch, start in zip(batches, starts, strict=True):
        place, columns = place_of(start), columns_of(batch)
        if is_of_arrays:
            if (message := arrays_message(batch, model_inputs(columns), place.batch)) is not None:
                raise DataError(message) from error
            continue
        for name in sorted(columns, key=lambda name: not _LABELS.search(name)):
            labels = columns[name]
            if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.ndim:
                continue
            if found is None:
                if labels.dtype != torch.int64 and _LABELS.search(str(name)):
                    raise DataError(type_message(labels, place, str(name))) from error
                continue
            if name == "labels" and (classes := num_labels(model)) is not None:
                _check_from(error, labels, classes, place)
            wrong = (labels == int(found[1])).reshape(len(labels), -1).any(dim=1)
            if bool(wrong.any()):
                row = place.row(int(wrong.nonzero()[0]))
                raise DataError(no_class_message(int(found[1]), row, str(name))) from error


_NO_CLASS = re.compile(r"Target (-?\d+) is out of bounds")
_NO_TYPE = re.compile(
    r"not implemented for '(Int|Short|Char|Byte|Bool)'|expected \w+ \w+ (to be )?Long"
)
_NO_TENSOR = re.compile(r"ndarray|numpy|'list'|not list|'(int|tuple)' object is not callable")
_CPU, _META = torch.device("cpu"), torch.device("meta")
_OF_DEVICES = re.compile("same device|expected device|Tensor.* should be the same")
_NO_PAD = re.compile("no padding token is defined")
_LABELS = re.compile("label|target|class|^y$|^1$", re.IGNORECASE)


def _explain_tokens(
    error: Exception,
    model: nn.Module,
    batches: Sequence[Any],
    place_of: Callable[[int], Place],
    starts: Sequence[int],
) -> None:
    for batch, start in zip(batches, starts, strict=True):
        if isinstance(batch, Mapping):
            try:
                check_tokens(model, batch, place_of(start))
            except DataError as mistake:
                raise mistake from error


def _check_from(error: Exception, labels: Tensor, classes: int, place: Place) -> None:
    try:
        check_class_ids(
            labels.cpu().numpy(), classes, place.row, place.origin, in_lists=labels.ndim > 1
        )
    except DataError as mistake:
        raise mistake from error


def _check_columns(facts: _Facts, batch: Any, needs_labels: bool) -> None:
    if not isinstance(batch, Mapping):
        raise DataError(no_columns_message(facts.model, batch))
    batch, taken = model_inputs(batch), facts.columns
    for column, value in batch.items():
        example = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(example, str) and (column == "labels" or column not in taken):
            raise DataError(text_message(column, example, is_tokenized="input_ids" in batch))
        if column == "input_ids" and isinstance(example, Tensor) and example is not value:
            raise DataError(
                f"'input_ids' is a list of {len(value)} tensors of shape {tuple(example.shape)}: "
                "torch's default collate transposes rows of lists. Give it rows of tensors: "
                'dataset.with_format("torch").'
            )
    labelled = "labels" in batch or "start_positions" in batch
    if needs_labels and "labels" in taken and not labelled:
        raise DataError(no_labels_message(batch))
    if facts.takes_any:
        return
    if "labels" in batch and "labels" not in taken:
        raise ModelError(no_head_message(facts.model))
    if unknown := [column for column in batch if column not in taken]:
        raise DataError(
            f"{model_name(facts.model)}.forward does not take {', '.join(unknown)} (it takes "
            f"{', '.join(taken)}). "
            f'Leave them out: dataset.remove_columns("{unknown[0]}"), or '
            "prepare_dataloaders(dataset, tokenizer, model=model)."
        )


def _check_devices(
    model: nn.Module, batches: Sequence[Any], places: Sequence[Place], error: Any = None
) -> None:
    """Refuse tensors on an accelerator beside a model on the CPU, where nothing moves batches."""
    devices = devices_of(model)
    if len(devices) > 1 and (error or _META in devices) and not is_sharded(model):
        raise ModelError(devices_message(model, devices)) from error  # else it may be on purpose
    for batch, place in zip(batches, places, strict=True) if {*devices} == {_CPU} else ():
        for name, column in columns_of(batch).items():
            if isinstance(column, Tensor) and column.device.type != "cpu":
                raise DataError(device_message(model, name, column, place)) from error


def _check_type(labels: Any, task: Task, place: Place) -> None:
    """Refuse labels of a type that the losses of transformers do not take."""
    example = labels[0] if isinstance(labels, list | tuple) and labels else labels
    if isinstance(example, Real | np.ndarray | list):
        raise DataError(
            f"'labels' of {place.batch} is a {type(labels).__name__}, not a tensor. Make it one: "
            '{**batch, "labels": torch.tensor(batch["labels"])}.'
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or task.rules.float_labels:
        return
    if labels.dtype != torch.int64:
        raise DataError(type_message(labels, place, "labels"))


def _check_labels(
    facts: _Facts, batch: Mapping[str, Any], labels: Tensor, task: Task, place: Place
) -> None:
    ids, classes = batch.get("input_ids"), facts.num_labels
    is_by_token = facts.is_by_token and labels.ndim < 3  # of sound there is one for each codebook
    if is_by_token and isinstance(ids, Tensor) and labels.shape != ids.shape:
        lengths = (labels.shape[-1] if labels.ndim > 1 else 1, ids.shape[-1])
        raise DataError(misaligned_message(*lengths, place.batch))
    if labels.is_floating_point() and bool((is_nan := labels.isnan()).any()):
        row, column = int(is_nan.nonzero()[0, 0]), place.origin.column
        call = filter_missing(column, is_float=True, in_lists=labels.ndim > 1, of="")
        fix = f"Filter such rows out: {fix_of(place.origin.key, call)}"
        if (maker := place.origin.maker) is not None:
            fix = f"{maker}= returns the labels: let it return numbers"
        raise DataError(f"Label NaN in {place.row(row)}, which means it is missing. {fix}.")
    if classes is None:
        return
    if task.name == "multi_label_classification":
        _check_multi_label(labels, classes, place)
    elif task.name in ("single_label_classification", "token_classification"):
        numbers = labels.cpu().numpy()
        check_class_ids(numbers, classes, place.row, place.origin, in_lists=labels.ndim > 1)
    elif task.name == "regression" and (labels.shape[-1] if labels.ndim > 1 else 1) != classes:
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} in {place.batch}, but the model has "
            f"num_labels={classes}: a regression has one number per output. Load the model with "
            f"as many: from_pretrained(name, num_labels="
            f"{labels.shape[-1] if labels.ndim > 1 else 1})."
        )
    elif task.name == "regression" and not labels.is_floating_point() and not task.problem_type:
        warn_of_classes_as_values(labels.cpu().numpy(), f"the labels of {place.batch}")


def _check_multi_label(labels: Tensor, classes: int, place: Place) -> None:
    shape = tuple(labels.shape)
    if labels.ndim == 1:
        line = fix_all(place.origin.keys, integers_call(place.origin.column))
        if (maker := place.origin.maker) is not None:
            line = f'let {maker}= return {{**row, "labels": int(row["labels"])}}'
        raise DataError(
            scalar_floats_message(
                f"of shape {shape} in {place.batch}",
                place.origin.column,
                classes,
                are_whole=bool((labels == labels.round()).all()),
                line=line,
            )
        )
    if shape[1:] != (classes,):
        raise DataError(
            f"Labels of shape {shape} in {place.batch}, but the model has num_labels={classes}: "
            "multi-label labels have one number per class. Load the model with room for them: "
            f"from_pretrained(name, num_labels={shape[-1]})."
        )
    if not labels.is_floating_point():
        raise DataError(
            f"Labels of shape {shape} in {place.batch} are multi-label, which takes floats, not "
            f"{str(labels.dtype).removeprefix('torch.')}. Use prepare_dataloaders, or "
            'dataset.cast_column("labels", datasets.Sequence(datasets.Value("float32"))).'
        )
    if (found := wrong_target(labels)) is not None:
        raise DataError(
            f"{targets_message(found[1], place.row(found[0]))}. Scale them to 0 to 1; for values "
            'to predict set model.config.problem_type = "regression".'
        )
