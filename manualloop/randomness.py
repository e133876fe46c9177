"""Random states: those of the process, and those of generators that objects hold.

Python, NumPy and torch each have a global generator, and torch has one for every device. In
addition, any object of a run may hold generators of its own: a sampler, a collator, the closure of
a loss function. ``find_generators`` finds them, wherever they are. Random states are saved,
restored and preserved only with the functions of this module.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manualloop.objects import Part, follow, objects_of_set, put, walk

RandomState: TypeAlias = dict[str, Any]
"""The state of each global generator by its name, as numbers and tensors."""


def get_random_state(*, devices: bool = True) -> RandomState:
    """Return the states of all global generators.

    Args:
        devices: Whether to include the generators of accelerators, which waits for the device.
    """
    state: RandomState = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # legacy: of the Mersenne twister only
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if devices and torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if devices and hasattr(torch, "xpu") and torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        state["xpu"] = torch.xpu.get_rng_state_all()
    return state


def set_random_state(state: RandomState) -> None:
    """Restore the global generators to states that ``get_random_state`` returned.

    Devices that no longer exist are skipped.

    >>> state = get_random_state()
    >>> drawn = torch.rand(3)
    >>> set_random_state(state)
    >>> torch.equal(torch.rand(3), drawn)
    True
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for number, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, number)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "xpu" in state and hasattr(torch, "xpu") and torch.xpu.is_available():
        for number, of_device in enumerate(state["xpu"][: torch.xpu.device_count()]):
            torch.xpu.set_rng_state(of_device, number)


def is_same_random_state(one: RandomState, other: RandomState) -> bool:
    """Tell whether nothing was drawn on the host between two states."""
    return (
        one["python"] == other["python"]
        and torch.equal(one["torch"], other["torch"])
        and is_same_state(one["numpy"], other["numpy"])
    )


def has_drawn(before: RandomState) -> bool:
    """Tell whether numbers were drawn since, from any of the generators of a state."""
    of_devices = before.keys() - {"python", "numpy", "torch"}
    now = get_random_state(devices=bool(of_devices))
    are_same = all(is_same_state(before[name], now.get(name)) for name in of_devices)
    return not (are_same and is_same_random_state(before, now))


def is_same_state(one: Any, other: Any) -> bool:
    """Tell whether two states of generators, or containers of such states, are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_state(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same_state, one, other))
    return bool(one == other)


_KINDS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)


class Search(NamedTuple):
    """The generators that some objects hold.

    Attributes:
        found: Each generator once, by its path.
        unsaved: Reasons why something random cannot be saved, by its path.
    """

    found: dict[str, Part]
    unsaved: dict[str, str]


def find_generators(**owners: Any) -> dict[str, Any]:
    """Return the random generators that some objects hold, each once, by its path.

    Generators are ``torch.Generator``, NumPy's ``Generator``, ``RandomState`` and bit generators,
    and ``random.Random``. The global ones are left out: ``get_random_state`` has them. Where the
    search looks, and where not, is described in ``manualloop.objects.walk``.

    >>> def loss_fn(model, batch, *, noise=np.random.default_rng(0)): ...
    >>> list(find_generators(loss_fn=loss_fn))
    ['loss_fn.__kwdefaults__.noise']
    >>> sampler = torch.utils.data.RandomSampler(range(3), generator=torch.Generator())
    >>> list(find_generators(loader=torch.utils.data.DataLoader(range(3), sampler=sampler)))
    ['loader.sampler.generator']
    """
    return {path: part.value for path, part in search(owners).found.items()}


def is_generator(value: object) -> bool:
    """Tell whether an object is a random generator of torch, NumPy or Python."""
    return issubclass(type(value), _KINDS)


def generator_states(**owners: Any) -> dict[str, Any]:
    """Return the states of the generators that ``find_generators`` finds, by path."""
    return states_of(find_generators(**owners))


def states_of(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of generators that were found, by path."""
    return {path: _state_of(generator) for path, generator in generators.items()}


def restore_generators(states: Mapping[str, Any], **owners: Any) -> dict[str, str]:
    """Put generators back to what ``generator_states`` returned, perhaps in another process.

    A generator that its owner makes at the first use, and has not made yet, is made instead.

    Returns:
        Reasons why a state was not restored, by its path.

    >>> one, other = {"noise": random.Random(1)}, {"noise": None}
    >>> restore_generators(generator_states(transform=one), transform=other)
    {}
    >>> other["noise"].random() == one["noise"].random()
    True
    """
    problems = {}
    for path, state in states.items():
        try:
            part = follow(path, owners)
            if part.value is not None:
                _set(part.value, state)
                continue
            generator = _make(state)
            try:
                put(part.holder, part.step, generator)
            except _PROBLEMS as error:
                raise LookupError("it is not there") from error
        except _PROBLEMS as error:
            problems[path] = str(error.args[0] if error.args else error)
    return problems


