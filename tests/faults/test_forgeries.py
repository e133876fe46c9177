"""Checkpoints forged by somebody who knows the format: every value of every file, then training.

Whatever is changed, sizes and checksums are written anew, so that nothing but the content tells.
Each forgery must end in a CheckpointError that has changed nothing, or in a run that trains: a
number within its range may have been what was saved. Nothing may end in any other error.
"""

import copy
import hashlib
import json
import math
import random
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel

from manualloop import (
    CheckpointError,
    ManualLoopError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.checkpoint.manifest import manifest_bytes
from manualloop.data.sampler import ordered_loader

NUM_STEPS, CUT = 8, 5  # of four an epoch
CPU = SingleDevice("cpu")


class Count:
    """An extra that believes what it is given."""

    def __init__(self):
        self.count, self.best, self.names = 0, None, ["a"]

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class Dice:
    """A loss function that draws from generators of its own."""

    def __init__(self):
        self.numpy = np.random.default_rng(3)
        self.older = np.random.RandomState(3)
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(3)

    def __call__(self, model, batch):
        noise = self.numpy.normal() + self.older.normal() + self.python.gauss(0, 1)
        noise = noise + torch.randn((), generator=self.torch)
        return (model(batch["x"]).squeeze(1) - batch["labels"] + noise / 100).square().mean()


def loader_of(kind):
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    rows = [{"x": data[n], "labels": float(n)} for n in range(12)]
    if kind == "prepared":
        return ordered_loader(rows, "train", 3, shuffle=True, seed=1, drop_last=False)
    generator = torch.Generator().manual_seed(2)
    return torch.utils.data.DataLoader(rows, batch_size=3, shuffle=True, generator=generator)


def new_state():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = prepare_scheduler(optimizer, num_training_steps=NUM_STEPS)
    extras = {
        "ema": AveragedModel(model),
        "count": Count(),
        "head": torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9),
        "generator": torch.Generator().manual_seed(4),
    }
    return TrainState(model, optimizer, schedule, extras=extras)


def train_on(state, kind):
    steps = train_steps(
        state, loader_of(kind), num_epochs=2, loss_fn=Dice(), strategy=SingleDevice("cpu")
    )
    for step in steps:
        state.extras["ema"].update_parameters(state.model)
        state.extras["head"].step()
        state.extras["count"].count += 1
        yield step


@pytest.fixture(scope="module", params=["prepared", "built"])
def original(request, tmp_path_factory):
    """A folder with one checkpoint of each way to save: by hand, and by train_loop."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "kind").write_text(request.param)
    state = new_state()
    for step in train_on(state, request.param):
        if step.index == CUT:
            break
    save_checkpoint(folder / "by_hand", state, metrics={"loss": 0.5}, best_metric="-loss")
    with pytest.raises(InterruptedError):
        run(folder / "by_loop", request.param, stop_after=CUT)
    return folder


def run(folder, kind, stop_after=None):
    state = new_state()

    def on_step(step):
        if step.index == stop_after:
            raise InterruptedError

    return train_loop(
        state.model,
        loader_of(kind),
        state.optimizer,
        num_epochs=2,
        loss_fn=Dice(),
        extras=state.extras,
        evaluate=lambda: {"f1": 0.5},
        evaluate_every=3,
        best_metric="f1",
        checkpoint_dir=folder,
        checkpoint_every=1,
        log_every=2,
        on_step=on_step,
        progress_bar=False,
        strategy=SingleDevice("cpu"),
    )


def seal(checkpoint, manifest=None):
    """Write a manifest that fits the files, or one that was forged, as the library would."""
    path = checkpoint / "manifest.json"
    if manifest is None:
        manifest = json.loads(path.read_bytes())
        for name, entry in manifest["files"].items():
            data = (checkpoint / name).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(manifest_bytes(manifest))


def everything(state):
    """All of a state that loading may change, as text and tensors."""
    return copy.deepcopy((state.state_dict(), state.position, state.generators)), (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def load_and_train(folder, kind):
    """Return what becomes of a forged checkpoint: "refused", "trained", or what went wrong."""
    state = new_state()
    before = everything(state)
    try:
        load_checkpoint(folder, state, which=newest(folder), strategy=SingleDevice("cpu"))
    except CheckpointError:
        return "refused" if same(before, everything(state)) else "refused, and changed something"
    except Exception as error:
        return f"loading raised {type(error).__name__}: {error}"
    try:
        for step in train_on(state, kind):
            if not math.isfinite(step.loss):
                return "trained with a loss that is not finite"
            if step.index > 3 * NUM_STEPS:
                return "trained on and on"
    except ManualLoopError:
        return "refused by train_steps"
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        if '["count"].count += 1' in line:
            return "refused by the user's own code"
        return f"training raised {type(error).__name__}: {error} in {line}"
    return "trained"


def newest(folder):
    return max(folder.glob("step-*"))


def leaves(value, path=()):
    """The paths of all values in JSON; of a list of numbers the first, second and last."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        places = range(len(value)) if len(value) < 12 else (0, 1, len(value) - 1)
        for place in places:
            yield from leaves(value[place], (*path, place))


