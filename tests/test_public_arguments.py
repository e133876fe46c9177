"""No argument of a public function can be forgotten: each gets values that cannot be meant.

The test is generated over the signatures. An argument that is new fails it until its calls are
described here, and until the function refuses what cannot be meant.
"""

import inspect
import math
from functools import cache

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import manualloop
from manualloop import ManualLoopError, SingleDevice, TrainState

FUNCTIONS = [name for name in manualloop.__all__ if inspect.isfunction(getattr(manualloop, name))]
ARGUMENTS = [
    (name, argument.name)
    for name in FUNCTIONS
    for argument in inspect.signature(getattr(manualloop, name)).parameters.values()
    if argument.kind is not argument.VAR_KEYWORD
]

WRONG = {
    "text": "no such thing",
    "object": object(),
    "nan": math.nan,
    "True": True,
    "-1": -1,
    "0.5": 0.5,
    "list": [object()],
    "function": lambda *args, **kwargs: None,
    "bytes": b"bytes",
}

COUNT, NUMBER, FLAG, FUNCTION, NOTHING = {"2"}, {"2", "0.5"}, {"True"}, {"function"}, set()
PATH = {"text"}
# Which of the values are meant, by the name of the argument; or by that of the function, too.
MEANT = {
    "a": PATH,
    "args": {"list"},
    "at": COUNT,
    "b": PATH,
    "batch_size": COUNT,
    "batches": {"list"},
    "count_items.batch": {"list"},  # rows of any kind
    "best_metric": {"text"},
    "betas": NOTHING,
    "checkpoint_dir": PATH,
    "dataloader": {"list"},
    "eval_dataloader": {"list"},
    "fill": NOTHING,
    "loader": {"list"},
    "loaders": {"list"},
    "num_steps": COUNT,
    "terms": FUNCTION,
    "train_dataloader": {"list"},
    "inspect_batch.tokenizer": {"bytes"},  # which have a decode()
    "which": NOTHING,
    "checkpoint_every": COUNT,
    "collate_fn": FUNCTION,
    "compile": FLAG,
    "compare_predictions.a": NOTHING,
    "compare_predictions.b": NOTHING,
    "compare_predictions.metric": FUNCTION,
    "confidence": {"0.5"},
    "config": {"text"},
    "decode": FUNCTION,
    "drop_last": FLAG,
    "eps": NUMBER,
    "eval_batch_size": COUNT,
    "evaluate": FUNCTION,
    "evaluate_every": COUNT,
    "extras": NOTHING,
    "function": FUNCTION,
    "fused": FLAG,
    "gradient_accumulation_steps": COUNT,
    "group_by_length": FLAG,
    "keep": COUNT,
    "keep_checkpoints": COUNT,
    "label_column": {"text"},
    "log_every": COUNT,
    "loss_fn": FUNCTION,
    "lr": NUMBER,
    "lr_scheduler": NOTHING,
    "max_grad_norm": NUMBER,
    "max_length": COUNT,
    "max_steps": COUNT,
    "max_time": NUMBER,
    "max_tokens": COUNT,
    "metric": FUNCTION | {"list"},
    "metrics": NOTHING,
    "load_metric.config": {"text"},
    "num_epochs": COUNT,
    "num_processes": COUNT,
    "num_training_steps": COUNT,
    "num_warmup_steps": NUMBER,
    "num_workers": COUNT,
    "on_step": FUNCTION,
    "pad_to_multiple_of": COUNT,
    "param_groups": NOTHING,
    "patience": COUNT,
    "pin_memory": FLAG,
    "postprocess": FUNCTION,
    "preflight": FLAG,
    "preprocess": FUNCTION,
    "progress_bar": FLAG,
    "resume": FLAG,
    "seed": COUNT | {"-1"},
    "size": COUNT,
    "skip": COUNT,
    "step_fn": FUNCTION,
    "timeout": NUMBER,
    "train_fn": FUNCTION,
    "use_port": COUNT,
    "verify": FLAG,
    "weight_decay": NUMBER,
    "base_model": {"text"},
    "dataset": {"text"},
    "folder": PATH,
    "language": {"text"},
    "license": {"text"},
    "path": PATH,
    "result": NOTHING,
    "rows": {"list"},
    "write_report.predictions": NOTHING,
}


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


def batch():
    return {"x": torch.ones(2, 1), "labels": torch.zeros(2, 1)}


def predictions():
    return manualloop.predict_loop(Scores(), [{"x": torch.eye(3), "labels": torch.arange(3)}])