_PROBLEMS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def remember_random_states(*, devices: bool = True, **owners: Any) -> Callable[[], None]:
    """Return a function that puts all random states back: global ones, and those in objects.

    It also takes away what generators were made or replaced since.

    Args:
        devices: Whether those of accelerators are included, which waits for the device.
        owners: Objects that may hold generators.
    """
    before = list(search(owners).found.values())
    states = [_state_of(part.value) for part in before]
    global_state = get_random_state(devices=devices)

    def put_back() -> None:
        set_random_state(global_state)
        known = {id(part.value) for part in before}
        now = search(owners).found.values()
        made = [part._replace(value=None) for part in now if id(part.value) not in known]
        for value, holder, step in (*made, *before):
            if holder is not None:
                with suppress(*_PROBLEMS):  # some places cannot be written to
                    put(holder, step, value)
        for part, state in zip(before, states, strict=True):
            _set(part.value, state)

    return put_back


@contextmanager
def random_states_kept(*, devices: bool = True, **owners: Any) -> Iterator[None]:
    """Put all random states back afterwards: see ``remember_random_states``."""
    put_back = remember_random_states(devices=devices, **owners)
    try:
        yield
    finally:
        put_back()


def search(owners: Mapping[str, Any]) -> Search:
    """Search objects for generators, and for random things that cannot be saved."""
    found: dict[str, Part] = {}
    unsaved: dict[str, str] = {}
    if not owners:
        return Search(found, unsaved)
    global_ones = {id(generator) for generator in _global_generators()}
    for path, part in walk(owners, skips_empty=True):
        kind = type(part.value)
        if issubclass(kind, random.SystemRandom):
            unsaved[path] = "it draws from the operating system"
        elif issubclass(kind, _KINDS):
            if id(part.value) not in global_ones:
                found[path] = part
        elif issubclass(kind, set | frozenset):
            entries = {"": objects_of_set(part.value)}
            if len(entries[""]) > 1 and any(issubclass(type(e), _KINDS) for e in entries[""]):
                unsaved[path] = "the order of a set differs from process to process: use a list"
    return Search(found, unsaved)


def _global_generators() -> list[Any]:
    python_random: Any = random.random
    numpy_random: Any = np.random.random_sample
    found: list[Any] = [python_random.__self__, numpy_random.__self__]
    for device in (getattr(torch, name, None) for name in ("cuda", "xpu")):
        found += getattr(device, "default_generators", ())
    return [*found, torch.default_generator]


def _state_of(generator: Any) -> dict[str, Any]:
    state: Any
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    elif isinstance(generator, np.random.BitGenerator):
        state = generator.state
    elif isinstance(generator, np.random.RandomState):
        state = generator.get_state(legacy=False)
    elif isinstance(generator, random.Random):
        state = generator.getstate()
    else:
        state = generator.get_state()
    return {"kind": _kind_of(generator), "state": state}


def _kind_of(generator: Any) -> str:
    kind = f"{type(generator).__module__}.{type(generator).__qualname__}"
    return f"{kind} {generator.device}" if isinstance(generator, torch.Generator) else kind


def _set(generator: Any, saved: Any) -> None:
    state = saved
    if isinstance(saved, dict) and "kind" in saved:  # else from before the kind was saved
        state = saved["state"]
        if saved["kind"] != _kind_of(generator):
            raise ValueError(f"it was a {saved['kind']}, and is a {_kind_of(generator)}")
    if type(generator).__module__.partition(".")[0] in ("random", "numpy", "torch"):
        _require_sound(state)  # else of a class of the user's, which has a state of its own
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.state = state


