"""Runs whose random numbers come from generators that objects hold: resumed, they draw the same."""

import functools
import random
import runpy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from manualloop import (
    TrainState,
    evaluate_loop,
    load_checkpoint,
    save_checkpoint,
    train_loop,
    train_steps,
)

BATCHES = [{"x": torch.linspace(-1, 1, 12).reshape(4, 3) * (i + 1)} for i in range(4)]


class Interrupted(Exception):  # noqa: N818
    """Ends a run from within."""


class NoisyLinear(nn.Module):
    """A dropout of one's own, with a generator that is no buffer."""

    def __init__(self, generator):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.noise = {"of": generator}

    def forward(self, x):
        return self.layer(x * (1 + 0.1 * draw(self.noise["of"])))


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    if isinstance(generator, np.random.Generator):
        return generator.random()
    if isinstance(generator, np.random.RandomState):
        return generator.random_sample()
    return generator.random()


KINDS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "random state": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}


def square(model, batch, scale=0.0):
    return model(batch["x"] + 0.1 * scale).square().mean()


module_rng = random.Random(0)


def draws_from_a_global(model, batch):
    def inner():
        return module_rng.random()

    return square(model, batch, inner())


class LazyLoss:
    """Makes its generator at the first batch."""

    def __init__(self):
        self.rng = None

    def __call__(self, model, batch):
        if self.rng is None:
            self.rng = np.random.default_rng(5)
        return square(model, batch, self.rng.random())


def closure(generator):
    def make():
        return lambda model, batch: square(model, batch, draw(generator))

    return make()


def partial(generator):
    def loss(generator, model, batch):
        return square(model, batch, draw(generator))

    return functools.partial(loss, generator)


def default(generator):
    return lambda model, batch, g=generator: square(model, batch, draw(g))


def method(generator):
    class Loss:
        def __init__(self):
            self.parts = [{"noise": (generator,)}]

        def compute(self, model, batch):
            return square(model, batch, draw(self.parts[0]["noise"][0]))

    return Loss().compute


def bound_draw(generator):
    random_of = generator.random if hasattr(generator, "random") else None
    return lambda model, batch: square(model, batch, random_of() if random_of else draw(generator))


PLACES = {f.__name__: f for f in (closure, partial, default, method, bound_draw)}


def run(loss_fn, folder=None, stop_after=None, model=None, batches=BATCHES, **options):
    torch.manual_seed(0)
    model = model or nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupt(step):
        if step.index == stop_after:
            raise Interrupted

    try:
        train_loop(
            model,
            batches,
            optimizer,
            num_epochs=2,
            loss_fn=loss_fn,
            checkpoint_dir=folder,
            on_step=interrupt,
            progress_bar=False,
            **{"checkpoint_every": 3, **options},
        )
    except Interrupted:
        return None
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_resumes(make, tmp_path, **options):
    """Compare a run, with its parts made anew by `make()` each time, whole and resumed twice."""
    whole = run(**make(), **options)
    assert run(**make(), folder=tmp_path, stop_after=4, **options) is None
    assert run(**make(), folder=tmp_path, stop_after=7, **options) is None
    resumed = run(**make(), folder=tmp_path, **options)
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize(
    ("place", "kind"),
    [*zip(PLACES, [*KINDS, "numpy"], strict=True), *(("closure", kind) for kind in KINDS)],
)
def test_a_loss_with_a_generator_resumes_exactly(tmp_path, kind, place):
    assert_resumes(lambda: {"loss_fn": PLACES[place](KINDS[kind]())}, tmp_path)


def test_accumulated_updates_resume_exactly(tmp_path):
    def accumulated(**options):
        return run(closure(random.Random(1)), gradient_accumulation_steps=2, **options)

    whole = accumulated()
    accumulated(folder=tmp_path, stop_after=4)
    assert all(map(torch.equal, whole, accumulated(folder=tmp_path)))


def test_a_module_level_generator_is_restored(tmp_path):
    def make():
        module_rng.seed(0)
        return {"loss_fn": draws_from_a_global}

    assert_resumes(make, tmp_path)


