"""What changes the result of a call is in the script that ``eject`` writes, or is refused.

Each case changes one fact about the call, its model, optimizer, loaders or data. Either ``eject``
refuses, or the script ends with the weights of the call, to the last bit.
"""

import math
import re
import textwrap
from functools import partial
from itertools import product
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DebertaConfig,
    DebertaForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from manualloop import (
    ConfigError,
    eject,
    evaluate_loop,
    load_metric,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.run.evaluations import Evaluations
from manualloop.script.loading import loading_of
from manualloop.script.scores import find_scores
from manualloop.script.text import Part, script_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    helpers.tiny_bert(num_hidden_layers=2).save_pretrained(folder / "model")
    helpers.tiny_tokenizer().save_pretrained(folder / "model")
    rows = helpers.table_of(["sentence1", "sentence2"], 12)
    rows.to_parquet(folder / "train.parquet")
    rows.select(range(6)).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "validation")}
    return load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))


def unchanged(thing):
    """Leave a thing as it is."""


def called(
    folder,
    data,
    *,
    kind=BertForSequenceClassification,
    load=None,
    model=unchanged,
    tokenizer=unchanged,
    prepare=None,
    loaders=unchanged,
    optimizer=None,
    schedule="linear",
    built=unchanged,
    scores=False,
    train="train",
    **options,
):
    """Build a call with one change, and return its script, its result, and what the user fills in.

    Args:
        folder: The folder of the model.
        data: The raw rows.
        kind: The class of the model.
        load: Arguments of ``from_pretrained``.
        model: Changes the model after it was loaded.
        tokenizer: Changes the tokenizer before it is used.
        prepare: Arguments of ``prepare_dataloaders``.
        loaders: Changes the loaders after they were made.
        optimizer: Makes the optimizer of a model.
        schedule: The schedule, or a function of the optimizer.
        built: Changes the optimizer after the schedule was built.
        scores: Whether the call evaluates.
        train: The split that is trained on.
        options: Further arguments of the call.
    """
    torch.manual_seed((prepare or {}).get("seed", 42))
    one = kind.from_pretrained(folder / "model", **(load or {}))
    one = model(one) or one
    words = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer(words)
    made = prepare_dataloaders(data, words, model=one, **{"batch_size": 4, **(prepare or {})})
    loaders(made)
    steps = (optimizer or partial(prepare_optimizer, lr=1e-2))(one)
    rates = schedule(steps) if callable(schedule) else schedule
    built(steps)
    if scores:
        options["evaluate"] = partial(evaluate_loop, one, made["validation"], "accuracy")
    options = {"num_epochs": None if "max_steps" in options else 1, **options}
    arguments = one, made[train], steps, rates
    script = eject(*arguments, progress_bar=False, **options)
    result = train_loop(*arguments, progress_bar=False, **options)
    rows = DatasetDict({name: loader.dataset for name, loader in made.items()})
    return (
        script,
        result,
        {"raw_datasets": data} if "raw_datasets" in script else {"datasets": rows},
    )


def run_here(script, **names):
    for name in names:
        script = re.sub(rf"^{name} = .*$", "", script, flags=re.MULTILINE)
    names["__name__"] = "__main__"
    exec(compile(script, "script", "exec"), names)
    return names


def dropouts(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3


def one_dropout(model):
    model.bert.embeddings.dropout.p = 0.7


def changed_config(model):
    model.config.hidden_dropout_prob = 0.9  # too late: the modules are built


def recomputed(model):
    model.gradient_checkpointing_enable()


def frozen_tensor(model):
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)


def training_mode(model):
    model.train()


def cut_left(tokenizer):
    tokenizer.truncation_side = "left"


def set_options(optimizer, **options):
    for group in optimizer.param_groups:
        group.update(options)


def scheduled_before(model):
    """An optimizer whose rates an earlier schedule has noted."""
    optimizer = prepare_optimizer(model, lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def schedule_of(kind, **options):
    return lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)


def eager(model):
    model.set_attn_implementation("eager")