def _require_sound(state: Any) -> None:
    """Refuse a state that its generator would take, to read beyond it or to draw no numbers."""
    places: list[tuple[str, Any, int]] = []
    spare = None  # a number that is kept for the next draw from the normal distribution
    if isinstance(state, Tensor):
        if state.dtype != torch.uint8 or state.ndim != 1:
            raise ValueError(f"its saved state is a {state.dtype} {tuple(state.shape)}")
        if state.numel() == _NUM_BYTES_OF_TORCH:
            seed_left_next = state[8:24].numpy().tobytes()
            left = int.from_bytes(seed_left_next[:4], sys.byteorder, signed=True)
            place = int.from_bytes(seed_left_next[8:], sys.byteorder)
            places = [("left", left - 1, 623), ("next", place, 625 - left)]
    elif isinstance(state, tuple) and len(state) == 3:  # of Python
        spare = state[2]
    elif isinstance(state, tuple):  # the older form of RandomState
        places, spare = [("pos", state[2], len(state[1]))], state[4] if state[4:] else None
    else:
        inner = state["state"]
        found = [("pos", inner.get("pos"), inner.get("key"))]
        found += [("buffer_pos", state.get("buffer_pos"), state.get("buffer"))]
        places = [(name, place, len(of)) for name, place, of in found if place is not None]
        if "key" in inner and state["bit_generator"] == "MT19937" and len(inner["key"]) != 624:
            raise ValueError(f"its saved state is damaged: {len(inner['key'])} numbers")
        spare = state.get("gauss")
    for name, place, last in places:
        if not 0 <= place <= last:
            raise ValueError(f"its saved state is damaged: {name} is {place}")
    if spare is not None and not math.isfinite(spare):
        raise ValueError(f"its saved state is damaged: its next normal number is {spare}")


_NUM_BYTES_OF_TORCH = 5056  # of torch's generator for the CPU, a Mersenne twister


def _make(saved: Mapping[str, Any]) -> Any:
    """Make a generator of the kind that was saved, in its state."""
    generator = _new(saved["kind"], saved["state"])
    if generator is None:
        raise ValueError(f"it was a {saved['kind']}, and is not there yet")
    _set(generator, saved)
    return generator


def _new(kind: str, state: Any) -> Any:
    """Make a generator of a kind; None if only the user's code can make one."""
    name, _, device = kind.partition(" ")
    if name == "torch._C.Generator":
        return torch.Generator(device)
    if name == "random.Random":
        return random.Random()
    if name in ("numpy.random._generator.Generator", "numpy.random.mtrand.RandomState"):
        if (bits := state["bit_generator"]) not in _BIT_GENERATORS:
            return None
        make = np.random.Generator if name.endswith(".Generator") else np.random.RandomState
        return make(getattr(np.random, bits)(0))
    module, _, bits = name.rpartition(".")
    is_numpys = module.startswith("numpy.random.") and bits in _BIT_GENERATORS
    return getattr(np.random, bits)(0) if is_numpys else None


_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def check_random_state(state: Any) -> None:
    """Refuse what ``set_random_state`` would not take. Nothing is changed.

    Raises:
        ValueError: The message names the generator and the reason.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it is a {type(state).__name__}")
    of_numpy = np.random.get_state(legacy=False)["bit_generator"]
    makers: dict[str, Callable[[], Any]] = {
        "python": random.Random,
        "numpy": lambda: np.random.RandomState(getattr(np.random, of_numpy)(0)),
        "torch": torch.Generator,
    }
    for name, make in makers.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        with _naming(name):
            _set(make(), state[name])
    for name in state.keys() & {"cuda", "xpu", "mps"}:
        with _naming(name):
            of_devices = state[name]
            for of_device in [of_devices] if name == "mps" else of_devices:
                _check_device_state(name, of_device)


def check_generator_state(saved: Any) -> None:
    """Refuse what is the state of no generator, as far as its kind is known. Nothing is changed.

    Raises:
        ValueError: The message has the reason.
    """
    with _naming("a generator"):
        if not (isinstance(saved, dict) and "kind" in saved):  # from before the kind was saved
            if isinstance(saved, Tensor | dict):
                _require_sound(saved)
            elif not isinstance(saved, list | tuple):
                raise TypeError(f"it is a {type(saved).__name__}")
        elif saved["kind"].startswith("torch._C.Generator ") and not saved["kind"].endswith("cpu"):
            _check_device_state(saved["kind"].split()[1].partition(":")[0], saved["state"])
        elif (generator := _new(saved["kind"], saved["state"])) is not None:
            _set(generator, saved)


def _check_device_state(device: str, state: Any) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"it is a {type(state).__name__}")
    _require_sound(state)
    module = getattr(torch, device, None)
    if module is not None and module.is_available():
        torch.Generator(device).set_state(state)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except _PROBLEMS as error:
        raise ValueError(f"{name}: {error}") from error


def seed_of(generator: Any) -> int | None:
    """Return the seed that a user has given to a generator of torch; None: nobody knows.

    Seeds that torch draws itself, different ones in each process, are nearly all larger.
    """
    initial_seed = getattr(generator, "initial_seed", None)
    seed = initial_seed() if initial_seed is not None else None
    return seed if seed is not None and seed < 1 << 32 else None
