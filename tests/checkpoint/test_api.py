"""save_checkpoint and load_checkpoint, called by the user in a loop of their own."""

import json
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import manualloop
from manualloop import (
    Accelerated,
    CheckpointError,
    ConfigError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    save_checkpoint,
    train_steps,
)

CPU = SingleDevice("cpu")


def new_state(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    head = torch.optim.SGD(model[2].parameters(), lr=0.01, momentum=0.9)
    return TrainState(
        model,
        optimizer,
        prepare_scheduler(optimizer, num_training_steps=8),
        extras={"ema": AveragedModel(model), "second": head},
    )


def test_the_manifest_names_the_release(tmp_path):
    state = new_state()
    folder = save_checkpoint(tmp_path, state)
    assert json.loads((folder / "manifest.json").read_text())["release"] == manualloop.__version__


def test_the_version_is_that_of_the_project():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{manualloop.__version__}"\n' in project


def batches():
    return list(torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(2)))


def loss_fn(model, batch):
    return model(torch.nn.functional.dropout(batch, 0.2)).square().mean()


def train(state, folder=None, stop_after=None, **options):
    for step in train_steps(state, batches(), num_epochs=1, loss_fn=loss_fn, strategy=CPU):
        state.extras["ema"].update_parameters(state.model)
        state.extras["second"].step()
        if folder is not None:
            metrics = {"score": -abs(step.index - 3)}
            save_checkpoint(folder, state, metrics=metrics, best_metric="score", **options)
        if step.index == stop_after:
            break
    return state


def flat(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value.tolist()}
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), name)
    return {name: value}


@pytest.mark.parametrize("cut", range(1, 8))
def test_model_optimizers_schedule_and_average_go_on_to_the_same_bits(cut, tmp_path):
    whole = train(new_state(), tmp_path / "whole")
    train(new_state(), tmp_path / "cut", stop_after=cut)
    state = new_state(seed=5)
    info = load_checkpoint(tmp_path / "cut", state)
    assert info.step == state.progress.num_steps == cut
    assert info.metrics == {"score": -abs(cut - 3)}
    assert info.path == tmp_path / "cut" / f"step-{cut:08}"
    train(state, tmp_path / "cut")
    assert flat(state.state_dict()) == flat(whole.state_dict())


def test_the_best_the_last_and_any_folder_can_be_loaded(tmp_path):
    train(new_state(), tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000007",
        "step-00000008",
    ]
    for which, step in (
        ("best", 3),
        ("last", 8),
        ("step-00000007", 7),
        (tmp_path / "step-00000003", 3),
    ):
        assert load_checkpoint(tmp_path, new_state(), which=which).step == step


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        load_checkpoint(tmp_path / "no", new_state())
    with pytest.raises(CheckpointError, match="was saved with a best_metric"):
        load_checkpoint(tmp_path, new_state(), which="best")
    with pytest.raises(CheckpointError, match=r"step-00000009 cannot be used: no manifest\.json"):
        load_checkpoint(tmp_path, new_state(), which="step-00000009")
    with pytest.raises(ConfigError, match="keep must be a whole number of at least 1"):
        save_checkpoint(tmp_path, new_state(), keep=0)
    save_checkpoint(tmp_path, new_state(), metrics={"f1": 0.5}, best_metric="score")
    with pytest.raises(CheckpointError, match="was saved with a best_metric"):
        load_checkpoint(tmp_path, new_state(), which="best")


def test_a_state_that_is_being_trained_is_not_loaded_into(tmp_path):
    state = new_state()
    save_checkpoint(tmp_path, state)
    steps = train_steps(state, batches(), num_epochs=1, loss_fn=loss_fn, strategy=CPU)
    next(steps)
    with pytest.raises(ConfigError, match="A train_steps is open on this state"):
        load_checkpoint(tmp_path, state)
    steps.close()
    assert load_checkpoint(tmp_path, state).step == 0


def test_nothing_is_saved_after_a_loss_that_was_not_finite(tmp_path):
    state = new_state()
    state.has_failed = torch.tensor(True)  # as an accelerator leaves it
    with pytest.raises(CheckpointError, match="The loss was not finite some updates ago"):
        save_checkpoint(tmp_path, state)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_holds_an_object_is_refused_by_name(tmp_path):
    class Odd:
        def state_dict(self):
            return {"inner": [object()]}

        def load_state_dict(self, state):
            pass

    state = new_state()
    state.extras["odd"] = Odd()
    with pytest.raises(CheckpointError, match=r"extras\.odd\.inner\.0 holds a object"):
        save_checkpoint(tmp_path, state)
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    state = new_state()
    plain = state.model
    state.model = torch.compile(plain, backend="eager")
    save_checkpoint(tmp_path, state, strategy=CPU)
    other = new_state(seed=9)
    load_checkpoint(tmp_path, other, strategy=CPU)
    assert flat(other.model.state_dict()) == flat(plain.state_dict())


def test_the_memory_limit_that_was_found_is_kept(tmp_path):
    state = new_state()
    state.max_batch_rows = 3
    save_checkpoint(tmp_path, state)
    other = new_state()
    load_checkpoint(tmp_path, other)
    assert other.max_batch_rows == 3


@pytest.mark.parametrize("cut", [3, 8])
def test_a_run_of_accelerate_goes_on_as_well(cut, tmp_path):
    from accelerate import Accelerator

    def run(folder, stop_after=None, resumes=False):
        strategy = Accelerated(Accelerator(cpu=True))
        state = new_state(seed=3 if resumes else 0)
        state.extras.clear()
        state.lr_scheduler = prepare_scheduler(state.optimizer, num_training_steps=16)
        if resumes:
            load_checkpoint(folder, state, strategy=strategy)
        for step in train_steps(state, batches(), num_epochs=2, loss_fn=loss_fn, strategy=strategy):
            save_checkpoint(folder, state, strategy=strategy)
            if step.index == stop_after:
                break
        return state

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_after=cut)
    assert flat(run(tmp_path / "cut", resumes=True).state_dict()) == flat(whole.state_dict())
