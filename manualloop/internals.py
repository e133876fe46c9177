"""The private names of other libraries that are used, each with what happens when it is gone.

No other module touches one except ``libraries.py``, which has those of libraries around models and
metrics (a test says so). Each function says what the name is for and in which
versions it was seen; where the name is missing it does the same in a slower, public way, and the
numbers stay the same. "torch 2.6 to 2.14" means: in the oldest and the newest version that
``nox -s tests-oldest`` and ``nox -s tests-newest`` install, and in that of ``constraints.txt``.
"""

from __future__ import annotations

import inspect
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer
from torch.utils.data import DataLoader, IterableDataset

# torch: optimizers and loss scaling


def step_optimizer(optimizer: Optimizer) -> None:
    """Let an optimizer make its update, without the entry that torch writes for the profiler.

    The entry costs 20 us, a fifth of the step of a model of one linear layer. Where a profiler
    runs, where there are hooks, or where ``step`` is not as torch made it, ``step`` is called.

    Seen in torch 2.6 to 2.14: ``profile_hook_step``, which wraps the method, the optimizer's and
    the global dictionaries of hooks, ``_profiler_enabled``, and ``_wrapped_by_lr_sched`` and
    ``_opt_called``, by which a scheduler notes that the optimizer was stepped. If one of them is
    gone, ``step`` is called.
    """
    bare_step = _bare_step(optimizer)
    if bare_step is None:
        optimizer.step()
    else:
        bare_step(optimizer)


def _bare_step(optimizer: Any) -> Callable[[Any], Any] | None:
    hooked: Any = type(optimizer).step
    own: Any = vars(optimizer).get("step")  # a scheduler's, which only notes the call
    try:
        if hooked.__code__ is not _code_of_hooked_step():
            return None
        if own is not None:
            # `_opt_called` exists from the first call of the scheduler's method on.
            is_schedulers = own._wrapped_by_lr_sched and own.__wrapped__ is hooked
            if not is_schedulers or not optimizer._opt_called:
                return None
        if (
            torch._C._autograd._profiler_enabled()
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _torch_optimizer._global_optimizer_pre_hooks
            or _torch_optimizer._global_optimizer_post_hooks
        ):
            return None
        bare_step: Callable[[Any], Any] = hooked.__wrapped__
    except AttributeError:
        return None
    return bare_step


@cache
def _code_of_hooked_step() -> Any:
    """Return the code of the function that torch puts around every ``step``."""
    profile_hook_step: Any = Optimizer.profile_hook_step
    return profile_hook_step(lambda self: None).__code__


class Engine(NamedTuple):
    """What ``loss.backward()`` comes down to, for a plain loss of one real number.

    Attributes:
        run: ``run((loss,), (gradient,), *defaults)`` runs the backward pass.
        defaults: Whether to keep the graph, whether to create one, and inputs, of which there are
            none: what ``backward()`` passes without arguments.
        is_refused: Function that tells whether ``backward`` would refuse to be called here.
        methods: torch's own ``Tensor.backward`` and ``torch.autograd.backward``. Somebody may put
            others in their place, which are to be called.
    """

    run: Callable[..., Any]
    defaults: tuple[bool, bool, tuple[()]]
    is_refused: Callable[[], bool]
    methods: tuple[Any, Any]


def find_engine() -> Engine | None:
    """Return what ``loss.backward()`` ends with; None if the method has to be called.

    Before, torch looks for subclasses of tensors, for inputs, and at the shapes of gradients that
    were passed: 8 us, 3 % of the step of a model of one linear layer. A plain tensor of one real
    number needs none of it: the gradient to begin with is 1.

    Seen in torch 2.6 to 2.14: ``_engine_run_backward``, ``_are_functorch_transforms_active``, and
    the names of the modules that define ``backward``.
    """
    methods: tuple[Any, Any] = (Tensor.backward, torch.autograd.backward)
    modules = tuple(getattr(one, "__globals__", {}).get("__name__") for one in methods)
    run: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
    is_refused: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
    if modules != ("torch._tensor", "torch.autograd") or run is None or is_refused is None:
        return None
    run = partial(run, allow_unreachable=True, accumulate_grad=True)
    return Engine(run, (False, False, ()), is_refused, methods)


