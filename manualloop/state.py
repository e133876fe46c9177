"""The state of a run: everything that must survive a crash, in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.errors import ConfigError
from manualloop.models import unwrap_model
from manualloop.optimizers.loading import load_together
from manualloop.optimizers.schedules import follow_functions
from manualloop.optimizers.states import OptimizerStates
from manualloop.optimizers.together import as_optimizer, as_schedule, each
from manualloop.randomness import generator_states, is_generator, restore_generators
from manualloop.times import Times
from manualloop.types import Plan, SplitNotes


@dataclass(slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        num_steps: Number of updates that were applied.
        num_skipped: Number of updates that were skipped: fp16 overflows, windows without items.
        epoch: Number of completed epochs, which is also the index of the current one.
        num_samples: Number of rows of the current epoch that updates have used.
    """

    num_steps: int = 0
    num_skipped: int = 0
    epoch: int = 0
    num_samples: int = 0


@dataclass(slots=True)
class Pace:
    """The place in the epoch at hand, counted in updates, those that were skipped included.

    Attributes:
        epoch: Number of the epoch.
        num_steps: Number of updates in the epoch; None for data without a length.
        num_done: Number of them that lie behind the run.
        is_over: Whether the epoch is over.
    """

    epoch: int = 0
    num_steps: int | None = None
    num_done: int = 0
    is_over: bool = False

    def begin(self, epoch: int, num_steps: int | None, num_done: int) -> None:
        """Begin a pass over the data, perhaps inside an epoch."""
        self.epoch, self.num_steps, self.num_done, self.is_over = epoch, num_steps, num_done, False


def has_updates_left(progress: Progress, plan: Plan) -> bool:
    """Tell whether a run has updates left to make."""
    if plan.num_epochs is None:
        return progress.num_steps < plan.num_steps
    return progress.epoch < plan.num_epochs


class Reader(Protocol):
    """The part of a reader of batches that a state uses."""

    def position(self) -> Any:
        """Return the position behind the last batch that an update has used, as plain data."""
        ...

    def close(self) -> None:
        """End the processes that read the batches."""
        ...