def at(value, path):
    for key in path:
        value = value[key]
    return value


REMOVED = object()
VALUES = [
    REMOVED,
    None,
    True,
    -1,
    0,
    2**40,
    10**40,
    0.5,
    -2.5,
    "text",
    [],
    {},
    ["float", "nan"],
    ["float", "inf"],
    ["tuple"],
    ["list", 1],
    ["tensor", "no such tensor"],
    ["tensor", "optimizer.state.0.exp_avg"],
    ["array", "rng.torch", "<f8"],
    ["dtype", "float32"],
    ["device", "cuda:77"],
    ["bytes", "AA=="],
    ["scalar", ["list", 1, 2], "<i8"],
    ["set", ["list"]],
]


def with_value(document, path, value):
    forged = copy.deepcopy(document)
    parent = at(forged, path[:-1])
    if value is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return forged


def forgeries(document, stride):
    """Every value of a document in place of every other kind; every so many of them."""
    every = [(path, value) for path in leaves(document) if path for value in VALUES]
    for number, (path, value) in enumerate(every):
        if number % stride == 0:
            yield path, value, with_value(document, path, value)


@pytest.fixture
def copied(original, tmp_path):
    def copied(way):
        folder = tmp_path / way
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original / way, folder)
        return folder

    return copied


STRIDES = [
    pytest.param(97, id="sample"),
    pytest.param(1, id="all", marks=pytest.mark.exhaustive),
]


def report(counts, wrong):
    print("outcomes:", dict(sorted(counts.items())))
    assert wrong == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
@pytest.mark.parametrize("way", ["by_hand", "by_loop"])
def test_f26_every_value_of_the_json(name, way, stride, original, copied):
    kind = (original / "kind").read_text()
    folder = copied(way)
    checkpoint = newest(folder)
    document = json.loads((checkpoint / name).read_bytes())
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    counts, wrong = {}, []
    stride = 3 * stride if way == "by_loop" and stride > 1 else stride  # its runs take long
    for path, value, forged in forgeries(document, stride):
        if name == "state.json":
            (checkpoint / name).write_text(json.dumps(forged))
            seal(checkpoint)
        else:
            seal(checkpoint, forged)
        outcome = (resume if way == "by_loop" else load_and_train)(folder, kind)
        counts[outcome] = counts.get(outcome, 0) + 1
        may_be = ["refused", "refused by train_steps", "trained"]
        # A number of an extra may have become None before it was saved: only the object knows.
        if path == ("extras.count", "count") and value is None:
            may_be.append("refused by the user's own code")
        if outcome not in may_be:
            wrong.append(f"{'.'.join(map(str, path))} = {value!r:.40}: {outcome:.200}")
        if name == "manifest.json":
            seal(checkpoint, manifest)
    report(counts, wrong)


