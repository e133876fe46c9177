"""A run that is stopped after any step resumes from disk to the same bits, with any loader."""

import random
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from resume_cases import NUM_ROWS, PLAIN, WORKERS, DataLoader, Rows, built, prepared
from transformers.trainer_pt_utils import LengthGroupedSampler

from manualloop import SingleDevice, TrainState, prepare_scheduler, train_loop, train_steps

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

# Of all that read with workers; the others are left to the exhaustive tests.
CHOSEN = [f"{name}, 2 workers" for name in ("built, draws", "built, by worker", "stream")]
CHOSEN += [f"{name}, persistent" for name in CHOSEN]
CHOSEN += [f"prepared, {name}, 2 workers" for name in ("draws", "grouped by length")]
CHOSEN += ["prepared, draws, 2 workers, persistent", "arrow stream, 2 workers"]


class StoppedError(Exception):
    pass


def seed_all(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def new_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))


class Trained:
    """One process's part of a run: what it used, and what it ended with.

    Args:
        make: A function that returns the loader.
        folder: The folder of the checkpoints.
        stop_after: The update after which it ends with an exception.
        copied: Updates after whose checkpoint the folder is copied, as a kill would leave it.
        seed: The seed of the global generators.
        changes: Other arguments of train_loop.
    """

    def __init__(self, make, folder, *, stop_after=None, copied=(), seed=1, **changes):
        self.ids, self.result, self.losses = [], None, []
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        loader = make()
        seed_all(seed)  # after a resume it must not matter

        def loss_fn(model, batch):
            self.ids.append(batch["id"].tolist())
            return model(batch["x"]).square().mean()

        def on_step(step):
            self.losses.append(float(step.loss))
            # The checkpoint of this update has not been made: the newest is that of the one before.
            if step.index - 1 in copied:
                shutil.copytree(folder, f"{folder}-{step.index - 1}")
            if step.index == stop_after:
                raise StoppedError

        def evaluate():
            return {"weight": model[0].weight.sum().item(), "drawn": torch.rand(()).item()}

        options = {
            "gradient_accumulation_steps": 3,
            "log_every": 4,
            "evaluate": evaluate,
            "evaluate_every": 2,
            "checkpoint_every": 1,
            **({"num_epochs": 2} if hasattr(loader, "__len__") and has_length(loader) else {}),
        }
        options = options if "num_epochs" in options else {**options, "max_steps": 6}
        with suppress(StoppedError):
            self.result = train_loop(
                model,
                loader,
                optimizer,
                loss_fn=loss_fn,
                strategy=SingleDevice("cpu"),
                checkpoint_dir=folder,
                on_step=on_step,
                progress_bar=False,
                **{**options, **changes},
            )

    def end(self):
        """Everything that must be equal, in a form that compares to the bit."""
        state = self.result.state
        tensors = {name: t.numpy().tobytes() for name, t in state.model.state_dict().items()}
        moments = [
            {name: value.numpy().tobytes() for name, value in entry.items()}
            for entry in state.optimizer.state_dict()["state"].values()
        ]
        schedule = state.lr_scheduler.state_dict()
        drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
        history = repr(self.result.history), repr(self.result.metrics)
        return tensors, moments, schedule, state.progress, history, drawn


def has_length(loader):
    try:
        len(loader)
    except TypeError:
        return False
    return True


def check_cuts(make, tmp_path, cuts):
    """A run that is killed after an update, and then resumed, is the run that was not killed."""
    whole = Trained(make, tmp_path / "run", copied=cuts)
    num_steps = whole.result.state.progress.num_steps
    assert num_steps == 6, "two epochs of seven batches: windows of three, three and one"
    expected = whole.end()
    for cut in cuts:
        second = Trained(make, tmp_path / f"run-{cut}", seed=1000 + cut)
        used = [0, 3, 6, 7, 10, 13][cut]
        if len(whole.ids) == 14:
            assert second.ids == whole.ids[used:], f"cut after step {cut}"
        assert second.losses == whole.losses[cut:], f"cut after step {cut}"
        assert second.end() == expected, f"cut after step {cut}"


@pytest.mark.parametrize("name", PLAIN)
def test_cut_points(name, cuts, tmp_path):
    check_cuts(PLAIN[name], tmp_path, cuts)


@pytest.mark.parametrize("name", ["prepared, draws", "built, draws", "grouped", "stream"])
def test_the_other_cut_points(name, tmp_path):
    check_cuts(PLAIN[name], tmp_path, (1, 2, 5))


@pytest.mark.parametrize("name", CHOSEN)
def test_a_cut_point_with_workers(name, tmp_path):
    check_cuts(WORKERS[name], tmp_path, (4,))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WORKERS)
