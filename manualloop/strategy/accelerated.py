"""A strategy on top of accelerate, for several processes: DDP, FSDP2, DeepSpeed, TPU."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from manualloop.errors import ConfigError, DistributedError, ModelError
from manualloop.internals import (
    prepare_optimizer_once,
    prepared_models,
    watch_scale,
)
from manualloop.libraries import forget_prepared
from manualloop.models import digest_of_weights, is_sharded, unwrap_model
from manualloop.notices import say
from manualloop.optimizers.access import parameters_of, whole_norm
from manualloop.optimizers.together import Optimizers, as_optimizer, each
from manualloop.strategy.base import STRATEGY_OF
from manualloop.strategy.calls import Tagged, strategy_of_call, values_of
from manualloop.strategy.compiled import CompileOptions, compile_model
from manualloop.strategy.hosts import Hosts, connect_hosts
from manualloop.strategy.launch import num_launched, refuse_training_alone
from manualloop.strategy.liveness import release_at_end
from manualloop.strategy.meeting import explaining_network
from manualloop.strategy.replicas import Replica, adder_of, settle_order, without_adder
from manualloop.strategy.transfer import move, move_optimizer_state

if TYPE_CHECKING:
    from accelerate import Accelerator


class Accelerated:
    """The strategy of an ``accelerate.Accelerator``: its device, precision and plugins.

    Args:
        accelerator: An Accelerator with ``gradient_accumulation_steps=1``. The loop accumulates
            itself, since accelerate divides by a constant, also in a window of fewer batches. It
            may have prepared model and optimizer already.
        timeout: Seconds that the hosts of the ranks wait for each other; None for torch's default.
        compile: As in ``prepare_strategy``.

    Raises:
        ConfigError: The accelerator divides losses for accumulation itself.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        timeout: float | None = None,
        compile: CompileOptions = False,
    ) -> None:
        if accelerator.gradient_accumulation_steps != 1:
            raise ConfigError(
                "The Accelerator has gradient_accumulation_steps="
                f"{accelerator.gradient_accumulation_steps}. Build it with 1 and pass "
                "gradient_accumulation_steps to train_loop, which weights micro-batches by items."
            )
        launched = num_launched()
        if accelerator.num_processes < launched:
            raise DistributedError(
                f"A launcher started {launched} processes (WORLD_SIZE), and the Accelerator counts "
                f"{accelerator.num_processes}: each process would train alone. On a CPU write "
                'Accelerator(cpu=True), or use prepare_strategy("auto").'
            )
        if accelerator.num_processes == 1:
            refuse_training_alone()
        self.accelerator, self.compile = accelerator, compile
        self.precision = str(accelerator.mixed_precision)
        self.device = accelerator.device
        self.is_main = accelerator.is_main_process
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self._shards = accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
        self._prepared: list[Replica] = []  # all of them, as accelerate does
        self._replaced: WeakSet[nn.Module] = WeakSet()  # wrappers that fit their model no more
        self._trained: WeakSet[nn.Module] = WeakSet()  # models, and wrappers whose order is settled
        self._settled: WeakSet[nn.Module] = WeakSet()
        self._hosts: Hosts | None = None  # none on a TPU
        if self.world_size > 1 and torch.distributed.is_initialized():
            self._hosts = explaining_network(lambda: connect_hosts(timeout))
            release_at_end(self._release_groups)
        accelerator.manualloop_strategy = self  # so that it lives as long: see STRATEGY_OF

    def __repr__(self) -> str:
        ranks = f", world_size={self.world_size}" if self.world_size > 1 else ""
        return (
            f"Accelerated(device={str(self.device)!r}, mixed_precision={self.precision!r}{ranks})"
        )

    def _release_groups(self) -> None:
        """Release the process groups when the program ends."""
        for model in {
            *prepared_models(self.accelerator),
            *(replica.prepared for replica in self._prepared),
            *self._replaced,
        }:
            if isinstance(model, DistributedDataParallel):
                for name in ("reducer", "logger", "process_group"):
                    setattr(model, name, None)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer where they run; return prepared ones as they are."""
        if self._shards and self._held(model) is None:
            compile_model(model, self.compile)
            # Sharding replaces the parameters, so that the optimizer needs the new ones.
            prepared, *optimizers = self.accelerator.prepare(model, *each(optimizer))
            self._remember(model, prepared)
            return prepared, as_optimizer(optimizers)
        parameters = parameters_of(optimizer)
        before = [parameter.device for parameter in parameters]
        self._replace_outdated(model)
        model = self.prepare_model(model)
        self._settle(model)
        held = [prepare_optimizer_once(self.accelerator, one) for one in each(optimizer)]
        if before != [parameter.device for parameter in parameters]:
            for one in held:
                move_optimizer_state(one)
        # The same object for the same optimizers: a loss scaler knows it by its identity.
        is_prepared = isinstance(optimizer, Optimizers) and list(optimizer) == held
        return model, optimizer if is_prepared else as_optimizer(held)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put a model where it runs; return a prepared one as it is."""
        prepared = self._held(model)
        if prepared is None and self._shards:
            raise DistributedError(
                f"{type(model).__name__} is sharded together with its optimizer: "
                "train it first, or prepare both with accelerator.prepare(model, optimizer)."
            )
        inner = unwrap_model(model, adapters=False)
        compile_model(inner, self.compile)
        if prepared is None:
            # A wrapper that does not fit any more goes; one of torch.compile stays.
            is_frozen = not any(parameter.requires_grad for parameter in inner.parameters())
            prepared = self.accelerator.prepare_model(
                without_adder(model), evaluation_mode=self.world_size > 1 and is_frozen
            )
            if inner in self._trained:
                self._settle(prepared)
        self._remember(model, prepared)
        return prepared

    def _settle(self, prepared: nn.Module) -> None:
        """Let the wrapper of a model that is trained add up gradients in one order. Collective."""
        adder = adder_of(prepared)
        if adder is None or adder in self._settled:
            return
        self._settled.add(adder)
        self._trained.add(unwrap_model(prepared, adapters=False))
        try:
            settle_order(adder)
        except RuntimeError as error:
            self.explain(error)
            raise

    def _replace_outdated(self, model: nn.Module) -> None:
        """Let a model be wrapped anew if its wrapper would not add up what the ranks compute.

        A model that is wrapped gets the weights of rank 0: it gets them again if the script has
        meanwhile changed its weights otherwise on each rank. Collective.
        """
        inner = unwrap_model(model, adapters=False)
        for replica in self._prepared:
            if replica.model is not inner or self.world_size == 1 or is_sharded(inner):
                continue
            differ = len(set(self.gather(digest_of_weights(inner)))) > 1
            if not replica.fits_whole() or (differ and not replica.is_given):
                self._replace(replica)
            return

    def _replace(self, replica: Replica) -> None:
        """Forget a wrapper, so that its model is wrapped anew.

        Raises:
            ModelError: The wrapper is the user's.
        """
        was_made = forget_prepared(self.accelerator, replica.prepared, replica.model)
        if replica.is_given and not was_made:
            name = type(replica.model).__name__
            raise ModelError(
                f"Since the DistributedDataParallel of this {name} was made, {name} has got other "
                "parameters, or trains others: it does not add up their gradients over the ranks. "
                "Pass the model without it, which is then wrapped as it is: "
                f"{name} instead of DistributedDataParallel({name})."
            )
        self._prepared.remove(replica)
        self._replaced.add(replica.prepared)

    def _held(self, model: nn.Module) -> nn.Module | None:
        """Return what a model was prepared as; None if it was not.

        accelerate would wrap what it has made itself: older versions always, this one if it is
        given the model inside, of which it keeps no wrapper.
        """
        inner = unwrap_model(model, adapters=False)
        for replica in self._prepared:
            if replica.model is inner:
                if replica.fits() or self.world_size == 1 or self._shards or is_sharded(inner):
                    return replica.prepared
                self._replace(replica)
                return None
        if is_sharded(model):
            return model  # by the user, with fully_shard
        if self.world_size == 1 or self._shards:
            return (
                model if any(model is held for held in prepared_models(self.accelerator)) else None
            )
        return None if adder_of(model) is None or model in self._replaced else model

    def _remember(self, model: nn.Module, prepared: nn.Module) -> None:
        STRATEGY_OF[model] = STRATEGY_OF[prepared] = ref(self)
        inner = unwrap_model(model, adapters=False)
        if all(replica.model is not inner for replica in self._prepared):
            is_given = prepared is model and adder_of(model) is not None
            self._prepared.append(Replica(inner, prepared, is_given=is_given))

    def to_device(self, batch: Any) -> Any:
        """Copy a batch to the device without waiting for the copy."""
        return batch if self.device.type == "cpu" else move(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch; with ``hold`` gradients are not reduced yet."""
        if not hold or self.world_size == 1:
            return nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):  # of fully_shard
            return _without_sync(model)
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks. Collective."""
        try:
            total: Tensor = self.accelerator.reduce(values)
        except RuntimeError as error:
            self.explain(error)
            raise
        return total

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Add up numbers of the host over all ranks. Collective."""
        if self.world_size == 1:
            return list(counts)
        return strategy_of_call(self, "strategy.sum_counts").sum_counts(counts)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks. Collective."""
        if self.world_size == 1:
            return [value]
        if isinstance(value, Tagged):
            return self._gather(value)
        return values_of(self._gather(Tagged("strategy.gather", "gather", value)))

    def _gather(self, sent: Tagged) -> list[Any]:
        if self._hosts is not None:
            return self._hosts.gather(sent)
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, sent)
        return values

    def explain(self, error: BaseException) -> None:
        """Raise an error that names the rank that is gone, if that is why a call failed."""
        if self._hosts is not None:
            self._hosts.explain(error)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self.accelerator.backward(loss)

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most ``max_norm``; return the norm before."""
        scaler = self.accelerator.scaler
        if scaler is not None and isinstance(optimizer, Optimizers):
            # All at once: what overflows in one of them is noted for all.
            scaler.unscale_(optimizer)
            return nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm)
        return whole_norm(self.accelerator.clip_grad_norm_(parameters_of(optimizer), max_norm))

    @property
    def scales_losses(self) -> bool:
        """Whether gradients overflow now and then as a matter of course, which skips an update."""
        return self.accelerator.scaler is not None

    def apply(self, optimizer: Optimizer) -> bool:
        """Make the update; return whether it was made, which an overflow prevents."""
        # Not AcceleratedOptimizer.step_was_skipped: a fused optimizer is always called, and skips
        # inside its kernel.
        if self.accelerator.scaler is None:
            optimizer.step()
            return True
        was_made = watch_scale(self.accelerator.scaler)
        if isinstance(optimizer, Optimizers):
            # Each of accelerate's wrappers would update the scale, and then unscale once more.
            self.accelerator.scaler.step(optimizer, is_unscaled=True)
            self.accelerator.scaler.update()
        else:
            optimizer.step()
        return was_made()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the strategy: the loss scale, if there is one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state_dict)


@contextmanager
def _without_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def mean_over_processes(number: float, device: torch.device) -> float:
    """Average a number over the processes of accelerate, as losses of transformers do. Collective.

    Where there is one process, or accelerate is not in use, it is the number itself.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized() or state.PartialState().num_processes == 1:
        return number
    from accelerate.utils import reduce

    total: Any = reduce(torch.tensor([float(number)], device=device))
    return float(total.item()) / int(state.PartialState().num_processes)