@dataclass(slots=True, eq=False)
class TrainState:
    """Everything that a run changes. The loop itself keeps nothing.

    A second ``train_steps`` with the same state continues where the first one stopped.

    Args:
        model: The model that is trained.
        optimizer: Optimizer of parameters of this model, or a list of several, each for parameters
            of its own. The state holds a list as a tuple that can be used like one optimizer.
        lr_scheduler: Schedule that is stepped once after every applied update; None keeps the
            learning rate constant. With several optimizers a list of one schedule, or None, each.
        extras: Other objects with ``state_dict`` and ``load_state_dict``, such as an average of the
            weights, and random generators of torch, NumPy and Python. They are saved, never called.

    Attributes:
        progress: Numbers of updates, epochs and rows.
        max_batch_rows: Most rows that the model takes at once, known since memory ran out; None
            means whole batches.
        weighs_equally: Whether all micro-batches weigh the same, because nothing tells how many
            rows they have; None means that no window of several was made yet.
        has_failed: 0-d flag on the device that is set once an update was not finite, since when all
            updates are skipped; None if the host knows at once.
        allows_nonfinite: Whether weights that are NaN or infinite may be saved and returned:
            ``on_nonfinite="ignore"``; not saved.
        has_told_moments: Whether it was logged that the optimizer's state is not finite; not saved.
        has_told_apart: Whether it was logged that the ranks have different weights; not saved.
        has_told_spoilt: Whether it was logged that the weights are not finite; not saved.
        is_training: Whether a ``train_steps`` is open on the state.
        reader: Reader of the batches, which knows its position; None before the first
            ``train_steps``.
        position: Position that was loaded, for the next reader.
        holders: Other objects that may hold random generators, by name, such as the loss function.
            Their generators are saved, but not the objects.
        generators: States of generators from the loaded checkpoint, by path, until their holders
            are known. None means that nothing was loaded.
        contract: Facts that the run depends on; see ``manualloop.checkpoint.contract``.
        built: The part of the contract that is about model, optimizer and schedule, as the script
            has built them; None before they are used.
        times: Times of this process; not saved.
        task: Meaning of the model and its batches for the loop (``manualloop.tasks.task``) while a
            ``train_steps`` is open; not saved.
        pace: Place in the epoch at hand; not saved.
        is_resumed: Whether the contract comes from a checkpoint and has not been compared yet.
        baseline: How the run has found its model; see ``manualloop.checkpoint.changes``.
        tokenizer: Tokenizer or processor of the loader, which is saved beside the weights.
        class_names: Names of the classes, which are saved beside the weights.
        splits: Notes on the splits that the loader was prepared with, by name; not saved.
        told: What was logged as changing and not saved.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> state = TrainState(model, torch.optim.SGD(model.parameters()))
    >>> state.progress
    Progress(num_steps=0, num_skipped=0, epoch=0, num_samples=0)
    """

    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None = None
    extras: dict[str, Any] = field(default_factory=dict, kw_only=True)
    progress: Progress = field(default_factory=Progress, init=False)
    max_batch_rows: int | None = field(default=None, init=False, repr=False)
    weighs_equally: bool | None = field(default=None, init=False, repr=False)
    has_failed: Tensor | None = field(default=None, init=False, repr=False)
    allows_nonfinite: bool = field(default=False, init=False, repr=False)
    has_told_moments: bool = field(default=False, init=False, repr=False)
    has_told_apart: bool = field(default=False, init=False, repr=False)
    has_told_spoilt: bool = field(default=False, init=False, repr=False)
    is_training: bool = field(default=False, init=False, repr=False)
    reader: Reader | None = field(default=None, init=False, repr=False)
    position: dict[str, Any] | None = field(default=None, init=False, repr=False)
    holders: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    generators: dict[str, Any] | None = field(default=None, init=False, repr=False)
    contract: dict[str, Any] | None = field(default=None, init=False, repr=False)
    built: dict[str, Any] | None = field(default=None, init=False, repr=False)
    is_resumed: bool = field(default=False, init=False, repr=False)
    baseline: Any = field(default=None, init=False, repr=False)
    told: set[str] = field(default_factory=set, init=False, repr=False)
    tokenizer: Any = field(default=None, init=False, repr=False)
    class_names: tuple[str, ...] | None = field(default=None, init=False, repr=False)
    splits: Mapping[str, SplitNotes] = field(default_factory=dict, init=False, repr=False)
    times: Times = field(default_factory=Times, init=False, repr=False)
    task: Any = field(default=None, init=False, repr=False)
    pace: Pace = field(default_factory=Pace, init=False, repr=False)

    if TYPE_CHECKING:  # the fields are never lists

        def __init__(
            self,
            model: nn.Module,
            optimizer: Optimizer | Sequence[Optimizer],
            lr_scheduler: LRScheduler | Sequence[LRScheduler | None] | None = None,
            *,
            extras: dict[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        self.optimizer = as_optimizer(self.optimizer)
        self.lr_scheduler = as_schedule(self.lr_scheduler)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part by name, as PyTorch's ``state_dict`` does.

        It includes the position in the data and the generators among ``extras``, but no other
        random states, which belong to the process.
        """
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {
            **parts,
            "progress": asdict(self.progress),
            "position": self.place(),
            "max_batch_rows": self.max_batch_rows,
            "weighs_equally": self.weighs_equally,
            "generators": generator_states(extras=self._own_generators()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned.

        Raises:
            ConfigError: Its parts differ from those of this state, and the message names them; or a
                ``train_steps`` is open on the state. Nothing was loaded.
        """
        self.require_closed()
        parts = self.parts()
        others = {"position", "max_batch_rows", "weighs_equally", "generators"}
        differing = {*parts, "progress"} ^ (set(state_dict) - others)
        if differing:
            raise ConfigError(
                "The saved and the present training state have different parts: "
                f"{', '.join(sorted(differing))}. Build the TrainState as it was when it was saved."
            )
        if problems := _other_weights(self.model, state_dict) or differences(parts, state_dict):
            raise ConfigError(
                "The saved state does not fit this one, and nothing was loaded:\n"
                + "\n".join(f"- {problem}" for problem in problems)
                + "\nBuild the TrainState as it was when it was saved."
            )
        progress = _progress_of(state_dict["progress"])
        own = self._own_generators()
        before = generator_states(extras=own)
        try:
            if failed := restore_generators(state_dict.get("generators", {}), extras=own):
                raise ConfigError(
                    "The saved state does not fit this one, and nothing was loaded:\n"
                    + "\n".join(f"- {path}: {reason}" for path, reason in failed.items())
                )
            load_together(parts, state_dict, ConfigError)
        except ConfigError:
            restore_generators(before, extras=own)
            raise
        follow_functions(self.lr_scheduler)
        self.progress = progress
        self.position, self.reader = state_dict.get("position"), None
        self.max_batch_rows = state_dict.get("max_batch_rows")
        self.weighs_equally = state_dict.get("weighs_equally")
        self.has_failed = None

    def require_closed(self) -> None:
        """Refuse to load into the state while a ``train_steps`` is open.

        Raises:
            ConfigError: A ``train_steps`` is open.
        """
        if self.is_training:
            raise ConfigError(
                "A train_steps is open on this state and would continue from its old position. "
                "Leave its loop, or close() it, then load."
            )

    def place(self) -> Any:
        """Return the position in the data as plain data; None means its start."""
        return self.position if self.reader is None else self.reader.position()

    def parts(self) -> dict[str, Any]:
        """Return the parts that have a ``state_dict``, by name."""
        generators, names = self._own_generators(), self.parameter_names()
        optimizers = OptimizerStates("optimizer", each(self.optimizer), names)
        parts: dict[str, Any] = {"model": self.model, "optimizer": optimizers}
        if self.lr_scheduler is not None:
            parts["lr_scheduler"] = self.lr_scheduler
        for name, extra in self.extras.items():
            if name not in generators:
                label = f"extras.{name}"
                is_optimizer = hasattr(extra, "param_groups")
                parts[label] = OptimizerStates(label, [extra], names) if is_optimizer else extra
        return parts

    def parameter_names(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the model, and of modules among the extras, by all their names.

        A parameter that is tied has several names; the first is its own.
        """
        model = unwrap_model(self.model, adapters=False)
        names = dict(model.named_parameters(remove_duplicate=False))
        for key, extra in self.extras.items():
            if isinstance(extra, nn.Module):
                own = extra.named_parameters(remove_duplicate=False)
                names |= {f"extras.{key}.{name}": parameter for name, parameter in own}
        return names

    def _own_generators(self) -> dict[str, Any]:
        return {name: extra for name, extra in self.extras.items() if is_generator(extra)}

    def all_holders(self) -> dict[str, Any]:
        """Return the objects that may hold random generators, by name."""
        return self.saved_holders() | self.holders

    def saved_holders(self) -> dict[str, Any]:
        """Return those whose state a checkpoint holds."""
        names = ("model", "optimizer", "lr_scheduler", "extras")
        return {name: getattr(self, name) for name in names}


def _progress_of(saved: Any) -> Progress:
    names = [field.name for field in fields(Progress)]
    known = saved if isinstance(saved, Mapping) else {}
    if sorted(known) != sorted(names) or not all(type(n) is int and n >= 0 for n in known.values()):
        raise ConfigError(
            f"The saved progress is {saved!r:.200}, and nothing was loaded: it must be whole "
            f"numbers {', '.join(names)}, as state_dict() returns them."
        )
    return Progress(**known)


def differences(parts: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Return what the optimizers among some parts do not have in common with their saved states."""
    return [
        line
        for name, part in parts.items()
        if isinstance(part, OptimizerStates)
        for line in part.differences(saved[name])
    ]


def _other_weights(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    def shapes(state: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(v.shape) for name, v in state.items() if isinstance(v, Tensor)}

    ours, theirs = shapes(model.state_dict()), shapes(saved["model"])
    return [
        f"model: {name} is {theirs.get(name, 'missing')} in the saved state, "
        f"{ours.get(name, 'missing')} here"
        for name in dict.fromkeys((*theirs, *ours))
        if ours.get(name) != theirs.get(name)
    ]
