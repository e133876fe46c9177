"""The protocol of a strategy, and which strategy has prepared a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.errors import ConfigError, DistributedError, ManualLoopError
from manualloop.strategy.compiled import CompileOptions

_T = TypeVar("_T")
_Prepared = TypeVar("_Prepared", bound=tuple[Any, ...])


class Strategy(Protocol):
    """The device, the precision and the ranks of a run. Any object with these members will do.

    Nothing else of a strategy is used, so there is no class to inherit from. A method that is
    marked as collective is called on every rank; with one rank it needs no communication.
    """

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters and of its batches."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes shared files: the one of rank 0."""
        ...

    @property
    def rank(self) -> int:
        """Number of this process among those that train the model together."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes that train the model together."""
        ...

    @property
    def precision(self) -> str:
        """The precision of forward passes, such as ``"no"``, ``"bf16"`` or ``"fp16"``.

        It is noted in checkpoints, and a run that is resumed in another one prints the difference.
        """
        ...

    @property
    def compile(self) -> CompileOptions:
        """Whether models are compiled, or the options they are compiled with; noted as well."""
        ...

    @property
    def scales_losses(self) -> bool:
        """Whether gradients overflow now and then as a matter of course, which skips an update."""
        ...

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer where they run; for prepared ones, return them as is.

        Several optimizers are given as one object here and below: a tuple of them that also has
        ``param_groups``, ``step`` and ``zero_grad`` for all of them.
        """
        ...

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put a model where it runs; return a prepared one as it is."""
        ...

    def to_device(self, batch: Any) -> Any:
        """Copy a batch to the device without waiting for the copy."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        ...

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch; with ``hold`` gradients are not reduced yet."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        ...

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most ``max_norm``; return the norm before.

        A loss scale is divided out first.
        """
        ...

    def apply(self, optimizer: Optimizer) -> bool:
        """Make the update; return whether it was made, which an overflow prevents."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks. Collective."""
        ...

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Add up numbers of the host over all ranks. Collective."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks. Collective."""
        ...

    def explain(self, error: BaseException) -> None:
        """Raise an error that names the rank that is gone, if that is why a call failed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the strategy, such as a loss scale; else ``{}``.

        It is the same on all ranks, and consists of what an optimizer's state may consist of. A
        strategy has a state from the beginning, or never.
        """
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        ...


MEMBERS = tuple(name for name in vars(Strategy) if not name.startswith("_"))
"""Names of what an object must have to be a strategy."""


class _Altered:
    """A strategy with other members than those of the strategy it is made from."""

    def __init__(self, strategy: Strategy, **members: Any) -> None:
        self._strategy = strategy
        vars(self).update(members)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def __repr__(self) -> str:
        return repr(self._strategy)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        return prepare(self._strategy, model, optimizer)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return prepare_model(self._strategy, model)


def altered(strategy: Strategy, **members: Any) -> Strategy:
    """Return a strategy with other members, for the time of one call or one run.

    A model that it prepares remembers the strategy of the process.
    """
    return cast("Strategy", _Altered(strategy, **members))


def on_main(strategy: Strategy, function: Callable[[], _T]) -> _T:
    """Call a function on rank 0 alone; return what it returned, or raise its error, on every rank.

    Call on every rank.

    Raises:
        DistributedError: On the other ranks, for an error that is not one of this package.
    """
    if strategy.world_size == 1:
        return function()
    value, error, described = None, None, None
    if strategy.is_main:
        try:
            value = function()
        except Exception as caught:
            error = caught
            is_ours = isinstance(caught, ManualLoopError)
            described = (type(caught) if is_ours else DistributedError, f"rank 0: {caught}")
    value, described = strategy.gather((value, described))[0]
    if error is not None:
        raise error
    if described is not None:
        raise described[0](described[1])
    return cast("_T", value)


MixedPrecision = Literal["no", "bf16", "fp16"]


# Beside the model, not on it: an attribute would travel into its state, its copies and its pickles.
# A strategy that holds its models, as an Accelerator does, must be referred to weakly: otherwise no
# model in this dictionary would ever be freed.
STRATEGY_OF: WeakKeyDictionary[nn.Module, Callable[[], Any]] = WeakKeyDictionary()
"""The strategy that prepared a model last. Calls that name no strategy use it."""


def prepare(
    strategy: Strategy, model: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer]:
    """Put a model and its optimizer where a strategy runs them, and remember the strategy."""
    return _remembered(strategy, model, lambda: strategy.prepare(model, optimizer))


def prepare_model(strategy: Strategy, model: nn.Module) -> nn.Module:
    """Put a model where a strategy runs it, and remember the strategy."""
    return _remembered(strategy, model, lambda: (strategy.prepare_model(model),))[0]


def _remembered(
    strategy: Strategy, model: nn.Module, prepare: Callable[[], _Prepared]
) -> _Prepared:
    """Prepare a model, and remember its strategy, unless that has remembered itself meanwhile."""
    before = STRATEGY_OF.pop(model, None)
    try:
        prepared = prepare()
    except BaseException:
        if before is not None:
            STRATEGY_OF.setdefault(model, before)
        raise
    for known in (model, prepared[0]):
        if known not in STRATEGY_OF:
            STRATEGY_OF[known] = _weakly(strategy)
    return prepared


def _weakly(strategy: Strategy) -> Callable[[], Any]:
    name = type(strategy).__name__
    try:
        reference = ref(strategy)
    except TypeError:  # a class with __slots__, for instance
        return lambda: strategy

    def get() -> Any:
        strategy = reference()
        if strategy is None:
            raise ConfigError(
                f"The {name} that prepared this model does not exist any more. Keep it in a "
                "variable, or name the strategy: strategy=..."
            )
        return strategy

    return get