def resume(folder, kind):
    """Resume with train_loop in a copy; return what becomes of it."""
    work = Path(f"{folder}-work")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    for older in sorted(work.glob("step-*"))[:-1]:
        shutil.rmtree(older)
    try:
        result = run(work, kind)
    except ManualLoopError:
        return "refused"
    except Exception as error:
        return f"train_loop raised {type(error).__name__}: {error}"
    values = [value for record in result.history for value in record.values()]
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        return "trained with numbers that are not finite"
    return "trained"


FOUND_BY_ALL = {  # which no sample had
    "state.json": [
        (("run", "evaluations", "best", "f1"), "text", "run.evaluations.best.f1 is 'text'"),
        (("run", "evaluations", "best", "f1"), None, "run.evaluations.best.f1 is None"),
        (("run", "evaluations", "best", "f1"), REMOVED, None),  # then there was no evaluation
        (
            ("lr_scheduler", "_last_lr", 1),
            ["scalar", ["list", 1, 2], "<i8"],
            "cannot be read: .'scalar'",
        ),
        (("run", "report", "interval", "total"), ["float", "nan"], "interval.total is nan"),
        (("run", "report", "since", "total"), ["float", "-inf"], "since.total is -inf"),
    ],
    "manifest.json": [
        (("contract", "ends", "num_steps"), REMOVED, None),
        (("contract", "ends", "num_steps"), None, None),
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOUND_BY_ALL)
def test_f26_values_that_no_sample_had(name, original, copied):
    kind = (original / "kind").read_text()
    for path, value, message in FOUND_BY_ALL[name]:
        folder = copied("by_loop")
        document = json.loads((newest(folder) / name).read_bytes())
        forged = with_value(document, path, value)
        if name == "state.json":
            (newest(folder) / name).write_text(json.dumps(forged))
            seal(newest(folder))
        else:
            seal(newest(folder), forged)
        assert resume(folder, kind) == ("trained" if message is None else "refused")
        if message is not None:
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(folder, new_state(), which=newest(folder), strategy=CPU)


def tensor_forgeries(tensors):
    """Every tensor of a file: of another shape, another dtype, another tensor's, missing, ..."""
    names = sorted(tensors)
    for name in names:
        tensor = tensors[name]
        others = [other for other in names if tensors[other].shape != tensor.shape]
        changes = {
            "removed": None,
            "flat": tensor.reshape(-1),
            "longer": torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
            "empty": tensor.reshape(-1)[:0],
            "in a list": tensor[None],
            "float64": tensor.double(),
            "int64": tensor.long(),
            "bool": tensor.bool(),
            "bfloat16": tensor.bfloat16(),
            "a byte": torch.zeros(1, dtype=torch.uint8),
        }
        if others:
            changes["another's"] = tensors[others[0]].clone()
        for change, value in changes.items():
            if value is not None and value.dtype == tensor.dtype and value.shape == tensor.shape:
                continue
            forged = dict(tensors)
            if value is None:
                del forged[name]
            else:
                forged[name] = value.contiguous()
            yield f"{name} {change}", forged
    yield "one more", {**tensors, "one more": torch.ones(3)}
    yield "other names", {f"{name}x": value for name, value in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("stem", ["model", "optimizer", "extras", "rng"])
def test_f26_every_tensor(stem, stride, original, copied):
    kind = (original / "kind").read_text()
    folder = copied("by_hand")
    checkpoint = newest(folder)
    path = checkpoint / f"{stem}.safetensors"
    tensors = load_file(path)
    counts, wrong = {}, []
    for number, (change, forged) in enumerate(tensor_forgeries(tensors)):
        if number % min(stride, 7):
            continue
        save_file(forged, path, metadata={"format": "pt"})
        seal(checkpoint)
        outcome = load_and_train(folder, kind)
        counts[outcome] = counts.get(outcome, 0) + 1
        allowed = ["refused"]
        may_train = ["one more"]
        if not change.endswith("exp_avg float64"):  # AdamW cannot mix it with the gradient
            may_train.append("float64")
        if "step" in change:
            may_train.append("int64")
        if change.endswith(tuple(may_train)) and stem != "model":
            allowed.append("trained")  # nothing asks for it; or a wider one is as good
        if outcome not in allowed:
            wrong.append(f"{change}: {outcome:.200}")
    report(counts, wrong)


@pytest.mark.filterwarnings("ignore")
def test_f26_a_position_behind_the_data(original, copied):
    """Both numbers agree, and are in range; only the data tells."""
    kind = (original / "kind").read_text()
    folder = copied("by_hand")
    checkpoint = newest(folder)
    document = json.loads((checkpoint / "state.json").read_bytes())
    for name in ("progress", "position"):
        document[name]["num_samples"] = 1000
    document["position"]["num_batches"] = 1000
    (checkpoint / "state.json").write_text(json.dumps(document))
    seal(checkpoint)
    assert load_and_train(folder, kind) == "refused by train_steps"
    assert resume(folder, kind) == "refused"


def with_other_lists(document):
    """Every list of a nest, one entry shorter and one longer."""
    for place in leaves(document):
        held = at(document, place)
        if place and isinstance(held, list | tuple) and len(held) > 0:
            for forged in (held[:-1], [*held, held[-1]]):
                yield place, with_value(document, place, type(held)(forged))


SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.5**step),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=NUM_STEPS),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 6]),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o), schedules.OneCycleLR(o, 0.1, total_steps=NUM_STEPS)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.StepLR(o, 2), schedules.ConstantLR(o)]
    ),
    "SWALR": lambda o: SWALR(o, 0.1),
    "one of the user's": lambda o: Remembering(o),
}


