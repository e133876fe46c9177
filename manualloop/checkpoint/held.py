"""What the functions, schedules and the loader of a run hold, and no checkpoint has.

It is found once, when a run begins, and compared at each save: a loss that counts, a dataset that
the loop makes harder, a schedule that reads a variable of the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from manualloop.checkpoint.marks import can_be_read, mark_of
from manualloop.checkpoint.orders import orders_in
from manualloop.models import digest_of_weights, is_sharded, unwrap_model
from manualloop.objects import follow, is_of_library, numbers_in, walk
from manualloop.optimizers.schedules import own_schedule, schedules_of
from manualloop.optimizers.together import each
from manualloop.state import TrainState


class Held(NamedTuple):
    """A value that a run may change.

    Attributes:
        path: Its name in messages.
        read: Function that returns what differs once it is changed.
        mark: What that was when the run began.
    """

    path: str
    read: Callable[[], Any]
    mark: Any


def held_by(state: TrainState, functions: Mapping[str, Any], loader: Any) -> Iterator[Held]:
    """Yield what the functions of a run, its schedules, its hooks and its loader hold.

    Numbers and tensors that the functions hold themselves are not among it.
    """
    reads = {
        **dict(_of_modules(state, functions)),
        **dict(_of_schedules(state.lr_scheduler)),
        **dict(_of_hooks(state)),
        **dict(_of_loader(state, loader)),
        **dict(orders_in(loader)),
    }
    for path, read in reads.items():
        yield Held(path, read, read())


def changed_among(held: Iterable[Held]) -> list[str]:
    """Return the paths of those that have changed."""
    return [one.path for one in held if one.read() != one.mark]


_Read = tuple[str, Callable[[], Any]]


def _of_modules(state: TrainState, functions: Mapping[str, Any]) -> Iterator[_Read]:
    """Yield weights, buffers and numbers of modules that nobody but a function has."""
    known = {id(module) for module in unwrap_model(state.model).modules()}
    for name, extra in state.extras.items():
        if isinstance(extra, nn.Module):
            yield from _beside_state_dict(f"extras.{name}", extra, known)
        for part in (extra, *getattr(extra, "__dict__", {}).values()):
            if isinstance(part, nn.Module):
                known |= {id(module) for module in part.modules()}
    used = {name: function for name, function in functions.items() if function is not None}
    saved = {"model": state.model, "extras": state.extras}
    for path, part in walk({**saved, **used}, skips_empty=True):
        root = part.value
        if not isinstance(root, nn.Module) or id(root) in known:
            continue
        known |= {id(module) for module in root.modules()}
        if path.partition(".")[0].partition("[")[0] not in used:
            continue
        if any(True for _ in root.parameters()):
            yield f"the weights of {path}", partial(_sample, root)
        for name, _ in root.named_buffers():
            yield f"{path}.{name}", partial(_buffer, root, name)
        for name, module in root.named_modules():
            yield from _numbers_of(f"{path}.{name}", module)


def _numbers_of(path: str, module: nn.Module) -> Iterator[_Read]:
    if not is_of_library(type(module).__module__):
        for own, value in vars(module).items():
            if own != "training" and isinstance(value, int | float):
                yield f"{path}.{own}".replace("..", "."), partial(_own, module, own)


def _beside_state_dict(path: str, root: nn.Module, known: set[int]) -> Iterator[_Read]:
    """Yield what a module among the extras keeps, and no ``state_dict`` has.

    Args:
        path: Its path.
        root: The module.
        known: Identities of the model's modules, of which a checkpoint holds these, too.
    """
    if is_sharded(root) or type(root).state_dict is not nn.Module.state_dict:
        return
    saved = root.state_dict()
    for name, _ in root.named_buffers():
        if name not in saved:
            yield f"{path}.{name}", partial(_buffer, root, name)
    for name, module in root.named_modules():
        has_more = type(module).get_extra_state is not nn.Module.get_extra_state
        if id(module) not in known and not has_more:
            yield from _numbers_of(f"{path}.{name}", module)


def _sample(module: nn.Module) -> Any:
    return digest_of_weights(module)


def _buffer(module: nn.Module, name: str) -> Any:
    return mark_of(dict(module.named_buffers()).get(name))


def _own(holder: Any, name: str) -> Any:
    return _look(vars(holder).get(name))


def _look(value: Any) -> Any:
    """Return the mark of a value; of a large tensor, such as all rows of a dataset, of a part."""
    if isinstance(value, Tensor) and can_be_read(value):
        step = max(value.numel() // _MOST_NUMBERS, 1)
        return tuple(value.shape), mark_of(value.detach().reshape(-1)[::step])
    return mark_of(value)


_MOST_NUMBERS = 100_000


def _of_schedules(lr_scheduler: Any) -> Iterator[_Read]:
    """Yield variables that the functions of schedules read."""
    waiting = list(map(own_schedule, schedules_of(lr_scheduler)))
    while waiting:
        schedule = waiting.pop()
        parts = vars(schedule)
        waiting += parts.get("_schedulers", ())
        functions = [*parts.get("lr_lambdas", ()), parts.get("_scale_fn_custom")]
        for function in functions:
            if type(function) is FunctionType and not is_of_library(function.__module__):
                where = f"a function of the {type(schedule).__name__}"
                for name in (*function.__code__.co_freevars, *function.__code__.co_names):
                    read = partial(_variable, function, name)
                    if read() is not None:
                        yield f"{name} of {where}", read


def _variable(function: FunctionType, name: str) -> Any:
    """Return the mark of a variable that a function reads; None if it holds no data."""
    value = function.__globals__.get(name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            value = cells[name].cell_contents
        except ValueError:  # it has no value yet
            return None
    return mark_of(value) if isinstance(value, int | float | Tensor | list | dict) else None


def _of_hooks(state: TrainState) -> Iterator[_Read]:
    """Yield numbers that hooks of modules and optimizers count; what they collect is no state."""
    for holder in (*unwrap_model(state.model).modules(), *each(state.optimizer)):
        tables = [value for name, value in vars(holder).items() if name.endswith("_hooks")]
        for hook in [
            hook for table in tables if isinstance(table, dict) for hook in table.values()
        ]:
            if type(hook) is FunctionType and not is_of_library(hook.__module__):
                cells = zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
                for name in [name for name, cell in cells if _is_number(cell)]:
                    where = f"a hook of the {type(holder).__name__}"
                    yield f"{name} of {where}", partial(_variable, hook, name)


def _is_number(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, int | float)
    except ValueError:  # it has no value yet
        return False


def _of_loader(state: TrainState, loader: Any) -> Iterator[_Read]:
    """Yield numbers and tensors in a loader, its dataset, samplers and functions.

    Left out are private attributes, which are caches more often than a state, variables of the
    script, and what the loop sets itself or the loader's own state holds.
    """
    owners = {"train_dataloader": loader}
    stateful = [
        path
        for path, part in walk(owners, skips_empty=True)
        if path != "train_dataloader" and hasattr(type(part.value), "load_state_dict")
    ]
    for path in numbers_in(owners, beside=state.saved_holders()):
        name = path.rpartition(".")[2]
        if ".__globals__" in path or name.startswith("_") or path.startswith(tuple(stateful)):
            continue
        holder = follow(path, owners).holder
        is_place = hasattr(type(holder), "__next__")  # which is found again by reading
        if not is_place and not (name == "epoch" and hasattr(holder, "set_epoch")):
            yield path, partial(_at, path, owners)
    sampler = getattr(loader, "sampler", None)
    if isinstance(getattr(sampler, "weights", None), Tensor):  # a WeightedRandomSampler's
        yield "train_dataloader.sampler.weights", partial(_own, sampler, "weights")


def _at(path: str, owners: Mapping[str, Any]) -> Any:
    try:
        return _look(follow(path, owners).value)
    except LookupError:
        return None
