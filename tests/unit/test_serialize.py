"""State as JSON and tensors, and back to the last bit and the last type."""

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manualloop import CheckpointError, prepare_scheduler
from manualloop.serialize import put_together, take_apart

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
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
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers()))


def nests(leaves):
    lists = st.lists(leaves, max_size=3)
    pairs = st.lists(st.tuples(KEYS, leaves), max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.dictionaries(KEYS, leaves, max_size=3),
        pairs.map(OrderedDict),
        st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter),
        st.sets(st.integers(), max_size=3),
    )


VALUES = st.recursive(st.one_of(SCALARS, ARRAYS, ARRAYS.map(lambda a: a.reshape(-1)[:1])), nests)


def there_and_back(value):
    tensors = {}
    text = json.dumps(take_apart(value, "value", tensors), allow_nan=False)
    return put_together(json.loads(text), tensors)


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
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
