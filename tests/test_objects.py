"""The parts of objects: where the search looks, that it runs no code, and what it costs at most."""

import functools
import types
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from manualloop.objects import MOST_ENTRIES, follow, put, walk


class Mark:
    """What is looked for."""

    __slots__ = ()


MARK = Mark()


@dataclass
class Plain:
    value: object


@dataclass(slots=True)
class Slotted:
    value: object
    empty: object = None


class Private:
    __slots__ = ("__value", "never_set")

    def __init__(self, value):
        self.__value = value


class Hostile:
    """An object whose code must not run."""

    def __init__(self, value):
        object.__setattr__(self, "value", value)

    def __getattribute__(self, name):
        raise AssertionError(name)

    def __getattr__(self, name):
        raise AssertionError(name)

    def __setattr__(self, name, value):
        raise AssertionError(name)

    def __iter__(self):
        raise AssertionError

    def __len__(self):
        raise AssertionError

    def __eq__(self, other):
        raise AssertionError

    __hash__ = None

    @property
    def computed(self):
        raise AssertionError


class HostileDict(dict):
    def items(self):
        raise AssertionError

    __iter__ = __getitem__ = __len__ = items


class WithClassAttribute:
    mark = MARK


class Inheriting(WithClassAttribute):
    pass


class UsesGlobal:
    def read(self):
        return [MARK for _ in range(1)]


def uses_global():
    return helper()


def helper():
    return lambda: MARK


def closes_over(value):
    def outer():
        def inner():
            return value

        return inner

    return outer


def with_default(value):
    return lambda x=value, *, y=None: (x, y)


def with_keyword_default(value):
    return lambda *, x=value: x


def with_attribute(value):
    def function():
        pass

    function.value = value
    return function


def wrapped(value):
    @functools.wraps(with_attribute)
    def function():
        return value

    return function


Pair = namedtuple("Pair", "a b")

HOLDERS = {
    "attribute": Plain,
    "slot": Slotted,
    "private slot": Private,
    "hostile": Hostile,
    "hostile dict": lambda value: HostileDict(a=value),
    "dict": lambda value: {"a": [value]},
    "dict of other keys": lambda value: {("a", 1): value, None: 2},
    "ordered": lambda value: OrderedDict(a=(value,)),
    "deque": lambda value: deque([1, value]),
    "named tuple": lambda value: Pair(1, value),
    "set of one": lambda value: {value, "text"},
    "frozenset": lambda value: frozenset([value]),
    "module": lambda value: nn.Sequential(nn.Linear(1, 1), nn.Sequential(with_module(value))),
    "closure": closes_over,
    "inner closure": lambda value: closes_over(value)(),
    "default": with_default,
    "keyword default": with_keyword_default,
    "attribute of a function": with_attribute,
    "wrapped": wrapped,
    "partial": lambda value: functools.partial(print, value),
    "keyword of a partial": lambda value: functools.partial(functools.partial(print, end=value)),
    "bound method": lambda value: Plain(value).__repr__,
    "bound builtin": lambda value: [value].append,
    "namespace": lambda value: types.SimpleNamespace(a=types.SimpleNamespace(b=value)),
    "class attribute": lambda value: WithClassAttribute(),
    "inherited class attribute": lambda value: Inheriting(),
    "global of a method": lambda value: UsesGlobal(),
    "global of a function's function": lambda value: uses_global,
    "class": lambda value: WithClassAttribute,
    "cached property": lambda value: functools.cached_property(closes_over(value)),
    "cycle": lambda value: cycle(value),
}


def with_module(value):
    module = nn.ReLU()
    module.value = value
    return module


def cycle(value):
    one = []
    one += [one, Plain(one), Plain(value)]
    return one


def path_to_mark(holder):
    return next((path for path, part in walk({"it": holder}) if part.value is MARK), None)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_part_is_found_and_its_path_leads_to_it(name):
    holder = HOLDERS[name](MARK)
    path = path_to_mark(holder)
    assert path is not None
    assert follow(path, {"it": holder}).value is MARK
    assert path_to_mark(HOLDERS[name](MARK)) == path


WRITABLE = [
    *("attribute", "slot", "private slot", "hostile", "hostile dict", "dict", "module"),
    *("closure", "inner closure", "attribute of a function", "namespace"),
]


@pytest.mark.parametrize("name", WRITABLE)
def test_a_part_is_replaced_where_its_holder_can_be_written_to(name):
    holder = HOLDERS[name](MARK)
    path = path_to_mark(holder)
    part = follow(path, {"it": holder})
    other = Mark()
    put(part.holder, part.step, other)
    assert follow(path, {"it": holder}).value is other


def test_what_cannot_be_written_to_is_refused():
    for name in ("ordered", "set of one", "default"):
        holder = HOLDERS[name](MARK)
        part = follow(path_to_mark(holder), {"it": holder})
        with pytest.raises(LookupError, match="cannot be written"):
            put(part.holder, part.step, None)


def test_a_missing_last_step_is_told_from_a_missing_holder():
    part = follow("it.later", {"it": Plain(1)})
    assert (part.value, part.step) == (None, ".later")
    with pytest.raises(LookupError, match="its holder is missing"):
        follow("it.value.later", {"it": Plain(None)})
    with pytest.raises(LookupError, match="nothing is known"):
        follow("other.value", {"it": Plain(1)})


def test_of_libraries_neither_globals_nor_class_attributes_are_searched():
    found = dict(walk({"it": nn.functional.dropout, "linear": nn.Linear(1, 1)}))
    assert not any("__globals__" in path or "__class__" in path for path in found)


def test_globals_of_another_module_of_the_user_are_found():
    module = types.ModuleType("module_of_mine")
    module.mark, module.unused = MARK, Mark()
    code = "def draws():\n    return module_of_mine.mark"
    names = {"module_of_mine": module}
    exec(code, names)
    found = {path: part.value for path, part in walk({"it": names["draws"]})}
    assert found["it.__globals__.module_of_mine.mark"] is MARK
    assert not any(value is module.unused for value in found.values())


def test_the_search_is_bounded_and_looks_into_no_data():
    data = {
        "rows": [{"x": torch.zeros(2)}] * 2_000_000,
        "numbers": list(range(1_000_000)),
        "objects": [Plain(i) for i in range(5 * MOST_ENTRIES)],
        "table": torch.zeros(10),
    }
    assert sum(1 for _ in walk(data)) < 2 * MOST_ENTRIES


def test_the_nearest_path_counts_and_each_object_comes_once():
    mark = [MARK]
    found = [path for path, part in walk({"a": [[mark]], "b": mark}) if part.value is MARK]
    assert found == ["b[0]"]