class Remembering(schedules.LRScheduler):
    """A schedule with a list that grows and one that shrinks."""

    def __init__(self, optimizer):
        self.seen, self.drops = [], [2, 4, 6]
        super().__init__(optimizer)

    def get_lr(self):
        self.seen.append(self.last_epoch)
        if self.drops and self.last_epoch >= self.drops[0]:
            self.drops.pop(0)
            return [group["lr"] / 2 for group in self.optimizer.param_groups]
        return [group["lr"] for group in self.optimizer.param_groups]


def scheduled_state(build):
    model = torch.nn.Linear(3, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    return TrainState(model, optimizer, build(optimizer))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_f26_lists_of_a_schedule_of_other_lengths(name, tmp_path):
    """A list of torch's own schedules has a fixed length; one of the user's may grow or shrink."""
    rows = loader_of("prepared")

    def train(state):
        def loss_fn(model, batch):
            return (model(batch["x"]).squeeze(1) - batch["labels"]).square().mean()

        strategy = SingleDevice("cpu")
        return train_steps(state, rows, num_epochs=2, loss_fn=loss_fn, strategy=strategy)

    state = scheduled_state(SCHEDULES[name])
    for step in train(state):
        if step.index == CUT:
            break
    save_checkpoint(tmp_path, state)
    resumed = scheduled_state(SCHEDULES[name])
    load_checkpoint(tmp_path, resumed, strategy=SingleDevice("cpu"))
    assert [step.index for step in train(resumed)] == [*range(CUT + 1, NUM_STEPS + 1)]

    path = newest(tmp_path) / "state.json"
    document = json.loads(path.read_bytes())
    own, wrong, num_refused = document["lr_scheduler"], [], 0
    for place, forged in with_other_lists(own):
        path.write_text(json.dumps({**document, "lr_scheduler": forged}))
        seal(path.parent)
        state = scheduled_state(SCHEDULES[name])
        before = everything(state)
        try:
            load_checkpoint(tmp_path, state, strategy=SingleDevice("cpu"))
            list(train(state))
            if place[0] not in ("seen", "drops", "milestones"):  # the last is a Counter
                wrong.append(f"{place}: trained")
        except CheckpointError:
            num_refused += 1
            assert same(before, everything(state))
        except Exception as error:
            wrong.append(f"{place}: {error!r}")
    assert wrong == []
    assert num_refused >= 2
