"""State as JSON and tensors, and back to the last bit and the last type."""

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manualloop import CheckpointError, prepare_scheduler
from manualloop.checkpoint.files import parse_json
from manualloop.checkpoint.nested import (
    as_json,
    from_json,
    put_together,
    take_apart,
)

# What JSON escapes, and what takes two to four bytes; a table of all of Unicode takes seconds.
TEXTS = st.text('ab "\\\n\t\x00\u00e9\u20ac\u2028\U0001f600')

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.binary(max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.device("cpu")]),
)
DTYPES = st.one_of(
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.boolean_dtypes(),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
# Not contiguous: turned over, transposed, every second, one number many times.
VIEWS = st.one_of(
    ARRAYS.map(lambda a: a[..., ::-1] if a.ndim else a),
    ARRAYS.map(lambda a: a.T),
    ARRAYS.map(lambda a: a.reshape(-1)[::2]),
    ARRAYS.map(lambda a: np.broadcast_to(a.reshape(-1)[:1], (2, a.reshape(-1)[:1].size))),
)
NUMPY_SCALARS = hnp.arrays(DTYPES, (1,)).map(lambda a: a[0])
TENSORS = st.one_of(
    st.lists(st.floats(), max_size=3).map(torch.tensor),
    st.lists(st.floats(width=32), max_size=3).map(lambda v: torch.tensor(v).bfloat16()),
    st.integers(-(2**63), 2**63 - 1).map(torch.tensor),
    st.booleans().map(lambda v: torch.tensor([[v, not v]]).T),
)
# "a.b" is also the path of {"a": {"b": ...}}, and 1 looks like "1".
KEYS = st.one_of(
    TEXTS,
    st.sampled_from(["a", "b", "a.b", "1", "0", 1, 0]),
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.tuples(st.integers()),
)


def nests(leaves):
    lists = st.lists(leaves, max_size=3)
    pairs = st.lists(st.tuples(KEYS, leaves), max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.dictionaries(KEYS, leaves, max_size=3),
        pairs.map(OrderedDict),
        st.dictionaries(TEXTS, st.integers(), max_size=3).map(Counter),
        st.sets(st.integers(), max_size=3),
    )


VALUES = st.recursive(st.one_of(SCALARS, ARRAYS, VIEWS, NUMPY_SCALARS, TENSORS), nests)


def there_and_back(value):
    tensors = {}
    text = json.dumps(take_apart(value, "value", tensors), allow_nan=False)
    return put_together(json.loads(text), tensors)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        is_alike = one.dtype == other.dtype and one.shape == other.shape
        return is_alike and bits(one) == bits(other)
    if isinstance(one, np.generic) and np.isnan(one):
        return one.dtype == other.dtype and np.isnan(other)  # which NaN is not kept
    if isinstance(one, np.ndarray | np.generic):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(VALUES)
def test_a_nest_comes_back_to_the_last_bit_and_type(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        math.nan,
        -math.inf,
        2**100,
        1 == 1,
        np.float32(0.1),
        np.int64(-3),
        np.bool_(True),
        np.arange(6).reshape(2, 3).T,
        torch.Size([2, 3]),
        {1: {"a": torch.ones(2), 2.5: ["list"]}},
        ["tensor", "looks like a tag"],
        {"a": ["tuple", 1]},
        random.getstate(),
        np.random.get_state(),
        np.random.default_rng(3).bit_generator.state,
        torch.get_rng_state(),
    ],
    ids=range(17),
)
def test_values_that_are_easily_lost(value):
    assert same(there_and_back(value), value)


def test_a_defaultdict_comes_back_as_a_dict():
    assert there_and_back(defaultdict(list, a=[1])) == {"a": [1]}