NAMES = {0: "no", 1: "yes"}
WRITTEN = {
    "nothing": {},
    "eager attention": {"load": {"attn_implementation": "eager"}},
    "attention that was set later": {"model": eager},
    "half precision": {"load": {"dtype": torch.bfloat16}},
    "names of classes": {
        "load": {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    },
    "fewer layers": {"load": {"num_hidden_layers": 1}},
    "all dropouts": {"model": dropouts},
    "one dropout": {"model": one_dropout},
    "a config that was changed": {"model": changed_config},
    "recomputed activations": {"model": recomputed},
    "a frozen tensor": {"model": frozen_tensor},
    "training mode": {"model": training_mode},
    "cut on the left": {"tokenizer": cut_left, "prepare": {"max_length": 5}},
    "rows in their order": {"train": "validation"},
    "a kept column": {"prepare": {"keep": "sentence1"}},
    "workers": {"prepare": {"num_workers": 1}},
    "a seed below 0": {"prepare": {"seed": -3}},
    "rows that are dropped": {"prepare": {"drop_last": True, "batch_size": 5}},
    "SGD that maximizes": {
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    },
    "other moments": {"optimizer": partial(prepare_optimizer, betas=(0.5, 0.6), eps=1e-3)},
    "no fused kernel": {"optimizer": partial(prepare_optimizer, fused=False)},
    "options that were set later": {"built": partial(set_options, weight_decay=0.3)},
    "the rate of an earlier schedule": {
        "optimizer": scheduled_before,
        "schedule": None,
        "built": partial(set_options, lr=1e-3),
    },
    "an earlier schedule under another": {"optimizer": scheduled_before},
    "clipping of two groups": {
        "optimizer": partial(prepare_optimizer, lr=1e-2, weight_decay=0.1),
        "max_grad_norm": 0.1,
    },
    "a polynomial": {"schedule": "polynomial"},
    "cosine annealing": {"schedule": schedule_of("CosineAnnealingLR", T_max=3, eta_min=1e-4)},
    "warm restarts": {"schedule": schedule_of("CosineAnnealingWarmRestarts", T_0=2)},
    "numbers of NumPy": {"max_steps": np.int64(3), "max_grad_norm": np.float32(0.5)},
}
SAMPLE = (
    *("eager attention", "all dropouts", "one dropout", "a config that was changed"),
    *("rows in their order", "the rate of an earlier schedule", "clipping of two groups"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.exhaustive) for n in WRITTEN],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_is_written(name, folder, data):
    script, result, given = called(folder, data, **WRITTEN[name])
    names = run_here(script, **given)
    ours, theirs = result.state.model.state_dict(), names["model"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def another_module(model):
    model.classifier = torch.nn.Sequential(model.classifier)


def own_forward(model):
    model.classifier.forward = lambda x: 2 * x


def hook(model):
    model.classifier.register_forward_hook(lambda *arguments: None)


def hook_of_gradient(model):
    model.classifier.weight.register_hook(lambda gradient: 2 * gradient)


def tied(model):
    first, second = model.bert.encoder.layer
    second.attention.self.query.weight = first.attention.self.query.weight


def activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


def compiled(model):
    model.compile(backend="eager")


def converted(model):
    model.classifier.weight.data = model.classifier.weight.data.double()


def some_modes(model):
    model.train()
    model.bert.pooler.eval()


def own_collate(loaders):
    collate = loaders["train"].collate_fn
    loaders["train"].collate_fn = lambda rows: {**collate(rows), "labels": torch.ones(len(rows))}


def hook_of_steps(optimizer):
    optimizer.register_step_pre_hook(lambda *arguments: None)


def trained_rows(loaders):
    loaders["validation"] = loaders["train"]


REFUSED = {
    "another module": ({"model": another_module}, "classifier is a Sequential, and a Linear"),
    "a forward pass": ({"model": own_forward}, r"classifier has forward\(\) of its own"),
    "a hook": ({"model": hook}, "classifier has hooks"),
    "a hook of a gradient": ({"model": hook_of_gradient}, "classifier.weight has a hook"),
    "tied weights": ({"model": tied}, "other weights are tied"),
    "an activation": ({"model": activation}, "intermediate_act_fn is a ReLU"),
    "a compiled model": ({"model": compiled}, "was compiled"),
    "a converted module": ({"model": converted}, "classifier.weight is of torch.float64"),
    "some modes": ({"model": some_modes}, "in eval mode"),
    "a collate_fn": (
        {"loaders": own_collate},
        "'labels' in the first batch of the training loader",
    ),
    "a hook of steps": ({"built": hook_of_steps}, "AdamW has hooks"),
    "a changed rate": (
        {"schedule": schedule_of("StepLR", step_size=1), "built": partial(set_options, lr=1.0)},
        "the learning rates are",
    ),
    "rows that are dropped": (
        {"loaders": trained_rows, "scores": True, "prepare": {"drop_last": True}},
        "the loader of evaluate drops rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, folder, data):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        called(folder, data, **changes)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_an_adapter_beside_layers_that_are_trained(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def adapted(model):
        model = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
        model.base_model.model.bert.pooler.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.requires_grad * torch.randn_like(parameter)
        model.save_pretrained("path/to/adapter")
        return model

    script = called(folder, data, model=adapted)[0]
    assert '"base_model.model.bert.pooler"' in script


def test_an_optimizer_whose_arguments_nobody_sees_is_left_to_the_user(folder, data):
    class Doubled(torch.optim.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, lr=2 * options.pop("rate"), **options)

    def part(model):
        return torch.optim.SGD(model.classifier.parameters(), lr=0.1)

    def rate_on_device(model):
        return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))

    for make in (lambda model: Doubled(model.parameters(), rate=0.1), part, rate_on_device):
        script = called(folder, data, optimizer=make, schedule=None, max_grad_norm=1.0)[0]
        (line,) = [line for line in script.splitlines() if line.startswith("optimizer = ")]
        assert "FILL IN" in line
        assert "import Doubled" not in script
    assert "clip_grad_norm_(model.parameters()" in script  # of the last, which holds all


def without(folder, data, **labels):
    """The rows with other labels."""
    return DatasetDict(
        {
            name: rows.remove_columns("label").add_column("label", labels.get(name, rows["label"]))
            for name, rows in data.items()
        }
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_are_left_out_of_one_split(split, folder, data):
    """The other split has none, and its batches are counted as those of this one."""
    labels = {split: [-100, 1] * (len(data[split]) // 2)}
    script, result, given = called(folder, without(folder, data, **labels), scores=True)
    names = run_here(script, **given)
    ours, theirs = result.state.model.state_dict(), names["model"].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert names["metrics"]["accuracy"] == result.metrics["accuracy"]
    assert names["metrics"]["loss"] == pytest.approx(result.metrics["loss"])


def test_a_batch_without_labels_is_no_update(folder, data):
    labels = [-100] * 8 + [0, 1, 0, 1]
    script, result, given = called(
        folder,
        without(folder, data, train=labels),
        prepare={"batch_size": 2},
        scores=True,
        evaluate_every=2,
        checkpoint_dir=None,
    )
    names = run_here(script, **given)
    ours, theirs = result.state.model.state_dict(), names["model"].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert names["step"] == result.state.progress.num_steps < 6
    assert names["metrics"]["accuracy"] == result.metrics["accuracy"]


SCRIPT = {"pearson": ">", "loss": "<"}


@pytest.mark.parametrize("best_metric", SCRIPT)
def test_nan_among_the_scores(best_metric, folder, data):
    """The lines that keep the best do what the run does, with any scores in any order."""
    script = called(folder, data, scores=True, best_metric="loss", patience=9)[0]
    start = script.index("        # NaN is the worst")
    lines = textwrap.dedent(script[start : script.index("        if num_since_best >= 9")])
    if best_metric == "pearson":  # the same lines, of a score of which the highest is the best
        lines = lines.replace("loss", "pearson").replace("math.inf", "-math.inf").replace("<", ">")
    code = compile(lines, "lines", "exec")
    for values in product([math.nan, 0.5, 0.7, -math.inf, math.inf], repeat=4):
        ours, names = Evaluations(best_metric), {"math": math, "best_metrics": {}}
        names["num_since_best"] = 0
        for value in values:
            ours.add({best_metric: value})
            names["metrics"] = {best_metric: value}
            exec(code, names)
            assert names["num_since_best"] == ours.num_since_best, values
        assert repr(names["best_metrics"]) == repr(ours.best)


class Bag(torch.nn.Module):
    """A model that takes no mask, which collators add."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.EmbeddingBag(helpers.VOCAB_SIZE, 2)

    def forward(self, input_ids, labels):
        logits = self.words(input_ids)
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))


def test_a_model_without_an_attention_mask(folder, data):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Bag())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loader = prepare_dataloaders(data, tokenizer, model=models[0])["train"]
    script = eject(models[0], loader, progress_bar=False)
    assert 'del batch["attention_mask"]' in script
    train_loop(models[0], loader, progress_bar=False)
    run_here(script, model=models[1], raw_datasets=data)
    assert torch.equal(models[0].words.weight, models[1].words.weight)


def test_weights_of_somewhere_else_are_left_to_the_user(folder, data):
    made = prepare_dataloaders(data, AutoTokenizer.from_pretrained(folder / "model"))

    def line(model):
        script = eject(model, made["train"])
        return "model.save_pretrained(" in script

    model = BertForSequenceClassification.from_pretrained(folder / "model")
    assert not line(model)
    with torch.no_grad():
        model.bert.pooler.dense.bias += 1
    assert line(model)
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    train_loop(model, made["train"], max_steps=1, progress_bar=False)
    assert not line(model)  # the script begins where the training began
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    model.resize_token_embeddings(helpers.VOCAB_SIZE + 3)
    assert line(model)


SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    BertForSequenceClassification: BertConfig(**SIZES, intermediate_size=8),
    DebertaForSequenceClassification: DebertaConfig(  # two biases are made in float32
        **SIZES, intermediate_size=8, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    LlamaForCausalLM: LlamaConfig(**SIZES, intermediate_size=8),  # a table in float32, not saved
    T5ForConditionalGeneration: T5Config(  # one matrix stays in float32 if the others are float16
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    ),
}


def half_with_a_part_in_float32(model):
    for name, module in model.named_modules():
        if "norm" in name.lower():
            module.float()


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"]))


def loaded_as(lines, base, model, folder):
    """Run the lines that load a model."""
    script = script_of("", [Part(lines.lines, tuple(lines.imports))])
    for name, one in {"path/to/model": base, "path/to/adapter": model}.items():
        if name in script:
            one.save_pretrained(folder / name)
            script = script.replace(name, str(folder / name))
    names = {"torch": torch}
    exec(script, names)
    return names["model"]


@pytest.mark.parametrize(
    ("kind", "dtype", "change"),
    [
        (DebertaForSequenceClassification, "bfloat16", unchanged),
        (DebertaForSequenceClassification, "float32", lambda model: model.half()),
        (DebertaForSequenceClassification, None, lambda model: model.bfloat16()),
        (LlamaForCausalLM, "bfloat16", unchanged),
        (LlamaForCausalLM, "float32", lambda model: model.bfloat16()),
        (LlamaForCausalLM, "bfloat16", half_with_a_part_in_float32),
        (T5ForConditionalGeneration, "float16", unchanged),
        (T5ForConditionalGeneration, "float32", lambda model: model.half()),
        (BertForSequenceClassification, "bfloat16", lambda model: model.float()),
        (BertForSequenceClassification, "bfloat16", half_with_a_part_in_float32),
        (BertForSequenceClassification, "bfloat16", adapted),
        (BertForSequenceClassification, "float32", lambda model: adapted(model.bfloat16())),
        (BertForSequenceClassification, "float32", lambda model: adapted(model).bfloat16()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_dtypes_of_weights_and_tables(kind, dtype, change, tmp_path):
    """The lines give each weight and table the dtype and the bits that it has in the call."""
    torch.manual_seed(0)
    base = kind(FAMILIES[kind])
    if dtype is not None:
        base.save_pretrained(tmp_path)
        base = kind.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    model = change(base) or base
    lines = loading_of(model)
    assert not lines.problems
    other = loaded_as(lines, base, model, tmp_path)
    for read in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, read)(remove_duplicate=False)) for one in (model, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def test_the_dtype_of_a_model_whose_folder_is_gone(tmp_path):
    kind = LlamaForCausalLM
    kind(FAMILIES[kind]).save_pretrained(tmp_path / "gone")
    model = kind.from_pretrained(tmp_path / "gone", dtype=torch.bfloat16).float()
    (tmp_path / "gone").rename(tmp_path / "other")
    lines = script_of("", [Part(loading_of(model).lines)])
    assert "dtype=torch.bfloat16" in lines
    assert "model.to(torch.float32)" in lines


def test_a_head_of_another_size_than_the_stored_one(tmp_path):
    kind = BertForSequenceClassification
    kind(FAMILIES[kind]).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = kind.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    lines = loading_of(model)
    torch.manual_seed(0)
    other = loaded_as(lines, model, model, tmp_path)
    assert torch.equal(other.classifier.weight, model.classifier.weight)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_virtual_tokens_are_refused_as_peft_loads_none_to_train(folder):
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, num_layers=1)
    prompts.token_dim, prompts.num_attention_heads = model.config.hidden_size, 2
    (problem,) = loading_of(get_peft_model(model, prompts)).problems
    assert "virtual tokens" in problem


def test_tables_that_a_class_freezes_and_loading_thaws(tmp_path):
    """A Marian has positions that its class freezes; a script leaves them as they are here."""
    sizes = {"d_model": 8, "vocab_size": 20, "pad_token_id": 0, "decoder_start_token_id": 0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 8}
    model = MarianMTModel(MarianConfig(**sizes))
    model.save_pretrained(tmp_path)
    for one in (model, MarianMTModel.from_pretrained(tmp_path)):
        loading = loading_of(one)
        assert not loading.problems
        lines = script_of("", [Part(loading.lines)])
        is_frozen = not one.model.encoder.embed_positions.weight.requires_grad
        assert ("requires_grad_(False)" in lines) == is_frozen


def test_modules_whose_class_is_made_for_each_of_them(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**sizes, **convolutions, **groups, intermediate_size=8, vocab_size=9)
    assert not loading_of(Wav2Vec2ForCTC(config)).problems  # weight_norm
    part = {**sizes, "intermediate_size": 8}
    config = CLIPConfig(text_config=part, vision_config={**part, "image_size": 8, "patch_size": 4})
    CLIPModel(config).save_pretrained(tmp_path)
    assert not loading_of(CLIPModel.from_pretrained(tmp_path)).problems  # two configs in one


def test_settings_of_torch(folder, data):
    made = prepare_dataloaders(data, AutoTokenizer.from_pretrained(folder / "model"))
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    try:
        script = eject(model, made["train"])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert "torch.use_deterministic_algorithms(True)" in script
    assert 'torch.set_float32_matmul_precision("high")' in script
    assert "set_default_dtype" not in script


def test_a_model_that_was_built_from_a_config_tells_where_to_seed(folder, data):
    made = prepare_dataloaders(data, AutoTokenizer.from_pretrained(folder / "model"))
    script = eject(helpers.tiny_bert(), made["train"])
    assert "seed the call behind the making of its model" in " ".join(script.split())
    script = eject(BertForSequenceClassification.from_pretrained(folder / "model"), made["train"])
    assert "seed the call" not in script


class NamedAlike:
    """A metric of one's own that is called like one of ours."""

    name = "accuracy"

    def add_batch(self, predictions, references):
        self.number = len(predictions)

    def compute(self):
        return {"accuracy": 1 / self.number}


def test_a_metric_is_known_by_what_it_is_and_not_by_its_name():
    """The script had scikit-learn's accuracy in its place."""
    for metric in (NamedAlike(), ["f1", NamedAlike()]):
        _, problems = find_scores(metric)
        assert "metric='NamedAlike' is not written out" in problems[0]
    for metric in ("glue/mrpc", load_metric("glue/mrpc"), ["accuracy", load_metric("f1")]):
        found, problems = find_scores(metric)
        assert (list(found), problems) == (["accuracy", "f1"], [])
    assert list(find_scores(load_metric("perplexity"))[0]) == ["perplexity"]
