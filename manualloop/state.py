"""Everything of a run that must survive a crash, in one object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.errors import ConfigError
from manualloop.randomness import generator_states, is_generator, restore_generators
from manualloop.times import Times


@dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        num_steps: Updates applied.
        num_skipped: Updates left out: fp16 overflows, windows with nothing to learn from.
        epoch: Epochs completed, which is also the index of the one under way.
        num_samples: Rows of the epoch under way that updates have used.
    """

    num_steps: int = 0
    num_skipped: int = 0
    epoch: int = 0
    num_samples: int = 0


class Reader(Protocol):
    """What a state needs of the reader of its batches."""

    def position(self) -> Any:
        """Return the position behind the last batch that an update has used, as plain data."""
        ...


@dataclass(slots=True, eq=False)
class TrainState:
    """What a run changes as it goes; the loop itself holds nothing.

    Entering ``train_steps`` again with the same state goes on where it stopped.

    Args:
        model: The model being trained.
        optimizer: Over parameters of this model.
        lr_scheduler: Stepped once after every applied update; None keeps the rate constant.
        extras: Anything else with ``state_dict`` and ``load_state_dict``, such as an average of the
            weights, and random generators of torch, NumPy and Python. They are kept, never called.

    Attributes:
        progress: Updates applied, epoch, rows used.
        max_batch_rows: Rows that go through the model at once, found out when memory ran out;
            None: as many as the loader gives.
        has_failed: 0-d flag on the device: whether an update was not finite, and those since then
            left out; None where the host knows at once.
        is_training: Whether a ``train_steps`` is open on it.
        reader: Reads the batches, and knows its position in them; None before the first
            ``train_steps``.
        position: The position that was loaded, for the next reader.
        holders: Objects beside the state's own that may hold random generators, by name: the loss
            function, and others that a run knows. Their generators are saved, not they.
        generators: States of generators in the checkpoint that was loaded, by path, until their
            holders are known; None where they have been restored. None: nothing was loaded.
        contract: What the run depends on; see ``manualloop.checkpoint.contract``.
        times: Where the time went since it was made; not saved.
        task: What the model and its batches mean for the loop (``manualloop.tasks.task``), while
            a ``train_steps`` is open; not saved.
        is_resumed: Whether the contract is that of a checkpoint, not compared yet.

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
    has_failed: Tensor | None = field(default=None, init=False, repr=False)
    is_training: bool = field(default=False, init=False, repr=False)
    reader: Reader | None = field(default=None, init=False, repr=False)
    position: dict[str, Any] | None = field(default=None, init=False, repr=False)
    holders: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    generators: dict[str, Any] | None = field(default=None, init=False, repr=False)
    contract: dict[str, Any] | None = field(default=None, init=False, repr=False)
    is_resumed: bool = field(default=False, init=False, repr=False)
    times: Times = field(default_factory=Times, init=False, repr=False)
    task: Any = field(default=None, init=False, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part, by name, as PyTorch's ``state_dict`` does.

        With the place in the data and the generators among ``extras``, but without other random
        states: those are the process's.
        """
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {
            **parts,
            "progress": asdict(self.progress),
            "position": self.place(),
            "max_batch_rows": self.max_batch_rows,
            "generators": generator_states(extras=self._own_generators()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ConfigError: It holds other parts than this state, which the message names, or a
                ``train_steps`` is open on it. Nothing was loaded.
        """
        self.require_closed()
        parts = self.parts()
        others = {"position", "max_batch_rows", "generators"}
        differing = {*parts, "progress"} ^ (set(state_dict) - others)
        if differing:
            raise ConfigError(
                "The saved and the present training state disagree about: "
                f"{', '.join(sorted(differing))}. Build the TrainState as it was when saved."
            )
        for name, part in parts.items():
            part.load_state_dict(state_dict[name])
        self.progress = Progress(**state_dict["progress"])
        self.position, self.reader = state_dict.get("position"), None
        self.max_batch_rows = state_dict.get("max_batch_rows")
        self.has_failed = None
        restore_generators(state_dict.get("generators", {}), extras=self._own_generators())

    def require_closed(self) -> None:
        """Refuse to be loaded into while a ``train_steps`` is open.

        Raises:
            ConfigError: One is.
        """
        if self.is_training:
            raise ConfigError(
                "A train_steps is open on this state and would go on from where it was. Leave its "
                "loop, or close() it, then load."
            )

    def place(self) -> Any:
        """Return the position in the data as plain data; None: at its start."""
        return self.position if self.reader is None else self.reader.position()

    def parts(self) -> dict[str, Any]:
        """Return what has a ``state_dict`` of its own, by name."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.lr_scheduler is not None:
            parts["lr_scheduler"] = self.lr_scheduler
        generators = self._own_generators()
        others = {name: extra for name, extra in self.extras.items() if name not in generators}
        return parts | {f"extras.{name}": extra for name, extra in others.items()}

    def _own_generators(self) -> dict[str, Any]:
        return {name: extra for name, extra in self.extras.items() if is_generator(extra)}

    def all_holders(self) -> dict[str, Any]:
        """Return what may hold random generators, by name."""
        names = ("model", "optimizer", "lr_scheduler", "extras")
        return {name: getattr(self, name) for name in names} | self.holders
