"""A pass of a loader through a model: what becomes of each batch of this rank, without a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from manualloop.batches import is_spare
from manualloop.checks import EXPLAINED, explain, explain_loss
from manualloop.data.labels import hidden_message, origin_of
from manualloop.data.sampler import OrderedBatchSampler, num_batches, rows_before, rows_fixed
from manualloop.errors import DataError, ManualLoopError
from manualloop.evaluation.draws import with_draws_reported
from manualloop.evaluation.forms import Scorer
from manualloop.evaluation.losses import Losses, Made
from manualloop.evaluation.meaning import report_balance, report_strangers, task_of_outputs
from manualloop.evaluation.rows import Ask, entries_of, tell_nan
from manualloop.evaluation.scorers import merge_counts, tally
from manualloop.evaluation.table import Share, Table, table_of
from manualloop.mistakes import no_columns_message
from manualloop.models import evaluation_mode, is_sharded
from manualloop.progress import ProgressBar, is_watched
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of
from manualloop.reading.streams import tell_repeated
from manualloop.strategy.base import Strategy
from manualloop.tasks.isolation import inputs_of, require_isolation
from manualloop.tasks.lookahead import refuse_lookahead
from manualloop.tasks.loss import ALL_LOOKS, explain_kept, find_loss, no_loss
from manualloop.tasks.otherwise import objection_to
from manualloop.tasks.padding import require_padding_unseen
from manualloop.tasks.splitting import report_own_loss
from manualloop.tasks.task import Task, are_targets, resolve_task
from manualloop.types import LossFn, Terms

_COUNT_AT = 1 << 16  # predictions that wait until they are counted


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass runs, and what is wanted of it.

    Attributes:
        model: The model, without a wrapper that would communicate with the other ranks.
        loader: The loader.
        strategy: The strategy.
        ask: What is asked of each row; None for the loss alone.
        takes_labels: Whether the model is called with the labels.
        loss_fn: As in ``train_steps``; None where the model is called with the batch's columns.
        terms: As in ``train_steps``.
        wants_loss: Whether the loss is asked for.
        counting: Metrics that count the rows of each rank there, in any order; the rows are then
            forgotten. None keeps all rows.
    """

    model: nn.Module
    loader: Iterable[Any]
    strategy: Strategy
    ask: Ask | None
    takes_labels: bool
    loss_fn: LossFn | None = None
    terms: Terms | None = None
    wants_loss: bool = True
    counting: Sequence[Scorer] | None = None


def read_table(
    run: Pass,
    bar: str | None,
    *,
    numbers: Iterable[int] | None = None,
    wants_row_losses: bool = False,
) -> tuple[Table | None, list[Losses]]:
    """Run a loader through a model, and make a table of its rows. Collective.

    Args:
        run: The loader, the model and what is wanted.
        bar: Title of a progress bar; None shows one in a run that shows its own, and else none.
        numbers: The dataset's numbers of the rows in the order of the loader; None: nobody knows.
        wants_row_losses: Whether the loss of each row is asked for, too.

    Returns:
        The table, the same on every rank, or None if no rows are kept; and the losses of each rank.
        Metrics that count have all counts on rank 0.
    """
    ask, strategy = run.ask, run.strategy
    uses_outputs = run.wants_loss or ask is None or ask.decode is None or ask.decode.uses_outputs
    share = Share(Losses(by_row=wants_row_losses), "rule" if ask is None else ask.made_by)
    with (
        evaluation_mode(
            run.model,
            strategy.device,
            ask=ask,
            counting=run.counting,
            loader=run.loader,
            loss_fn=run.loss_fn,
            terms=run.terms,
        ),
        rows_fixed(run.loader),
        closing(_numbered(run, bar)) as batches,
    ):
        task: Task | None = None
        for number, batch in batches:
            if strategy.world_size > 1 and is_spare(batch):
                _use_spare(run, batch, number)
            else:
                if task is None and uses_outputs:
                    refuse_lookahead(run.model, [batch], run.loss_fn)
                task = _use(run, share, batch, number, task)
    if run.counting and share.sizes:
        tally(run.counting, share.take())
    if share.num_nan:
        tell_nan(share.num_nan)
    report_strangers(run.model, share.layout)
    shares, counted = zip(*strategy.gather((share, run.counting)), strict=True)
    if run.counting and strategy.is_main:
        for of_rank in counted[1:]:
            merge_counts(run.counting, of_rank)
    keeps_rows = ask is not None and run.counting is None
    return table_of(shares, numbers) if keeps_rows else None, [one.losses for one in shares]


