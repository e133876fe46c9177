"""The random states of a process: taken, put back, compared."""

import json
import random

import numpy as np
import pytest
import torch

from manualloop.checkpoint.nested import put_together, take_apart
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state

DRAWS = {
    "python": lambda: [random.random(), random.gauss(0, 1)],
    "numpy": lambda: [np.random.random(), np.random.normal(), *np.random.permutation(5).tolist()],
    "torch": lambda: [*torch.rand(3).tolist(), *torch.randn(17).tolist()],
}


@pytest.fixture(autouse=True)
def puts_the_generators_back():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numpy = np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(numpy)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draw_from_all():
    return {name: draw() for name, draw in DRAWS.items()}


def test_all_generators_draw_the_same_again():
    state = get_random_state()
    first = draw_from_all()
    second = draw_from_all()
    assert all(first[name] != second[name] for name in DRAWS)
    set_random_state(state)
    assert draw_from_all() == first
    set_random_state(state)  # a second time: drawing has not changed what was taken
    assert draw_from_all() == first


def test_the_second_half_of_a_pair_of_normals_is_part_of_the_state():
    random.gauss(0, 1)
    np.random.normal()
    state = get_random_state()
    first = [random.gauss(0, 1), np.random.normal()]
    random.gauss(0, 1)
    set_random_state(state)
    assert [random.gauss(0, 1), np.random.normal()] == first


def test_states_come_back_from_json_and_tensors():
    np.random.normal()  # half of a pair is left
    state, tensors = get_random_state(), {}
    first = draw_from_all()
    text = json.dumps(take_apart(state, "rng", tensors), allow_nan=False)
    again = put_together(json.loads(text), tensors)
    assert is_same_random_state(again, state)
    set_random_state(again)
    assert draw_from_all() == first


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_from_one_generator_is_noticed(name):
    before = get_random_state()
    assert is_same_random_state(before, get_random_state())
    DRAWS[name]()
    after = get_random_state()
    assert not is_same_random_state(before, after)
    assert not is_same_random_state(after, before)
    set_random_state(before)
    assert is_same_random_state(before, get_random_state())


def test_a_draw_is_noticed_that_only_uses_up_a_number_in_store():
    random.gauss(0, 1)
    np.random.normal()
    before = get_random_state()
    np.random.normal()
    between = get_random_state()
    random.gauss(0, 1)
    assert not is_same_random_state(before, between)
    assert not is_same_random_state(between, get_random_state())


def test_generators_of_ones_own_are_not_global():
    before = get_random_state()
    random.Random(1).random()
    np.random.default_rng(1).random()
    torch.rand(1, generator=torch.Generator().manual_seed(1))
    assert is_same_random_state(before, get_random_state())


def test_another_bit_generator_of_numpy_is_taken_and_compared():
    np.random.set_bit_generator(np.random.PCG64(3))
    state = get_random_state()
    first = DRAWS["numpy"]()
    assert not is_same_random_state(state, get_random_state())
    set_random_state(state)
    assert is_same_random_state(state, get_random_state())
    assert DRAWS["numpy"]() == first


def test_a_state_of_numpy_as_older_checkpoints_have_it_is_put_back():
    state = {**get_random_state(), "numpy": np.random.get_state()}
    first = DRAWS["numpy"]()
    set_random_state(state)
    assert DRAWS["numpy"]() == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_states_of_devices_that_are_not_here_are_left_out():
    state = get_random_state()
    first = draw_from_all()
    set_random_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)]})
    assert draw_from_all() == first
    assert set(get_random_state(devices=False)) == {"python", "numpy", "torch"}