def test_every_cut_point_with_workers(name, tmp_path):
    check_cuts(WORKERS[name], tmp_path, (1, 2, 3, 4, 5))


def test_cut_points_of_the_length_grouped_sampler_of_transformers(cuts, tmp_path):
    def make():
        lengths = [1 + (5 * row) % 7 for row in range(NUM_ROWS)]
        return built(sampler=LengthGroupedSampler(2, lengths=lengths), shuffle=None)

    check_cuts(make, tmp_path, cuts)


@pytest.mark.parametrize("name", [*PLAIN, "prepared, draws, 2 workers", "built, draws, 2 workers"])
def test_leaving_the_loop_and_entering_it_again_is_the_same_run(name):
    make = {**PLAIN, **WORKERS}[name]

    def run(cuts):
        loader, ids = make(), []
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        state = TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=6))

        def loss_fn(model, batch):
            ids.append(batch["id"].tolist())
            return model(batch["x"]).square().mean()

        seed_all(1)
        for stop in [*cuts, None]:
            for step in train_steps(
                state,
                loader,
                max_steps=6,
                gradient_accumulation_steps=3,
                loss_fn=loss_fn,
                strategy=SingleDevice("cpu"),
            ):
                if step.index == stop:
                    break
        return ids, [weight.tolist() for weight in model.parameters()]

    expected = run([])
    assert name in WORKERS or run([1, 2, 3, 4, 5]) == expected
    assert run([2, 5]) == expected


@pytest.mark.parametrize("make", [prepared, built], ids=["prepared", "built"])
def test_rows_that_were_used_are_never_loaded(make, tmp_path):
    loaders = []

    def made():
        loaders.append(make())
        return loaders[-1]

    whole = Trained(made, tmp_path / "whole")
    first = Trained(made, tmp_path / "cut", stop_after=3)
    second = Trained(made, tmp_path / "cut")
    rows = [row for ids in whole.ids for row in ids]
    assert loaders[0].dataset.loaded == rows
    assert loaders[2].dataset.loaded == rows[12:], "after two windows of six rows"
    assert first.ids[:6] + second.ids == whole.ids


@pytest.mark.parametrize("name", ["prepared, draws", "built, draws", "stream"])
def test_several_resumes_in_one_epoch_and_in_the_next(name, tmp_path):
    whole = Trained(PLAIN[name], tmp_path / "whole")
    expected = whole.end()
    for stop in (2, 3, 5, 6):
        Trained(PLAIN[name], tmp_path / "cut", stop_after=stop, seed=1 if stop == 2 else stop)
    last = Trained(PLAIN[name], tmp_path / "cut", seed=77)
    assert last.end() == expected


@pytest.mark.parametrize("name", ["prepared", "built", "stream", "list"])
def test_a_finished_run_returns_at_once_and_trains_nothing(name, tmp_path):
    whole = Trained(PLAIN[name], tmp_path)
    again = Trained(PLAIN[name], tmp_path)
    assert again.ids == []
    assert again.result.stopped_by == whole.result.stopped_by
    assert again.result.history == whole.result.history
    assert again.result.metrics == whole.result.metrics
    weights = [run.result.state.model.state_dict().values() for run in (whole, again)]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("make", [prepared, built], ids=["prepared", "built"])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_with_another_batch_size_the_rows_of_the_epoch_are_still_used_once(
    make, batch_size, tmp_path, caplog
):
    first = Trained(make, tmp_path, stop_after=3, num_epochs=1, gradient_accumulation_steps=2)

    def other():
        loader = make()
        if make is prepared:
            loader.batch_sampler.batch_size = batch_size
            return loader
        return built(batch_size=batch_size)

    with caplog.at_level("INFO", logger="manualloop"):
        second = Trained(other, tmp_path, num_epochs=1, gradient_accumulation_steps=2)
    used = [row for ids in first.ids[:4] + second.ids for row in ids]
    assert sorted(used) == list(range(NUM_ROWS))
    assert f"not bit-exact, because batch_size: 2 -> {batch_size}" in caplog.text


@pytest.mark.parametrize("make", [prepared, built], ids=["prepared", "built"])
def test_two_changes_of_the_batch_size_in_one_epoch_lose_no_row_either(make, tmp_path):
    ids = []
    for batch_size, stop_after in ((2, 3), (3, 4), (1, 6), (4, None)):

        def sized(batch_size=batch_size):
            loader = make()
            if make is prepared:
                loader.batch_sampler.batch_size = batch_size
                return loader
            return built(batch_size=batch_size)

        options = {"num_epochs": 1, "gradient_accumulation_steps": 1, "log_every": 1}
        part = Trained(sized, tmp_path, stop_after=stop_after, **options)
        ids += part.ids[: -1 if stop_after else None]  # the last one's checkpoint was not made
    rows = [row for batch in ids for row in batch]
    assert sorted(rows) == list(range(NUM_ROWS))


