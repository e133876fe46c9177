"""The random states of a process: taken, put back, compared."""

import json
import random

import numpy as np
import pytest
import torch

from manualloop.checkpoint.nested import put_together, take_apart
from manualloop.randomness import (
    find_generators,
    generator_states,
    get_random_state,
    has_drawn,
    is_same_random_state,
    random_states_kept,
    restore_generators,
    search,
    set_random_state,
)

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


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "philox": lambda: np.random.Generator(np.random.Philox(1)),
    "random state": lambda: np.random.RandomState(1),
    "bit generator": lambda: np.random.PCG64(1),
    "python": lambda: random.Random(1),
}


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    if isinstance(generator, np.random.BitGenerator):
        return generator.random_raw(3).tolist()
    return generator.normal(size=3).tolist()


def through_json(states):
    tensors = {}
    text = json.dumps(take_apart(states, "generators", tensors), allow_nan=False)
    return put_together(json.loads(text), tensors)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_that_an_object_holds_draws_the_same_again(kind):
    holder = {"a": [GENERATORS[kind]()]}
    generator = holder["a"][0]
    draw(generator)
    states = through_json(generator_states(data=holder))
    first = draw(generator)
    assert draw(generator) != first
    assert restore_generators(states, data=holder) == {}
    assert draw(generator) == first
    other = {"a": [GENERATORS[kind]()]}
    assert restore_generators(states, data=other) == {}
    assert draw(other["a"][0]) == first


@pytest.mark.parametrize("kind", [kind for kind in GENERATORS if kind != "bit generator"])
def test_a_generator_that_is_made_at_its_first_use_is_made_in_its_state(kind):
    holder = {"a": GENERATORS[kind]()}
    draw(holder["a"])
    states = through_json(generator_states(data=holder))
    first = draw(holder["a"])
    for other in ({"a": None}, {}):
        assert restore_generators(states, data=other) == {}
        assert type(other["a"]) is type(holder["a"])
        assert draw(other["a"]) == first


def test_transformers_collator_that_makes_its_generator_lazily_goes_on_with_its_masks():
    transformers = pytest.importorskip("transformers")
    collator = transformers.DataCollatorForLanguageModeling(FakeTokenizer(), seed=3)
    assert find_generators(collate_fn=collator) == {}
    collator.create_rng()
    collator.generator.manual_seed(9)
    states = through_json(generator_states(collate_fn=collator))
    other = transformers.DataCollatorForLanguageModeling(FakeTokenizer(), seed=3)
    assert restore_generators(states, collate_fn=other) == {}
    assert draw(other.generator) == draw(collator.generator)


class FakeTokenizer:
    """What the collator asks for when it is made."""

    mask_token = "[MASK]"


def test_a_generator_with_several_owners_is_one():
    generator = torch.Generator()
    found = find_generators(loss_fn=lambda: generator, extras={"noise": generator})
    assert list(found.values()) == [generator]


def test_global_generators_are_not_those_of_an_object():
    functions = [random.random, np.random.normal, torch.rand]
    held = [torch.default_generator, np.random.mtrand._rand, np.random.permutation]
    assert find_generators(functions=functions, held=held) == {}


def test_what_cannot_be_saved_or_restored_is_named():
    several = {random.Random(1), random.Random(2)}
    unsaved = search({"data": {"os": random.SystemRandom(), "several": several}}).unsaved
    assert list(unsaved) == ["data['os']", "data['several']"]
    assert "operating system" in unsaved["data['os']"]
    states = generator_states(data={"a": torch.Generator(), "b": {"c": torch.Generator()}})
    problems = restore_generators(states, data={"a": random.Random(), "b": None})
    assert problems == {
        "data['a']": "it was a torch._C.Generator cpu, and is a random.Random",
        "data['b']['c']": "its holder is missing",
    }
    assert (
        list(restore_generators(states, other=1).values()) == ["nothing is known by this name"] * 2
    )


@pytest.mark.parametrize("kind", ["random state", "philox"])
def test_a_damaged_state_of_numpy_is_refused_and_not_read(kind):
    holder = {"a": GENERATORS[kind]()}
    states = generator_states(data=holder)
    state = states["data['a']"]["state"]
    place, name = (state["state"], "pos") if kind == "random state" else (state, "buffer_pos")
    place[name] = 10**6
    assert "damaged" in restore_generators(states, data=holder)["data['a']"]


class Lazy:
    """Makes its generator when it is first asked, and a new one for each epoch."""

    rng = None

    def __init__(self):
        self.rng = None

    def draw(self, epoch=0):
        if self.rng is None or epoch:
            self.rng = np.random.default_rng(epoch)
        return self.rng.normal()


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("is_used", [False, True])
def test_random_states_are_kept_also_of_generators_made_or_replaced_meanwhile(epoch, is_used):
    lazy, closed, expected = Lazy(), random.Random(1), Lazy()
    draws = lambda: closed.random()  # noqa: E731
    if is_used:
        assert lazy.draw() == expected.draw()
    before = get_random_state()
    with random_states_kept(data=lazy, loss_fn=draws):
        lazy.draw(epoch), draws(), draw_from_all()
    assert is_same_random_state(before, get_random_state())
    assert lazy.draw() == expected.draw()
    assert draws() == random.Random(1).random()


def test_random_states_are_kept_when_the_block_raises():
    generator, before = random.Random(1), get_random_state()
    with pytest.raises(KeyError), random_states_kept(data=[generator]):
        generator.random()
        random.random()
        raise KeyError
    assert generator.random() == random.Random(1).random()
    assert is_same_random_state(before, get_random_state())


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_from_any_generator_of_the_process_is_seen(name):
    before = get_random_state()
    assert not has_drawn(before)
    DRAWS[name]()
    assert has_drawn(before)
    set_random_state(before)
    assert not has_drawn(before)