def _numbered(run: Pass, bar: str | None) -> Generator[tuple[int, Any], None, None]:
    """Yield the number and the batch of each batch of this rank, with a progress bar.

    Raises:
        DataError: There is no batch.
    """
    loader, strategy = run.loader, run.strategy
    progress = None
    if strategy.is_main and (bar is not None or is_watched()):
        progress = ProgressBar(num_batches(loader), name=bar or "Evaluating", unit="batch")
    number = 0
    try:
        comes_in_order = strategy.world_size == 1 and getattr(loader, "in_order", True)
        given = _read_ahead(loader) if comes_in_order else _in_common_order(loader, strategy)
        for batch in tell_repeated(with_draws_reported(run.model, loader, given), loader):
            yield number + strategy.rank, batch
            number += strategy.world_size
            if progress is not None and progress.is_due():
                progress.show(number)
    finally:
        if progress is not None:
            progress.close(number)
    if number == 0:
        raise DataError(NO_ROWS)


NO_ROWS = (
    "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and that the "
    "loader is not a generator that has already been read."
)


_NUM_AHEAD, _TOKENS_AHEAD = 16, 1 << 16


def _read_ahead(loader: Any) -> Iterable[Any]:
    """Return the batches of a loader; those of a view on the CPU are read several at a time.

    After a forward pass nothing that reads is in the CPU's caches any more: of 55 ms that a batch
    of SST-2 takes, it is read in 2.0 ms by itself, and in 0.8 ms among others.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, OrderedBatchSampler) or not sampler.longest_first:
        return loader  # type: ignore[no-any-return]
    if sampler.max_tokens is None or loader.num_workers or loader.pin_memory:
        return loader  # type: ignore[no-any-return]
    return _in_groups(loader, max(1, min(_NUM_AHEAD, _TOKENS_AHEAD // sampler.max_tokens)))


def _in_groups(loader: Iterable[Any], num_batches: int) -> Generator[Any, None, None]:
    batches = iter(loader)
    while group := deque(islice(batches, num_batches)):
        while group:
            yield group.popleft()


def _in_common_order(loader: Iterable[Any], strategy: Strategy) -> Generator[Any, None, None]:
    """Yield the batches of this rank in the order in which one process reads them all."""
    reader = Reader(source_of(loader), strategy=strategy, count_rows=lambda batch: 0)
    for window in reader.windows(1):
        yield window.batches[0]
        reader.settle()  # else it would keep every batch


def _use(run: Pass, share: Share, batch: Any, number: int, known: Task | None) -> Task:
    """Run a batch through the model, add its loss and its rows to the share, and return its task.

    It is a function so that the outputs are freed before the next batch needs the memory.

    Args:
        run: The model and what is wanted.
        share: The rows of this rank.
        batch: The batch.
        number: Its number.
        known: The task of the batches before; None for the first.
    """
    ask, looks = run.ask, ALL_LOOKS
    if known is not None and isinstance(batch, Mapping) and known.columns == tuple(batch):
        looks = known.looks
    inputs, outputs, loss = _forward(run, batch, number, looks)
    task = resolve_task(run.model, batch, known)  # the model has its problem_type now
    made = Made(number, batch, inputs, outputs, loss, task)
    if ask is not None and share.made_by == "rule":
        if known is None:
            made = made._replace(task=task_of_outputs(made))
        elif task is not known or task.by_values:
            _require_one_kind(known, task, batch, number)
    is_sound = run.wants_loss and _add_loss(run, share.losses, made)
    if ask is not None:
        share.add(made, entries_of(made, ask, share.layout, is_sound=is_sound))
        if run.counting and share.num_waiting >= _COUNT_AT:
            tally(run.counting, share.take())
    is_models = run.wants_loss and run.loss_fn is None and run.terms is None
    if known is None and is_models and find_loss(outputs) is not None:
        task = made.task
        del inputs, outputs, made  # the trial needs the memory
        report_balance(run.model)
        report_own_loss(run.model, batch, task, run.strategy)
        return task
    return made.task


def _forward(run: Pass, batch: Any, number: int, looks: frozenset[str]) -> tuple[Any, Any, Any]:
    """Return the inputs of a batch, its outputs, and what ``loss_fn`` returned.

    Args:
        run: The model and what is wanted.
        batch: The batch.
        number: Its number.
        looks: What the batch is looked at for: see ``Task``.
    """
    inputs = run.strategy.to_device(batch)
    with run.strategy.autocast():
        if "documents" in looks:
            require_isolation(run.model, batch, inputs, run.loss_fn)
        if run.loss_fn is None:
            is_called_as_is = looks.isdisjoint(("documents", "kept"))
            columns = inputs if is_called_as_is else inputs_of(run.model, inputs)
            if not hasattr(columns, "keys"):
                message = no_columns_message(run.model, batch, takes_loss=run.wants_loss)
                raise DataError(message)
            return inputs, _call_model(run, batch, inputs, columns, number), None
        require_padding_unseen(run.model, batch, inputs, run.loss_fn)
        return inputs, *_call_loss(run, run.loss_fn, batch, inputs, number)


def _call_model(run: Pass, batch: Any, inputs: Any, columns: Any, number: int) -> Any:
    """Return the outputs of the model; None if nothing uses them."""
    decode = None if run.ask is None else run.ask.decode
    is_used = decode is None or (run.wants_loss and "labels" in columns)
    if decode is not None and not decode.uses_outputs and not is_used:
        return None
    if is_used or (decode is not None and not decode.takes_model):
        require_padding_unseen(run.model, batch, inputs, refuses=is_used)
    if not run.takes_labels:
        columns = {name: column for name, column in columns.items() if name != "labels"}
    try:
        return run.model(**columns)
    except EXPLAINED as error:
        given = batch if columns is inputs else {name: batch[name] for name in columns}
        _explain(error, run, given, number, partial(explain, needs_labels=False))
        raise


def _call_loss(run: Pass, loss_fn: LossFn, batch: Any, inputs: Any, number: int) -> tuple[Any, Any]:
    """Return the outputs of the last forward pass that ``loss_fn`` made, and what it returned."""
    seen: list[Any] = []
    hook = run.model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    try:
        loss: Any = loss_fn(run.model, inputs)
    except EXPLAINED as error:
        if isinstance(error, TypeError):
            explain_kept(error, inputs)
        _explain(error, run, batch, number)
        raise
    finally:
        hook.remove()
    return (seen[-1] if seen else None), loss


def _use_spare(run: Pass, batch: Any, number: int) -> None:
    """Take part in a pass that takes all ranks: losses of detection add up the boxes of all."""
    if is_sharded(run.model) or objection_to(run.model, batch):
        inputs, outputs, _ = _forward(run, batch, number, ALL_LOOKS)
        if run.terms is not None:
            run.terms(outputs, inputs)


def _add_loss(run: Pass, losses: Losses, made: Made) -> bool:
    """Add the loss of a batch; tell whether it proves that no logits are NaN."""
    try:
        with run.strategy.autocast():
            is_finite = losses.add(made, run.loss_fn, run.terms)
    except EXPLAINED as error:
        _explain(error, run, made.batch, made.number)
        raise
    has_labels = isinstance(made.batch, Mapping) and "labels" in made.batch
    if not has_labels and (is_finite is None or run.ask is not None):
        _refuse_hidden(run.loader)
    if is_finite is None and run.ask is None:
        raise no_loss(run.model, made.batch, made.outputs)
    # A loss that the model computed is finite only if the logits that it scored are no NaN.
    return bool(is_finite) and run.loss_fn is None and run.terms is None


def _refuse_hidden(loader: Any) -> None:
    """Refuse to score rows whose labels ``prepare_dataloaders`` found to be hidden."""
    if forms := origin_of(loader).hidden:
        raise DataError(hidden_message(forms))


def _require_one_kind(known: Task, task: Task, batch: Any, number: int) -> None:
    """Refuse labels by which rows would be predicted otherwise than those before them."""
    name = task.name
    if task.by_values and "labels" in batch and not are_targets(batch["labels"]):
        name = "regression"
    elif known is task or known.rules.predict is task.rules.predict:
        return
    fix = "outputs.logits" if name == "regression" else "outputs.logits.argmax(-1)"
    raise DataError(
        f"The labels of batch {number} are those of a {name}, the labels before it of a "
        f"{known.name}, and one model has one kind of prediction. Give all batches labels of "
        f"one kind, or pass postprocess=lambda outputs, batch: {fix}."
    )


def _explain(
    error: Exception,
    run: Pass,
    batch: Any,
    number: int,
    find: Callable[..., None] = explain_loss,
) -> None:
    """Raise the mistake in a batch that explains an error from the model or from the loss.

    Args:
        error: The error.
        run: The loader, the model and the strategy.
        batch: The batch.
        number: Its number.
        find: Function that finds the mistake.
    """
    run.strategy.explain(error)
    if not isinstance(error, ManualLoopError):
        start = rows_before(run.loader, number)
        find(error, run.model, [batch], source_of(run.loader).place, [start])