def start_accelerator(
    mixed_precision: str | None, timeout: float | None, compile: CompileOptions
) -> Accelerated:
    """Make an Accelerator as the launcher asks for, and return its strategy.

    Args:
        mixed_precision: The precision; None for the one that the launcher was configured for.
        timeout: Seconds that ranks wait for each other.
        compile: As in ``prepare_strategy``.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout or 600))
    accelerator = explaining_network(
        # Without cpu=True, on a machine that has only a CPU, each process would train alone.
        lambda: Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            kwargs_handlers=[limit],
        )
    )
    asked = _num_processes_asked()
    if asked is not None and accelerator.num_processes < asked:
        say(
            f"{asked} processes were asked for, and {accelerator.num_processes} is running. On a "
            "CPU accelerate launch starts one. Use torchrun --nproc_per_node, or "
            "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes."
        )
    return Accelerated(accelerator, timeout=timeout, compile=compile)


def _num_processes_asked() -> int | None:
    """Return how many processes ``accelerate launch`` was asked for; None if that is unknown.

    accelerate does not tell its children. On Linux its command line and its configuration do.
    """
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return None
    if "launch" not in command or not any("accelerate" in word for word in command[:4]):
        return None
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    asked, _ = parser.parse_known_args(command[command.index("launch") + 1 :])
    if asked.num_processes is None:
        from accelerate.commands.config.config_args import (
            default_config_file,
            load_config_from_file,
        )

        if asked.config_file or os.path.isfile(default_config_file):
            config: Any = load_config_from_file(asked.config_file)
            return int(config.num_processes)
    return asked.num_processes  # type: ignore[no-any-return]