def model_and_optimizer():
    model = nn.Linear(1, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def own():
    return {"loss_fn": loss_fn, "strategy": SingleDevice("cpu")}


def training():
    model, optimizer = model_and_optimizer()
    return {"model": model, "optimizer": optimizer, "num_epochs": 1, **own()}


def state():
    return TrainState(*model_and_optimizer())


def rows():
    return Dataset.from_dict({"x": [1.0] * 4, "labels": [0] * 4})


CALLS = {  # a call of each public function that is right, as keywords; made anew for each value
    "accumulate_gradients": lambda _: {"model": nn.Linear(1, 1), "batches": [batch()], **own()},
    "apply_update": lambda _: {"state": state(), "batches": [batch()], **own()},
    "check_accumulation": lambda _: {"model": nn.Linear(1, 1), "batch": batch(), **own()},
    "compare_predictions": lambda _: {
        "a": predictions(),
        "b": predictions(),
        "metric": "accuracy",
    },
    "compare_runs": lambda folder: {"a": folder / "a", "b": folder / "b"},
    "count_items": lambda _: {"model": nn.Linear(1, 1), "batch": batch()},
    "eject": lambda _: {
        "arguments": (nn.Linear(1, 1), [batch()] * 3),
        **own(),
        "num_epochs": 1,
    },
    "evaluate_loop": lambda _: {
        "model": nn.Linear(1, 1),
        "eval_dataloader": [batch()],
        **own(),
    },
    "find_checkpoint": lambda folder: {"checkpoint_dir": folder / "saved"},
    "inspect_batch": lambda _: {"loader": [batch()]},
    "launch": lambda _: {"function": print, "num_processes": 1},
    "load_checkpoint": lambda folder: {"checkpoint_dir": folder / "saved", "state": state()},
    "load_metric": lambda _: {"name": "accuracy"},
    "plot_history": lambda _: {"results": (trained(), trained())},
    "predict_loop": lambda _: {"model": Scores(), "dataloader": [{"x": torch.ones(2, 3)}]},
    "preflight": lambda _: {"loaders": [batch()] * 3, **training()},
    "prepare_dataloaders": lambda _: {"datasets": {"train": rows()}},
    "prepare_optimizer": lambda _: {"model": nn.Linear(1, 1)},
    "prepare_scheduler": lambda _: {
        "optimizer": model_and_optimizer()[1],
        "num_training_steps": 10,
    },
    "prepare_strategy": lambda _: {"spec": "cpu"},
    "save_checkpoint": lambda folder: {"checkpoint_dir": folder / "new", "state": state()},
    "train_loop": lambda _: {
        "train_dataloader": [batch()] * 3,
        "progress_bar": False,
        **training(),
    },
    "train_steps": lambda _: {
        "state": state(),
        "train_dataloader": [batch()] * 3,
        "num_epochs": 1,
        **own(),
    },
    "verify_resume": lambda _: {"train_fn": print, "at": 1},
    "windows": lambda _: {"loader": [batch()] * 3, "size": 2},
    "write_model_card": lambda folder: {"result": trained(), "folder": folder / "card"},
    "write_report": lambda folder: {"result": trained(), "path": folder / "report.html"},
}


@cache
def trained():
    return manualloop.train_loop(
        nn.Linear(1, 1), [batch()], loss_fn=loss_fn, num_epochs=1, progress_bar=False
    )


class Scores(nn.Module):
    def forward(self, x):
        return {"logits": x}


# What an argument needs beside it to be meant.
BESIDE = {
    "best_metric": {"evaluate": lambda: {"no such thing": 1.0}},
    "max_steps": {"num_epochs": None},
    "patience": {"evaluate": lambda: {"f1": 1.0}, "best_metric": "f1"},
    "step_fn": {"loss_fn": None},
    "terms": {"loss_fn": None},
}


def call(function, options):
    called = getattr(manualloop, function)
    positional = ()
    for name, parameter in inspect.signature(called).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            given = options.pop(name)
            positional = given if isinstance(given, tuple) else (given,)
    result = called(*positional, **options)
    if inspect.isgenerator(result):
        next(result)  # what is not checked at the call comes with the first step
        result.close()
    return result


def options_of(function, argument, value, folder):
    options = CALLS[function](folder)
    signature = inspect.signature(getattr(manualloop, function))
    beside = {k: v for k, v in BESIDE.get(argument, {}).items() if k in signature.parameters}
    return {**options, **beside, argument: value}


def is_meant(function, argument, name):
    return name in MEANT.get(f"{function}.{argument}", MEANT.get(argument, NOTHING))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    model, optimizer = model_and_optimizer()
    manualloop.save_checkpoint(folder / "saved", TrainState(model, optimizer))
    trained()  # before updates are counted
    return folder


def test_every_function_has_a_call():
    assert sorted(CALLS) == FUNCTIONS


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_what_cannot_be_meant_is_refused(function, argument, folder, monkeypatch):
    monkeypatch.chdir(folder)
    updates, wrong = [], []
    hook = register_optimizer_step_pre_hook(lambda *args: updates.append(args))
    before = sorted(folder.rglob("*"))
    try:
        for name, value in WRONG.items():
            if is_meant(function, argument, name):
                continue
            try:
                call(function, options_of(function, argument, value, folder))
                wrong.append(f"{name} is taken")
            except ManualLoopError as error:
                if not str(error):
                    wrong.append(f"{name}: no message")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}"[:120])
    finally:
        hook.remove()
    assert wrong == []
    assert updates == []
    assert sorted(folder.rglob("*")) == before