def test_the_states_of_optimizer_schedule_and_loss_scale():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = prepare_scheduler(torch.optim.SGD(model.parameters()), num_training_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for part in (optimizer, schedule, scaler):
        assert same(there_and_back(part.state_dict()), part.state_dict())


def trained(steps):
    """A model that was trained for some steps, with all that has a state."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.99), amsgrad=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    parts = (model, optimizer, schedule, scaler)
    for _ in range(steps):
        train_once(*parts)
    return parts


def train_once(model, optimizer, schedule, scaler):
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()


def test_training_goes_on_with_the_same_bits_from_states_that_came_back():
    whole, other = trained(5), trained(3)
    states = [there_and_back(part.state_dict()) for part in other]
    again = trained(0)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        train_once(*again)
    for part, expected in zip(again, whole, strict=True):
        assert same(part.state_dict(), expected.state_dict()), type(part).__name__
    assert whole[3].get_scale() != 8.0, "the scale never moved"


def test_generators_go_on_from_states_that_came_back():
    ours, numpy = random.Random(1), np.random.default_rng(2)
    ours.gauss(0, 1)  # half of a pair: the other half is part of the state
    states = there_and_back([ours.getstate(), numpy.bit_generator.state])
    expected = [ours.gauss(0, 1), ours.random(), numpy.normal(size=3).tolist()]
    ours, numpy = random.Random(), np.random.default_rng()
    ours.setstate(states[0])
    numpy.bit_generator.state = states[1]
    assert [ours.gauss(0, 1), ours.random(), numpy.normal(size=3).tolist()] == expected


@pytest.mark.parametrize(
    "value",
    [
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"a.0": np.ones(1), "a": [np.zeros(1)], "a.0 (2)": np.full(1, 2.0)},
        OrderedDict([((1,), torch.ones(1)), ("(1,)", torch.zeros(1))]),
    ],
    ids=["dots", "numbers", "lists", "tuples"],
)
def test_tensors_whose_paths_are_alike_are_kept_apart(value):
    assert same(there_and_back(value), value)


def test_an_array_that_came_back_can_be_written_to_and_is_a_copy():
    array = np.arange(4.0)[::2]
    tensors = {}
    apart = take_apart(array, "value", tensors)
    array[:] = 7
    found = put_together(apart, tensors)
    assert found.tolist() == [0.0, 2.0]
    found[0] = 5


def test_a_tensor_is_put_aside_without_its_history():
    tensors = {}
    take_apart([torch.nn.Parameter(torch.ones(2)) * 2], "value", tensors)
    assert not tensors["value.0"].requires_grad
    assert tensors["value.0"].grad_fn is None


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.array(["2026-01-01"], "M8[D]"),
        np.ones(2, complex),
        np.zeros(2, [("a", "f4")]),
        pytest.param(
            np.longdouble(1),
            marks=pytest.mark.skipif(np.longdouble(1).itemsize <= 8, reason="it is a double"),
        ),
        pytest.param(
            np.ones(2, np.longdouble),
            marks=pytest.mark.skipif(np.longdouble(1).itemsize <= 8, reason="it is a double"),
        ),
    ],
    ids=["masked", "dates", "complex", "records", "long double", "long doubles"],
)
def test_arrays_that_would_lose_something_are_refused(value):
    with pytest.raises(CheckpointError, match=r"^state\.0 holds a "):
        take_apart([value], "state", {})


@pytest.mark.parametrize("value", [object(), lambda: 0, np.array(["text"]), frozenset([1]), 1j])
def test_what_cannot_be_saved_is_named(value):
    with pytest.raises(CheckpointError, match=r"extras\.ema\.inner\.0 holds a "):
        take_apart({"ema": {"inner": [value]}}, "extras", {})


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["no such tag"],
        ["tensor", "missing"],
        ["dtype", "float33"],
        ["dict", 1],
        ["array", "x"],
        [3],
    ],
    ids=range(7),
)
def test_what_is_none_of_ours_is_refused(value):
    with pytest.raises(CheckpointError, match="cannot be read"):
        put_together({"a": value}, {})


@pytest.mark.parametrize(
    "value",
    [
        ["device", "no such device"],
        ["scalar", 300, "|i1"],
        ["scalar", -1, "|u1"],
        ["scalar", 1e300, "<i8"],
        ["scalar", "a", "<f8"],
        ["scalar", 5, "O"],
        ["scalar", 10**12, "V"],
        ["scalar", 1, "<U4"],
        ["scalar", ["float", "nan"], "<i8"],
        ["array", "numbers", "O"],
        ["array", "numbers", "M8[s]"],
        ["array", "numbers", "f4,,"],
        ["array", "numbers", "("],
        ["array", "bfloat16", "<f4"],
        ["array", "none", "<i8"],
        ["bytes", "not base 64"],
        ["bytes", 3],
        ["float", "one"],
        ["float", None],
        ["size", "a"],
        ["set", ["list"]],
        ["dict", [["list"], 1]],
        ["ordered", {"a": 1}],
        ["counter", 3],
        [["list"]],
        [{}],
        [None],
        ["tensor"],
        ["tensor", ["list"]],
        ["tuple", ["tuple", ["no such tag"]]],
    ],
    ids=json.dumps,
)
def test_forged_state_raises_no_error_but_ours(value):
    tensors = {"numbers": torch.arange(3), "bfloat16": torch.ones(3).bfloat16()}
    with pytest.raises(CheckpointError, match="cannot be read"):
        put_together({"a": ["list", value]}, tensors)


def test_forged_state_that_is_nested_too_deep_is_refused():
    value = 1
    for _ in range(600):
        value = ["list", value]
    with pytest.raises(CheckpointError, match="cannot be read"):
        put_together(value, {})


# Records of numbers: metrics in a manifest, and history.jsonl -------------------------------------

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(["nan", "inf", "-inf", "float", "str", "list", "NaN", ""]),
        TEXTS,
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXTS, inner)),
    max_leaves=20,
)


@settings(max_examples=40)
@given(st.dictionaries(TEXTS, values, max_size=6))
def test_a_record_comes_back_from_plain_json(record):
    text = json.dumps(as_json(record), allow_nan=False)
    assert repr(from_json(parse_json(text.encode()))) == repr(record)


def test_a_record_of_release_0_1_0_is_read():
    """There a number that JSON lacks was a text, and lists were plain."""
    old = {"loss": "nan", "best": "inf", "by_class": [1.5, "-inf"], "name": "glue", "of": ["a"]}
    assert repr(from_json(old)) == repr(
        {
            "loss": math.nan,
            "best": math.inf,
            "by_class": [1.5, -math.inf],
            "name": "glue",
            "of": ["a"],
        }
    )


@pytest.mark.parametrize(
    "odd", [["float"], ["float", []], ["float", "x", "y"], ["str", 1], [], [[]]]
)
def test_a_record_that_nobody_wrote_is_read_as_it_is(odd):
    assert from_json({"x": odd}) == {"x": odd}


@pytest.mark.parametrize("text", ["NaN", "Infinity", '{"a": -Infinity}', "{", ""])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text.encode())