def watch_scale(scaler: Any) -> Callable[[], bool]:
    """Return a function that tells, after an update, whether it was made.

    The loss scale falls when gradients overflow. The host waits for the device once.

    Seen in torch 2.6 to 2.14: ``_get_scale_async``, the scale as a tensor. If it is gone,
    ``get_scale()`` is asked, for which the host waits before the update too.
    """
    scale: Tensor | None = getattr(scaler, "_get_scale_async", lambda: None)()
    if scale is None:
        number = scaler.get_scale()
        return lambda: bool(scaler.get_scale() >= number)
    before = scale.clone()
    return lambda: bool(scale >= before)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside a wrapper, such as the one of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def heeds_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Tell whether an optimizer leaves the weights alone where its ``found_inf`` is 1.

    torch's fused ones should; those of mps did not before torch 2.13 (pull request 186360), so the
    kernel is tried, once in a process. The answer is no for a ``step`` or a wrapper of others, and
    where ``_step_supports_amp_scaling`` is gone (seen in torch 2.6 to 2.14): then the host waits.
    """
    inner, kind = unwrap_optimizer(optimizer), type(optimizer)
    is_known = inner is optimizer or kind.__module__.startswith("accelerate.")
    is_fused = is_known and getattr(inner, "_step_supports_amp_scaling", False)
    return is_fused and _kernel_heeds_found_inf(cast("Any", type(inner)), device)


@cache
def _kernel_heeds_found_inf(kind: Any, device: torch.device) -> bool:
    torchs = (parent for parent in kind.__mro__ if parent.__module__.startswith("torch.optim."))
    own_step, kind = kind.step, next(torchs, Optimizer)
    if inspect.unwrap(own_step) is not inspect.unwrap(kind.step):
        return False
    weight = torch.ones(1, dtype=torch.float32, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=1.0, fused=True)
    with skip_where(optimizer, torch.ones_like(weight[0])):
        # Without the hooks that the user has set for all optimizers.
        inspect.unwrap(kind.step)(optimizer)
    return bool(weight == 1)


@contextmanager
def skip_where(optimizer: Optimizer, has_failed: Tensor) -> Iterator[None]:
    """Let a fused optimizer leave everything as it is if ``has_failed`` is 1 on the device.

    Only for an optimizer that ``heeds_found_inf``.
    """
    inner = unwrap_optimizer(optimizer)
    inner.found_inf, inner.grad_scale = has_failed.float(), None
    try:
        yield
    finally:
        del inner.found_inf, inner.grad_scale


# torch: modules


def children_of(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the children of a module by name, at no cost.

    An attribute that a module does not have takes 1 us to deny, a name in this dictionary does not.

    Seen in torch 2.6 to 2.14: ``_modules``. If it is gone, ``named_children()`` is read.
    """
    try:
        return module._modules
    except AttributeError:
        return dict(module.named_children())


def compiled_module(
    module: nn.Module, children: Mapping[str, nn.Module | None]
) -> nn.Module | None:
    """Return the module that ``torch.compile`` wrapped; None if it wrapped none.

    Seen in torch 2.6 to 2.14: the child ``_orig_mod``. If it has another name, the only child of
    an ``OptimizedModule`` is returned.
    """
    inner = children.get("_orig_mod")
    if inner is None and type(module).__name__ == "OptimizedModule" and len(children) == 1:
        return next(iter(children.values()))
    return inner


def hooks_of_gradient(weight: Tensor) -> bool:
    """Tell whether functions see a gradient (seen in torch 2.6 to 2.14); else none is known."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(weight, name, None) for name in names)


def compile_once(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Compile a module in place, unless it is compiled already.

    Seen in torch 2.6 to 2.14: ``_compiled_call_impl``. If it is gone, a module that the user has
    compiled is compiled again, with these settings.
    """
    if not compiled_in_place(module):
        module.compile(**settings)
        _COMPILED.add(module)


_COMPILED: WeakSet[nn.Module] = WeakSet()


def compiled_in_place(module: nn.Module) -> bool:
    """Tell whether a module was compiled in place; see ``compile_once``."""
    try:
        return module._compiled_call_impl is not None
    except AttributeError:
        return module in _COMPILED


# torch: loaders


def copy_loader(loader: DataLoader[Any], changes: Mapping[str, Any]) -> DataLoader[Any]:
    """Return a copy of a loader that has no workers yet, with some attributes changed.

    The attributes are set without ``DataLoader.__setattr__``, which refuses another sampler.

    Seen in torch 2.6 to 2.14: ``_iterator``, which holds the workers that are kept from one pass to
    the next. If it is gone, or an attribute is, the copy is made by the constructor.
    """
    copied = copy(loader)
    try:
        attributes = vars(copied)
        workers = copied._iterator
    except (AttributeError, TypeError):
        return _new_loader(loader, changes)
    if not changes.keys() <= attributes.keys():
        return _new_loader(loader, changes)
    attributes.update(changes)
    if workers is not None:
        copied._iterator = None
    return copied


