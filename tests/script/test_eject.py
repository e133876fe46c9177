"""A script that ``eject`` has written ends with the weights of ``train_loop``, to the last bit."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import helpers
import processes
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from manualloop import (
    ConfigError,
    SingleDevice,
    eject,
    evaluate_loop,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    train_loop,
)

SAVE = """

import os

torch.save({"model": model.state_dict(), "metrics": globals().get("metrics")}, os.environ["OUT"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer and rows of two sentences, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("eject")
    helpers.tiny_bert().save_pretrained(folder / "model")
    helpers.tiny_tokenizer().save_pretrained(folder / "model")
    rows = helpers.table_of(["sentence1", "sentence2"], 51)
    rows.to_parquet(folder / "data" / "train.parquet")
    rows.select(range(20)).to_parquet(folder / "data" / "validation.parquet")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    files = {name: str(folder / "data" / f"{name}.parquet") for name in ("train", "validation")}
    return load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))


def loaded(folder, kind=BertForSequenceClassification, **options):
    return kind.from_pretrained(folder / "model", num_labels=2, **options)


def call(folder, data, *, prepares=None, with_evaluation=False, **options):
    """Train by the call, and return its script beside its result."""
    torch.manual_seed(42)
    model = loaded(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loaders = prepare_dataloaders(data, tokenizer, model=model, **(prepares or {}))
    if with_evaluation:
        options["evaluate"] = partial(evaluate_loop, model, loaders["validation"], "glue/mrpc")
    arguments = model, loaders["train"], prepare_optimizer(model, lr=1e-3)
    options = {"progress_bar": False, **options}
    script = eject(*arguments, **options)
    return script, train_loop(*arguments, **options)


def filled(script, folder):
    """The script with the one line that only the user knows."""
    load = f'load_dataset("{folder / "data"}", cache_dir="{folder / "cache"}")'
    return script.replace('load_dataset("path/to/data")', load)


def run(script, path, **environment):
    """Run a script in a process of its own; return the weights that it ends with."""
    path.write_text(script + SAVE)
    out = path.with_suffix(".pt")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OUT": str(out)}
    done = processes.run(path, cwd=path.parent, env=env | environment)
    assert done.returncode == 0, done.output
    return torch.load(out)


def run_here(script, **names):
    """Run a script in this process, which costs nothing; lines marked FILL IN take the names."""
    for name in names:
        script = re.sub(rf"^{name} = .*$", "", script, flags=re.MULTILINE)
    names["__name__"] = "__main__"
    exec(compile(script, "script", "exec"), names)
    return names


def assert_same(theirs, result):
    ours = result.state.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


WRITTEN: list[str] = []
"""The scripts of this file, which are looked at together in its last test."""


def keep(script, num_lines=120):
    assert max(map(len, script.splitlines())) <= 88
    assert sum(bool(line.strip()) for line in script.splitlines()) <= num_lines
    WRITTEN.append(script)


def test_defaults(folder, data, tmp_path):
    script, result = call(folder, data)
    assert_same(run(filled(script, folder), tmp_path / "script.py")["model"], result)
    keep(script)


def test_accumulation_clipping_and_bf16(folder, data, tmp_path):
    script, result = call(
        folder,
        data,
        num_epochs=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
        strategy=SingleDevice("cpu", mixed_precision="bf16"),
    )
    assert_same(run(filled(script, folder), tmp_path / "script.py")["model"], result)
    keep(script)


def test_evaluation_and_the_best_model(folder, data, tmp_path):
    script, result = call(
        folder,
        data,
        with_evaluation=True,
        best_metric="f1",
        checkpoint_dir=tmp_path / "ours",
        checkpoint_every="10 min",
        max_time="3 h",
    )
    script = script.replace(str(tmp_path / "ours"), "theirs")
    found = run(filled(script, folder), tmp_path / "script.py")
    assert_same(found["model"], result)
    (best,) = (tmp_path / "theirs").glob("best-*")
    assert int(best.name.removeprefix("best-")) == result.best_step
    theirs = BertForSequenceClassification.from_pretrained(best).state_dict()
    ours = BertForSequenceClassification.from_pretrained(result.best_checkpoint).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keep(script, 140)


# Other calls, whose scripts run in this process.


def scripted(
    folder,
    data,
    tmp_path,
    monkeypatch,
    *,
    make=loaded,
    prepares=None,
    metric=None,
    is_complete=False,
    **call,
):
    """Train by a call and by its script, and compare the weights."""
    monkeypatch.chdir(tmp_path)
    optimizer_of = call.pop("optimizer_of", lambda model: prepare_optimizer(model, lr=1e-3))
    schedule_of = call.pop("schedule_of", lambda optimizer: "linear")
    torch.manual_seed((prepares or {}).get("seed", 42))
    model = make(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loaders = prepare_dataloaders(data, tokenizer, model=model, **(prepares or {}))
    if metric is not None:
        call["evaluate"] = partial(evaluate_loop, model, loaders["validation"], metric)
    optimizer = optimizer_of(model)
    arguments = model, loaders["train"], optimizer, schedule_of(optimizer)
    call = {"num_epochs": None if "max_steps" in call else 2, "progress_bar": False, **call}
    script = eject(*arguments, **call)
    keep(script, 140)
    result = train_loop(*arguments, **call)
    script = re.sub(r'^RUN = Path\(".*"\)$', 'RUN = Path("theirs")', script, flags=re.MULTILINE)
    rows = DatasetDict({name: loader.dataset for name, loader in loaders.items()})
    given = {"raw_datasets": data} if "raw_datasets" in script else {"datasets": rows}
    given = {} if is_complete else given
    names = run_here(script, **given)
    assert_same(names["model"].state_dict(), result)
    return script, result, names


CALLS = {
    "a number of updates": {"max_steps": 5},
    "warm-up as a share": {"num_warmup_steps": 0.3},
    "cosine with 3 updates of warm-up": {"lr_scheduler": "cosine", "num_warmup_steps": 3},
    "no schedule": {"lr_scheduler": None},
    "clipping": {"max_grad_norm": 0.1},
    "a short last window": {"gradient_accumulation_steps": 3},
    "updates that are skipped": {"on_nonfinite": "skip"},
    "NaN ignored": {"on_nonfinite": "ignore"},
    "fp16": {"strategy": SingleDevice("cpu", mixed_precision="fp16"), "max_grad_norm": 1.0},
    "weight decay": {
        "optimizer_of": lambda model: prepare_optimizer(model, lr=1e-3, weight_decay=0.1)
    },
    "SGD and StepLR": {
        "optimizer_of": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "schedule_of": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    },
    "a schedule that was prepared": {
        "schedule_of": lambda optimizer: prepare_scheduler(optimizer, num_training_steps=20)
    },
    "grouped by length": {"prepares": {"group_by_length": True, "batch_size": 2}},
    "another seed, the last batch dropped": {"prepares": {"seed": 7, "drop_last": True}},
    "padded to a multiple": {"prepares": {"pad_to_multiple_of": 8, "max_length": 6}},
    "one column": {"prepares": {"text_columns": "sentence2"}},
}


SAMPLE = (
    *("a number of updates", "a short last window", "weight decay", "fp16"),
    *("grouped by length", "another seed, the last batch dropped"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.exhaustive) for name in CALLS],
)
def test_the_script_of_other_calls(name, folder, data, tmp_path, monkeypatch):
    call = dict(CALLS[name])
    if "lr_scheduler" in call:
        schedule = call.pop("lr_scheduler")
        call["schedule_of"] = lambda optimizer: schedule
    scripted(folder, data, tmp_path, monkeypatch, **call)


@pytest.mark.parametrize(
    "cadence",
    [
        {"evaluate_every": 3},
        {"evaluate_every": "0.25 epoch"},
        {"evaluate_every": 2, "max_steps": 9, "patience": 2},
        {"evaluate_every": 1, "patience": 1, "checkpoint_dir": "ours", "checkpoint_every": 4},
    ],
    ids=str,
)
def test_evaluations_inside_an_epoch(cadence, folder, data, tmp_path, monkeypatch):
    _, result, names = scripted(
        folder,
        data,
        tmp_path,
        monkeypatch,
        metric=["f1/macro", "accuracy"],
        best_metric="loss",
        **cadence,
    )
    if "metrics" in names:
        found = {**names["metrics"], "loss": None}
        assert found == {**result.metrics, "loss": None}
        assert names["metrics"]["loss"] == pytest.approx(result.metrics["loss"], rel=1e-6)
    if "checkpoint_dir" in cadence:
        saved = {path.name.split("-")[0] for path in Path("theirs").iterdir()}
        assert saved == {"best", "last"}


def tokens(num_rows=21):
    """Tokens with labels, of which some count nowhere; row 3 has none that does."""
    rows = []
    for number in range(num_rows):
        length = 1 + number % 7
        labels = [-100 if (k + number) % 3 == 0 or number == 3 else k % 2 for k in range(length)]
        rows.append({"input_ids": [4 + (number + k) % 12 for k in range(length)], "labels": labels})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_labels_of_tokens(accumulation, folder, tmp_path, monkeypatch):
    data = DatasetDict(train=tokens(), validation=tokens(7))
    script, result, names = scripted(
        folder,
        data,
        tmp_path,
        monkeypatch,
        make=lambda folder: loaded(folder, BertForTokenClassification),
        prepares={"batch_size": 1 if accumulation == 3 else 4},
        gradient_accumulation_steps=accumulation,
        metric="accuracy",
    )
    assert "!= -100" in script
    assert names["metrics"]["accuracy"] == result.metrics["accuracy"]


def test_classes_that_are_strings_and_numbers_that_are_whole(folder, data, tmp_path, monkeypatch):
    named = DatasetDict(
        {
            name: rows.remove_columns("label").add_column(
                "label", ["no", "yes"] * (len(rows) // 2) + ["no"] * (len(rows) % 2)
            )
            for name, rows in data.items()
        }
    )
    script, _, _ = scripted(folder, named, tmp_path, monkeypatch, metric="accuracy")
    assert 'classes = ["no", "yes"]' in script

    def regression(folder):
        with torch.random.fork_rng():
            return BertForSequenceClassification.from_pretrained(
                folder / "regression", num_labels=1
            )

    helpers.tiny_bert(num_labels=1).save_pretrained(folder / "regression")
    script, result, names = scripted(
        folder, data, tmp_path, monkeypatch, make=regression, metric=["mse", "pearson"]
    )
    assert ".float()" in script
    assert names["metrics"]["mse"] == pytest.approx(result.metrics["mse"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_frozen_parts_and_adapters(folder, data, tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model

    def frozen(folder):
        model = loaded(folder)
        model.bert.embeddings.requires_grad_(False)
        return model

    script, _, _ = scripted(folder, data, tmp_path, monkeypatch, make=frozen)
    assert '"bert.embeddings"' in script
    with torch.random.fork_rng():
        adapted = get_peft_model(loaded(folder), LoraConfig(target_modules=["query"]))
        torch.nn.init.normal_(
            adapted.base_model.model.bert.encoder.layer[0]
            .attention.self.query.lora_B["default"]
            .weight
        )
        adapted.save_pretrained(tmp_path / "adapter")

    def with_adapter(folder):
        return PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter", is_trainable=True)

    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    (tmp_path / "adapter").rename("path/to/adapter")
    (tmp_path / "adapter").symlink_to("path/to/adapter")
    scripted(folder, data, tmp_path, monkeypatch, make=with_adapter)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_and_a_loss_of_the_users_own(counts, accumulation, tmp_path, monkeypatch):
    name = f"own_losses_{counts}_{accumulation}"
    returned = "loss, len(batch[0])" if counts else "loss"
    (tmp_path / f"{name}.py").write_text(
        "def loss_fn(model, batch):\n"
        "    loss = (model(batch[0]) - batch[1]).square().mean()\n"
        f"    return {returned}\n\n\n"
        "loss_fn.items = lambda batch: len(batch[0])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss_fn = __import__(name).loss_fn

    def made():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Dropout(), torch.nn.Linear(3, 1)
        )
        rows = TensorDataset(torch.randn(11, 2), torch.randn(11, 1))
        return model, DataLoader(rows, 4, shuffle=True)

    model, loader = made()
    options = {"loss_fn": loss_fn, "gradient_accumulation_steps": accumulation, "num_epochs": 2}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluate = partial(evaluate_loop, model, loader, loss_fn=loss_fn)
    script = eject(model, loader, optimizer, None, progress_bar=False, evaluate=evaluate, **options)
    keep(script)
    assert script.count("FILL IN") == 3
    torch.manual_seed(42)
    result = train_loop(model, loader, optimizer, None, progress_bar=False, **options)
    theirs, again = made()
    script = script.replace(", evaluate()", "")
    script = re.sub(r"^    metrics = evaluate\(\)\n    print.*\n", "", script, flags=re.MULTILINE)
    run_here(script, model=theirs, train_dataloader=again, eval_dataloader=again)
    assert_same(theirs.state_dict(), result)


# Of datasets 3: it leaves the files of CSV open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_rows_of_csv_files(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}.csv" for name in data}
    for name, path in files.items():
        data[name].to_csv(path)
    script, _, _ = scripted(folder, files, tmp_path, monkeypatch, metric="f1", is_complete=True)
    assert f'"train": Dataset.from_csv("{files["train"]}")' in script


HUB = "hf://datasets/someone/pairs@c0ffee/data/train.parquet"


def of_hub(folder, address=HUB):
    """The rows as ``load_dataset`` returns those of the hub."""
    files = {name: str(folder / "data" / f"{name}.parquet") for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    for rows in data.values():
        rows.info.download_checksums = {address: {}}
    return data


def source_in(folder, data):
    model = loaded(folder)
    loaders = prepare_dataloaders(data, AutoTokenizer.from_pretrained(folder / "model"))
    evaluate = partial(evaluate_loop, model, loaders["validation"])
    script = eject(model, loaders["train"], evaluate=evaluate)
    return next(line for line in script.splitlines() if line.startswith("raw_datasets"))


def test_rows_that_load_dataset_would_not_return_are_left_to_the_user(folder):
    data = of_hub(folder)
    assert source_in(folder, data) == 'raw_datasets = load_dataset("someone/pairs")'
    train, validation = data["train"], data["validation"]
    parts = train.train_test_split(0.2)
    others = of_hub(folder, HUB.replace("pairs", "others"))

    def turn(row):
        return {"label": 1 - row["label"]}

    changed = {
        "selected": {"train": train.select(range(16))},
        "filtered": {"train": train.filter(lambda row: row["label"] == 1)},
        "shuffled": {"train": train.shuffle(seed=1)},
        "mapped": {"train": train.map(turn)},
        "mapped in memory": {"train": train.map(turn, keep_in_memory=True)},
        "made anew": {"train": Dataset.from_dict(train.to_dict(), info=train.info)},
        "mapped for the evaluation": {"validation": validation.map(turn)},
        "another split": {"train": validation, "validation": train},
        "split anew": {"train": parts["train"], "validation": parts["test"]},
        "evaluated on others": {"validation": others["validation"]},
    }
    for name, splits in changed.items():
        assert "FILL IN" in source_in(folder, {**data, **splits}), name


def test_what_from_pretrained_was_given_beside_the_name(folder, data, tmp_path, monkeypatch):
    script, _, _ = scripted(
        folder,
        data,
        tmp_path,
        monkeypatch,
        make=lambda folder: loaded(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5
        ),
    )
    assert "hidden_dropout_prob=0.0" in script
    assert "attention_probs_dropout_prob=0.5" in script
    assert "hidden_size" not in script


def test_a_tokenizer_that_pads_on_the_left(tmp_path, monkeypatch):
    sizes = {"vocab_size": helpers.VOCAB_SIZE, "n_positions": 32, "n_embd": 8, "n_layer": 1}
    config = GPT2Config(**sizes, n_head=2, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer = helpers.tiny_tokenizer(padding_side="left", truncation_side="left")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = [[4 + (number + k) % 9 for k in range(2 + number % 5)] for number in range(12)]
    script, _, _ = scripted(
        tmp_path,
        DatasetDict(train=Dataset.from_dict({"input_ids": ids, "labels": ids})),
        tmp_path,
        monkeypatch,
        make=lambda folder: GPT2LMHeadModel.from_pretrained(folder / "model"),
        prepares={"batch_size": 4},
    )
    assert 'tokenizer.padding_side = "right"' in script
    assert "truncation_side" not in script  # the folder has it


def test_everything_that_cannot_be_written_out_is_refused_at_once(folder, data):
    model = loaded(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loaders = prepare_dataloaders(data, tokenizer, model=model, max_tokens=64)
    optimizer = prepare_optimizer(model)
    state = torch.get_rng_state()
    with pytest.raises(ConfigError) as error:
        eject(
            model,
            loaders["train"],
            optimizer,
            evaluate=lambda: {},
            loss_fn=lambda model, batch: model(**batch).loss,
            on_step=print,
            extras={"a": 1},
            resume=True,
            checkpoint_every="2 fortnights",
            log_every=0,
        )
    lines = str(error.value).splitlines()
    for part in (
        "log_every=0",
        "checkpoint_every='2 fortnights'",
        "evaluate is a function",
        "on_step= is not written out",
        "extras= is not written out",
        "resume=True",
        "made with max_tokens=",
        "loss_fn is a lambda",
    ):
        assert any(part in line for line in lines), part
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"takes the arguments of train_loop: .*num_epoch"):
        eject(model, loaders["train"], num_epoch=3)
    with pytest.raises(ConfigError, match="step_fn= is not written out"):
        eject(model, loaders["train"], step_fn=lambda state, batches, strategy: None)
    with pytest.raises(ConfigError, match="another model than the one that is trained"):
        other = loaded(folder)
        eject(
            model, loaders["train"], evaluate=partial(evaluate_loop, other, loaders["validation"])
        )
    with pytest.raises(ConfigError, match="metric='bleu' is not written out"):
        eject(
            model,
            prepare_dataloaders(data, tokenizer)["train"],
            evaluate=partial(evaluate_loop, model, loaders["validation"], "bleu"),
        )


def test_a_run_that_has_begun_is_refused(folder, data):
    model = loaded(folder)
    loader = prepare_dataloaders(data, AutoTokenizer.from_pretrained(folder / "model"))["train"]
    optimizer = prepare_optimizer(model)
    schedule = prepare_scheduler(optimizer, num_training_steps=5)
    train_loop(model, loader, optimizer, schedule, max_steps=2, progress_bar=False)
    with pytest.raises(ConfigError) as error:
        eject(model, loader, optimizer, schedule)
    assert "AdamW has made updates" in str(error.value)
    assert "PlannedLR has made 2 steps" in str(error.value)


EXAMPLES = Path(__file__).parents[2] / "examples"
QUICKSTART = """
import sys, torch
from functools import partial
from docstrings import load_docstrings, small_bert, train_tokenizer
from manualloop import eject, evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
datasets = load_docstrings()
tokenizer = train_tokenizer(datasets["train"]["text"][:200], vocab_size=300)
torch.manual_seed(0)
small_bert(len(tokenizer)).save_pretrained("path/to/model")
tokenizer.save_pretrained("path/to/model")
for name, rows in datasets.items():
    datasets[name] = rows.select(range(100))
    datasets[name].to_parquet(f"path/to/data/{name}.parquet")
torch.manual_seed(42)
model = small_bert(len(tokenizer))
model = type(model).from_pretrained("path/to/model", num_labels=model.num_labels)
tokenizer = type(tokenizer).from_pretrained("path/to/model")
loaders = prepare_dataloaders(datasets, tokenizer, model=model, batch_size=16)
torch.manual_seed(42)
call = dict(
    num_epochs=2,
    evaluate=partial(evaluate_loop, model, loaders["validation"], ["accuracy", "f1/macro"]),
    best_metric="accuracy",
)
arguments = model, loaders["train"], prepare_optimizer(model, lr=1e-3)
print(eject(*arguments, **call), end="# the end of the script\\n")
result = train_loop(*arguments, progress_bar=False, **call)
torch.save({"model": model.state_dict(), "metrics": result.metrics}, "ours.pt")
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not EXAMPLES.exists(), reason="the installed wheel has no examples")
def test_the_quickstart_from_the_command_line(tmp_path):
    """`python -c` prints the script; saved and run, it ends with the bits of the call."""
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", QUICKSTART],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index('"""') : done.stdout.index("# the end of the script")]
    keep(script)
    theirs = run(script, tmp_path / "script.py", **environment)
    ours = torch.load(tmp_path / "ours.pt")
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    assert {**theirs["metrics"], "loss": 0} == {**ours["metrics"], "loss": 0}


def test_scripts_are_formatted_and_clean(tmp_path):
    for number, script in enumerate(WRITTEN):
        (tmp_path / f"script_{number}.py").write_text(script)
    rules = ["--select", "E,F,B,I,UP,SIM,RET", "--ignore", "B905,E501"]
    for command in (["format", "--diff"], ["check", *rules]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "."],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