def test_the_best_evaluation_and_patience_last_over_a_resume(tmp_path):
    values = [0.5, 0.9, 0.7, 0.8, 0.6, 0.4]

    def run(folder, stop_after=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        step = {"index": 0}

        def on_step(s):
            step["index"] = s.index
            if s.index == stop_after:
                raise StoppedError

        try:
            return train_loop(
                model,
                [torch.ones(2, 1)] * 6,
                torch.optim.SGD(model.parameters(), lr=0.1),
                num_epochs=1,
                loss_fn=lambda model, batch: model(batch).square().mean(),
                evaluate=lambda: {"score": values[step["index"] - 1]},
                evaluate_every=1,
                best_metric="score",
                patience=3,
                checkpoint_dir=folder,
                checkpoint_every=1,
                on_step=on_step,
                progress_bar=False,
            )
        except StoppedError:
            return None

    whole = run(tmp_path / "whole")
    assert whole.stopped_by == "patience"
    assert whole.best_metrics == {"score": 0.9}
    assert whole.state.progress.num_steps == 5
    for stop in (2, 3, 4, 5):
        run(tmp_path / str(stop), stop_after=stop)
        result = run(tmp_path / str(stop))
        assert (result.stopped_by, result.best_metrics) == ("patience", {"score": 0.9})
        assert result.history == whole.history
        assert run(tmp_path / str(stop)).stopped_by == "patience"


def test_an_evaluation_that_fails_costs_no_update_and_is_made_first_the_next_time(tmp_path):
    whole = Trained(PLAIN["built, draws"], tmp_path / "whole")
    expected = whole.end()

    def fail():
        raise ZeroDivisionError("no such metric")

    with pytest.raises(ZeroDivisionError):
        Trained(PLAIN["built, draws"], tmp_path / "cut", evaluate=fail, checkpoint_every=5)
    assert (tmp_path / "cut" / "step-00000002").is_dir()
    second = Trained(PLAIN["built, draws"], tmp_path / "cut", seed=5)
    assert second.losses == whole.losses[2:]
    assert second.end() == expected


@pytest.mark.parametrize("log_every", [1, 2, 3, 100])
def test_the_history_of_a_resumed_run_is_that_of_an_undisturbed_one(log_every, tmp_path):
    whole = Trained(PLAIN["built"], tmp_path / "whole", log_every=log_every, max_grad_norm=0.1)
    for stop in (2, 5):
        options = {"log_every": log_every, "max_grad_norm": 0.1}
        Trained(PLAIN["built"], tmp_path / str(stop), stop_after=stop, **options)
        second = Trained(PLAIN["built"], tmp_path / str(stop), **options)
        assert second.result.history == whole.result.history
        frame = second.result.to_pandas()
        assert list(frame["step"]) == [record["step"] for record in whole.result.history]


def test_a_stream_without_a_state_that_draws_says_that_it_is_not_exact(tmp_path, caplog):
    from resume_cases import StatelessStream

    def make():
        return DataLoader(StatelessStream(draws=True), 2)

    Trained(make, tmp_path, stop_after=2)
    with caplog.at_level("INFO", logger="manualloop"):
        Trained(make, tmp_path)
    assert "not bit-exact, because this data draws random numbers" in caplog.text
    assert "has neither a sampler nor a state_dict()" in caplog.text


def test_a_shuffle_buffer_says_at_the_start_and_at_a_resume_that_it_is_lost(tmp_path, caplog):
    from datasets import Dataset

    def make():
        rows = [{"x": x.tolist(), "id": i} for i, x in enumerate(Rows().x)]
        stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
        return DataLoader(stream.shuffle(seed=1, buffer_size=5).with_format("torch"), 2)

    with caplog.at_level("INFO", logger="manualloop"):
        Trained(make, tmp_path, stop_after=2)
        assert "shuffle buffer" in caplog.text
        assert "not bit-exact" in caplog.text
        caplog.clear()
        Trained(make, tmp_path)
    assert "what was in the stream's shuffle buffer is lost" in caplog.text


def test_a_sampler_that_draws_as_it_goes_says_that_it_is_not_exact(tmp_path, caplog):
    class Drawing(torch.utils.data.Sampler):
        def __len__(self):
            return NUM_ROWS

        def __iter__(self):
            for _ in range(NUM_ROWS):
                yield int(torch.randint(NUM_ROWS, ()))

    def make():
        return built(sampler=Drawing(), shuffle=None)

    Trained(make, tmp_path, stop_after=3)
    with caplog.at_level("INFO", logger="manualloop"):
        Trained(make, tmp_path)
    assert "the sampler draws from the global random generator as it goes" in caplog.text