def _new_loader(loader: DataLoader[Any], changes: Mapping[str, Any]) -> DataLoader[Any]:
    accepted = inspect.signature(DataLoader).parameters.keys() - {"self", "shuffle"}
    options = {name: getattr(loader, name) for name in accepted if hasattr(loader, name)}
    options.update((name, value) for name, value in changes.items() if name in accepted)
    # The constructor takes either a sampler of batches or what one is made of.
    if isinstance(loader.dataset, IterableDataset):
        refused = {"sampler", "batch_sampler"}
    elif options["batch_sampler"] is not None:
        refused = {"sampler", "batch_size", "drop_last"}
    else:
        refused = {"batch_sampler", "drop_last"}
    return DataLoader(**{name: options[name] for name in options.keys() - refused})


def pin_batch(batch: Any) -> Any:
    """Copy a batch to memory that a GPU reads without waiting, as a DataLoader does.

    Seen in torch 2.6 to 2.14: ``torch.utils.data._utils.pin_memory``. If it is gone, the batch
    stays where it is, and its way to the GPU takes longer.
    """
    try:
        pin_memory: Any = torch.utils.data._utils.pin_memory.pin_memory
    except AttributeError:
        return batch
    return pin_memory(batch)


def renumber_worker(info: Any, number: int, base_seed: int) -> None:
    """Make the worker of a DataLoader the one of another number, with the seeds torch gives that.

    ``object.__setattr__`` is called because torch's own refuses. A worker that cannot be renumbered
    raises, and the run ends: its rows would be those of another.
    """
    for name, value in (("id", number), ("seed", base_seed + number)):
        object.__setattr__(info, name, value)
    random.seed(info.seed)
    torch.manual_seed(info.seed)
    # What torch.utils.data computes by a function of its own: the sequence is NumPy's.
    words = [number, base_seed & 0xFFFFFFFF, base_seed >> 32, 0]
    np.random.seed(np.random.SeedSequence(words).generate_state(4))


def shut_down_workers(iterator: Any, *, ends_python: bool = True) -> None:
    """End the workers of a DataLoader's iterator.

    Seen in torch 2.6 to 2.14: ``_shutdown_workers``. Without it, when Python ends, daemonic
    processes get a SIGTERM until they end: ours survive the first. Torch's reaction to a killed
    worker is switched off.
    """
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    elif ends_python:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            while process.daemon and process.is_alive():
                process.terminate()
                process.join(0.1)


def iterator_of_loaders() -> type:
    """Return the class of what ``iter(DataLoader(...))`` gives.

    Seen in torch 2.6 to 2.14: ``_BaseDataLoaderIter``. If it is gone, there is no such class: a
    function that holds such an iterator is not told of.
    """
    return getattr(torch.utils.data.dataloader, "_BaseDataLoaderIter", _NoSuch)


class _NoSuch: ...


def num_given(iterator: Any) -> int | None:
    """Return the number of batches that the iterator of a loader has given; None: nothing tells.

    Seen in torch 2.6 to 2.14: ``_num_yielded``.
    """
    return getattr(iterator, "_num_yielded", None)


# torch: process groups


def release_default_groups() -> None:
    """Let torch's own functions release the process group that they hold as a default argument.

    DDP imports torch.distributed.nn.functional, whose ``group=group.WORLD`` is evaluated then: ten
    functions hold the group for as long as Python runs. None means the same group.

    Seen in torch 2.6 to 2.14. If the module or its defaults are gone, there is nothing to release.
    """
    functional = sys.modules.get("torch.distributed.nn.functional")
    for function in vars(functional).values() if functional else ():
        if isinstance(function, FunctionType) and function.__defaults__:
            function.__defaults__ = tuple(
                None if isinstance(value, torch.distributed.ProcessGroup) else value
                for value in function.__defaults__
            )


# accelerate


def prepared_models(accelerator: Any) -> list[nn.Module]:
    """List the models that an ``Accelerator`` has prepared.

    Seen in accelerate 1.7 to 1.15: ``_models``. If it is gone, the list is empty: a model that the
    user has prepared is then prepared again, which changes no number.
    """
    return list(getattr(accelerator, "_models", ()))