def test_a_generator_that_the_loss_makes_at_its_first_batch_is_restored(tmp_path):
    assert_resumes(lambda: {"loss_fn": LazyLoss()}, tmp_path)


@pytest.mark.parametrize("kind", ["torch", "random state"])
def test_a_generator_in_a_module_of_the_model_is_restored(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        return {"loss_fn": square, "model": NoisyLinear(KINDS[kind]())}

    assert_resumes(make, tmp_path)


def test_a_generator_shared_by_model_loss_and_extras_is_restored_once(tmp_path):
    def make():
        torch.manual_seed(0)
        shared = torch.Generator().manual_seed(4)
        model = NoisyLinear(shared)
        return {"loss_fn": closure(shared), "model": model, "extras": {"noise": shared}}

    assert_resumes(make, tmp_path)


def test_a_step_fn_with_a_generator_resumes_exactly(tmp_path):
    from manualloop import apply_update

    def make():
        rng = random.Random(8)

        def step_fn(state, batches, strategy):
            loss = lambda model, batch: square(model, batch, rng.random())  # noqa: E731
            return apply_update(state, batches, strategy, loss_fn=loss)

        return {"loss_fn": None, "step_fn": step_fn}

    assert_resumes(make, tmp_path)


def test_a_generator_of_the_evaluation_is_restored_and_left_alone_by_evaluate_loop(tmp_path):
    seen = []

    def make():
        rng, model = random.Random(5), nn.Linear(3, 1)

        def own():
            seen.append(rng.random())
            return {"draw": seen[-1]}

        return {"loss_fn": square, "model": model, "evaluate": own, "evaluate_every": 1}

    run(**make())
    whole, seen[:] = list(seen), []
    run(**make(), folder=tmp_path, stop_after=4)
    seen[3:] = []  # after the checkpoint
    run(**make(), folder=tmp_path)
    assert seen == whole


def test_evaluating_in_between_draws_nothing_from_shared_generators():
    def train(evaluates):
        torch.manual_seed(0)
        shared, model = torch.Generator().manual_seed(4), nn.Linear(3, 1)
        loss_fn = closure(shared)
        evaluate = lambda: evaluate_loop(model, BATCHES, loss_fn=loss_fn)  # noqa: E731
        return run(loss_fn, model=model, evaluate=evaluate if evaluates else None)

    assert all(map(torch.equal, train(True), train(False)))


def test_level_2_by_hand(tmp_path):
    def state_of(kind):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TrainState(
            model, optimizer, extras={"noise": KINDS[kind](), "more": KINDS["numpy"]()}
        )

    def train(state, loss_fn, until=8):
        for step in train_steps(state, BATCHES, num_epochs=2, loss_fn=loss_fn):
            draw(state.extras["noise"])
            if step.index == until:
                break

    whole, loss_fn = state_of("python"), closure(random.Random(1))
    train(whole, loss_fn)
    state, loss_fn = state_of("python"), closure(random.Random(1))
    train(state, loss_fn, until=3)
    save_checkpoint(tmp_path, state)
    train(state, loss_fn, until=5)  # not saved
    load_checkpoint(tmp_path, state)
    save_checkpoint(tmp_path / "again", state)  # what waits for its holder is saved again
    resumed = state_of("python")
    load_checkpoint(tmp_path / "again", resumed)
    drawn = draw(resumed.extras["more"])  # the user's own draws after the load are not undone
    train(resumed, closure(random.Random(1)))
    assert torch.equal(whole.model.weight, resumed.model.weight)
    assert draw(whole.extras["noise"]) == draw(resumed.extras["noise"])
    assert [draw(whole.extras["more"]), draw(whole.extras["more"])] == [
        drawn,
        draw(resumed.extras["more"]),
    ]


def test_the_state_dict_of_a_state_has_the_generators_among_its_extras():
    def state_with(generator):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TrainState(model, optimizer, extras={"noise": generator})

    one, other = random.Random(1), random.Random(2)
    state_with(other).load_state_dict(state_with(one).state_dict())
    assert one.random() == other.random()


def test_what_cannot_be_saved_or_restored_is_printed(tmp_path, caplog):
    caplog.set_level("INFO", logger="manualloop")
    rng = random.SystemRandom()
    run(lambda model, batch: square(model, batch, 0 * rng.random()))
    line = "a resumed run will draw other random numbers at loss_fn.__closure__.rng: it draws from"
    assert sum(line in message for message in caplog.messages) == 1
    run(closure(random.Random(1)), folder=tmp_path, stop_after=4)
    caplog.clear()
    run(closure(np.random.default_rng(1)), folder=tmp_path, stop_after=7)
    assert any("not bit-exact" in m and "random.Random" in m for m in caplog.messages)
    caplog.clear()
    run(method(np.random.default_rng(1)), folder=tmp_path)
    unknown = [m for m in caplog.messages if "not bit-exact" in m and "generator " in m]
    assert len(unknown) == 2
    assert any("generator was not restored: it is not there" in m for m in unknown)
    assert any("has no state of the generator loss_fn.__self__.parts" in m for m in unknown)


def test_nothing_is_printed_of_a_run_that_resumes_exactly(tmp_path, caplog):
    caplog.set_level("INFO", logger="manualloop")
    run(closure(random.Random(1)), folder=tmp_path, stop_after=4)
    run(closure(random.Random(1)), folder=tmp_path)
    assert not [m for m in caplog.messages if "exact" in m or "random" in m]


def test_a_second_run_in_the_process_goes_on_with_the_generator_as_it_is():
    rng = random.Random(1)
    first, second = run(closure(rng)), run(closure(rng))
    expected = random.Random(1)
    assert all(map(torch.equal, first, run(closure(expected))))
    assert all(map(torch.equal, second, run(closure(expected))))


SCRIPT = """
import random, torch
from torch import nn
from manualloop import train_loop
rng = random.Random(7)
def loss_fn(model, batch):
    return (model(batch["x"]) * rng.random()).square().mean()
torch.manual_seed(0)
model = nn.Linear(3, 1)
batches = [{"x": torch.full((2, 3), i / 8)} for i in range(6)]
def on_step(step):
    if step.index == stop_after:
        raise KeyError
train_loop(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=1,
           loss_fn=loss_fn, on_step=on_step, checkpoint_dir=folder, checkpoint_every=2,
           progress_bar=False)
weight, drawn = model.weight.tolist(), rng.random()
"""


def test_a_script_with_a_generator_among_its_variables_resumes(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)

    def run_script(folder, stop_after):
        names = {"folder": tmp_path / folder, "stop_after": stop_after}
        found = runpy.run_path(str(tmp_path / "train.py"), names, run_name="__main__")
        return found["weight"], found["drawn"]

    whole = run_script("whole", 0)
    with pytest.raises(KeyError):
        run_script("resumed", 4)
    assert run_script("resumed", 0) == whole


class NoisyRows(Dataset):
    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"x": torch.full((3,), row / 8) + draw(self.generator)}


@pytest.mark.parametrize("stop_after", [3, 4, 5])
def test_a_generator_shared_by_sampler_rows_and_loss_is_restored_once(tmp_path, stop_after):
    def train(stop=None, folder=None):
        shared = torch.Generator().manual_seed(5)
        loader = DataLoader(NoisyRows(shared), 2, shuffle=True, generator=shared)
        options = {"batches": loader, "folder": folder, "stop_after": stop}
        return run(closure(shared), **options, checkpoint_every=1)

    whole = train()
    train(stop_after, tmp_path)
    assert all(map(torch.equal, whole, train(folder=tmp_path)))


def test_a_generator_shared_with_a_loader_that_reads_ahead_is_printed(caplog):
    caplog.set_level("INFO", logger="manualloop")
    shared = torch.Generator().manual_seed(5)
    loader = DataLoader(BATCHES, None, shuffle=True, generator=shared, num_workers=1)
    run(closure(shared), batches=loader)
    assert sum("loss_fn.__closure__.generator: the loader" in m for m in caplog.messages) == 1