def prepare_optimizer_once(accelerator: Any, optimizer: Optimizer) -> Optimizer:
    """Return the wrapper of an optimizer that an ``Accelerator`` has, or let it make one.

    accelerate would wrap an optimizer twice, and then unscale its gradients twice.

    Seen in accelerate 1.7 to 1.15: ``_optimizers``. If it is gone, only the optimizers that were
    prepared by this function are recognised.
    """
    known: list[Any] | None = getattr(accelerator, "_optimizers", None)
    if known is None:
        known = _PREPARED.setdefault(accelerator, [])
    for held in known:
        if optimizer is held or optimizer is held.optimizer:
            return held  # type: ignore[no-any-return]
    casts = bool(optimizer.state) and accelerator.device.type != "xla"  # where it would place it
    prepared: Optimizer = accelerator.prepare_optimizer(optimizer, False if casts else None)
    if known is _PREPARED.get(accelerator):
        known.append(prepared)
    return prepared


_PREPARED: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def was_accelerator_made() -> bool:
    """Tell whether this process has an ``Accelerator`` or its state.

    Seen in accelerate 1.7 to 1.15: ``PartialState._shared_state``; without it a state is missed.
    """
    from accelerate.state import PartialState, is_initialized

    return bool(is_initialized() or getattr(PartialState, "_shared_state", None))


# datasets


def rows_as_table(dataset: Any, rows: Any) -> Any:
    """Return rows of a dataset as a table of Arrow, as they are stored.

    Seen in datasets 3.6 to 5.2: ``_indices``, the rows that a selection has kept, which datasets
    looks up one by one. If it is gone, the dataset is asked in its Arrow format, which is slower.
    """
    from datasets.formatting import query_table

    try:
        indices = dataset._indices
    except AttributeError:
        return dataset.with_format("arrow")[rows]
    chosen = rows if indices is None else indices.column(0).take(rows).to_numpy()
    return query_table(dataset.data, chosen)


def stored_table(dataset: Any) -> tuple[Any, Any]:
    """Return the stored table of a dataset, and the number in it of each row; None: all, in order.

    Seen in datasets 3.6 to 5.2: ``_indices``. If it is gone, a selection is written out anew.
    """
    try:
        indices = dataset._indices
    except AttributeError:
        return dataset.flatten_indices().data, None
    return dataset.data, None if indices is None else indices.column(0).to_numpy()


def as_kind(dataset: Any, kind: Any) -> Any:
    """Return the same rows as a dataset of a subclass.

    Seen in datasets 3.6 to 5.2: ``_indices`` and ``_fingerprint``, by which ``map`` finds what it
    has cached. If they are gone, a selection is first written out as a table of its own, and the
    dataset gets a new fingerprint.
    """
    rows = dataset if hasattr(dataset, "_indices") else dataset.flatten_indices()
    return kind(
        rows.data,
        info=rows.info,
        split=rows.split,
        indices_table=getattr(rows, "_indices", None),
        fingerprint=getattr(rows, "_fingerprint", None),
    )


def is_stream_of_datasets(dataset: Any) -> bool:
    """Tell whether a dataset is a stream of ``datasets``, without importing that."""
    return any(kind.__module__ == "datasets.iterable_dataset" for kind in type(dataset).__mro__)


def has_shuffle_buffer(dataset: Any) -> bool:
    """Tell whether a stream of ``datasets`` reads through a buffer, which no state holds.

    Seen in datasets 3.6 to 5.2: ``_ex_iterable`` and the class ``BufferShuffledExamplesIterable``.
    If ``_ex_iterable`` is gone, every such stream is taken to have one.
    """
    dataset = getattr(dataset, "streamed_rows", dataset)  # of a stream that is transformed
    if not is_stream_of_datasets(dataset):
        return False
    parts = [getattr(dataset, "_ex_iterable", None)]
    if parts[0] is None:
        return True
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def part_of_stream(dataset: Any) -> tuple[int, int] | None:
    """Return which part of a stream of ``datasets`` this is, and of how many; None: it is whole.

    Seen in datasets 3.6 to 5.2: ``_distributed``, set by ``split_dataset_by_node``.

    Raises:
        AttributeError: Nothing tells.
    """
    dataset = getattr(dataset, "streamed_rows", dataset)
    split = dataset._distributed if is_stream_of_datasets(dataset) else None
    return None if split is None else (split.rank, split.world_size)
