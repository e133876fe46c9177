"""Mistakes in batches and in the arguments of a run are refused before the first update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import DatasetDict
from helpers import VOCAB_SIZE, fixes_in, rows, run_fix, tiny_bert, tiny_tokenizer
from mistakes import (
    assert_fixed,
    assert_refused,
    assert_same_bits,
    bits_of,
    by_train_loop,
    by_train_steps,
    collect,
    each,
    each_loop,
    keywords,
    own_loader,
    tokenized,
    value,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForTokenClassification,
    BertModel,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    TrainState,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
    train_steps,
)

MISTAKES, mistake = collect()


@mistake(
    "01 label column is target, own loader",
    *(DataError, "No 'labels' in the batch", "input_ids, token_type_ids, attention_mask"),
    *("target", "Did you mean 'target'?"),
    line='dataset.rename_column("target", "labels")',
)
def _(fit, model, line):
    dataset = tokenized(rows().rename_column("label", "target"))
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "02 no labels, own loader",
    *(DataError, "Training needs labels", "the batch has only input_ids"),
    line="loss_fn=",
)
def _(fit, model, line):
    own = {"loss_fn": lambda model, batch: model(**batch).logits.mean()} if line else {}
    fit(model, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}], **own)


@mistake(
    "03 text only, own loader",
    *(DataError, "Column 'text' is still text"),
    line='dataset.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)',
)
def _(fit, model, line):
    tokenizer = tiny_tokenizer()
    dataset = rows().rename_column("sentence", "text")
    dataset = value(line, dataset=dataset, tokenizer=tokenizer)
    if line is None:
        fit(model, DataLoader(dataset, batch_size=4))
    else:
        dataset = dataset.remove_columns("text")
        fit(model, DataLoader(dataset, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer)))


@mistake(
    "03 text only, without labels, own loader",
    *(DataError, "Column 'text' is still text"),
    line="prepare_dataloaders(dataset, tokenizer)",
)
def _(fit, model, line):
    if line is None:
        fit(model, DataLoader(rows(text=["good movie", "bad movie"]), batch_size=2))
    else:
        fit(model, prepare_dataloaders(rows(), tiny_tokenizer())["train"])


@mistake(
    "03 text beside its tokens, own loader",
    *(DataError, "Column 'sentence' is text", "'good movie'", "row 0"),
    line='dataset.remove_columns("sentence")',
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good movie", "bad"], labels=[1, 0]))
    dataset = dataset.add_column("sentence", ["good movie", "bad"])
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "05 a label is None, own loader",
    *(DataError, "Row 3 of the 6 rows checked has labels=None", "without a value: 1."),
    line='dataset.filter(lambda row: row["labels"] is not None)',
    from_error=True,
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good"] * 6, labels=[1, 0, 1, None, 1, 0]))
    dataset = value(line, dataset=dataset)
    fit(model, DataLoader(dataset, 4) if line is None else own_loader(dataset))


NAN = 'dataset.filter(lambda row: row["labels"] is not None and row["labels"] == row["labels"])'


@mistake(
    "05 a label is None, which set_format turns into NaN, own loader",
    *(DataError, "Label NaN in batch 0 (row id 3)"),
    line=NAN,
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good"] * 6, labels=[1, 0, 1, None, 1, 0]))
    fit(model, own_loader(value(line, dataset=dataset)))


HEADLESS = (ModelError, "BertModel has no task head", "no loss")


@mistake(
    "06 model without a head, own loader, three classes",
    *HEADLESS,
    line="loss_fn=",
    model=lambda: tiny_bert(kind=BertModel),
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad", "fine"], labels=[0, 1, 2]))
    own = {"loss_fn": lambda model, batch: model(batch["input_ids"]).pooler_output.mean()}
    fit(model, own_loader(dataset), **(own if line else {}))


class Logits(nn.Module):
    """Returns what many models of one's own do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 2)

    def forward(self, input_ids, labels=None):
        return self.embedding(input_ids).mean(dim=1)


@mistake(
    "07 model returns a tuple",
    *(ModelError, "BertForSequenceClassification.forward returned a tuple", "not an output with"),
    line="loss_fn=lambda model, batch: model(**batch)[0]",
    model=lambda: tiny_bert(return_dict=False),
)
def _(fit, model, line):
    loader = prepare_dataloaders(rows(), tiny_tokenizer(), model=model)["train"]
    fit(model, loader, **keywords(line))


@mistake(
    "09 label 2 of 2 classes, prepared without the model",
    *(DataError, "Label 2 in train batch 0 (row id 4)", "num_labels=2 (0..1)"),
    line="num_labels=3",
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    dataset = rows(text=["good", "bad", "fine", "dull", "a"], label=[0, 1, 0, 1, 2])
    fit(model, prepare_dataloaders(dataset, tiny_tokenizer())["train"])


@mistake(
    "09 label 2 of 2 classes, own loader",
    *(DataError, "Label 2 in batch 0 (row id 1)", "num_labels=2 (0..1)"),
    line="num_labels=3",
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    fit(model, own_loader(tokenized(rows(sentence=["good", "bad", "a"], labels=[0, 2, 1]))))


@mistake(
    "09 label 2 of 2 classes, own loader that shuffles",
    *(DataError, "Label 2 in row", "of batch 0", "num_labels=2 (0..1)"),
    line="num_labels=3",
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    dataset = tokenized(rows(sentence=["good", "bad", "a"], labels=[0, 2, 1]))
    fit(model, own_loader(dataset, shuffle=True, generator=torch.Generator()))


@mistake(
    "10 label -1, own loader",
    *(DataError, "Label -1 in batch 0 (row id 2)", "-100"),
    line='dataset.filter(lambda row: row["labels"] >= 0)',
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad", "fine"], labels=[0, 1, -1]))
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "10 label -1 of a token",
    *(DataError, "Label -1 in batch 0 (row id 0)", "-100"),
    line='dataset.map(lambda row: {"labels": [label if label >= 0 else -100 '
    'for label in row["labels"]]})',
    model=lambda: tiny_bert(kind=BertForTokenClassification),
)
def _(fit, model, line):
    dataset = value(line, dataset=rows(input_ids=[[4, 5, 6]], labels=[[0, -1, 1]]))
    fit(model, own_loader(dataset))


@mistake(
    "11 labels start at 1, own loader",
    *(DataError, "Label 3 in batch 0 (row id 0)", "num_labels=3", "The smallest label is 1"),
    line='dataset.map(lambda row: {"labels": row["labels"] - 1})',
    model=lambda: tiny_bert(3),
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad", "fine"], labels=[3, 2, 1]))
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "12 float labels, two classes, prepared without the model",
    *(DataError, "Float labels of shape (2,) in train batch 0", "multi-label", "2 of them a row"),
    line='dataset.cast_column("labels", datasets.Value("int64"))',
)
def _(fit, model, line):
    dataset = value(line, dataset=rows(text=["good", "bad"], labels=[1.0, 0.0]))
    fit(model, prepare_dataloaders(dataset, tiny_tokenizer())["train"])


@mistake(
    "12 float labels, two classes, own loader",
    *(DataError, "Float labels of shape (2,) in batch 0", "multi-label"),
    line='dataset.cast_column("labels", datasets.Value("int64"))',
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad"], labels=[1.0, 0.0]))
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "12 multi-label rows of another width, own loader",
    *(DataError, "Labels of shape (2, 3) in batch 0", "num_labels=2"),
    line="num_labels=3",
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    labels = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    fit(model, own_loader(tokenized(rows(sentence=["good", "bad"], labels=labels))))


@mistake(
    "12 multi-label rows of integers, own loader",
    *(DataError, "Labels of shape (2, 3) in batch 0", "multi-label", "takes floats, not int64"),
    line='dataset.cast_column("labels", datasets.Sequence(datasets.Value("float32")))',
    model=lambda: tiny_bert(3),
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad"], labels=[[1, 0, 1], [0, 0, 1]]))
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "14 all labels of tokens -100, own loader",
    *(DataError, "No label to learn from in batch 0", "all 6 are -100"),
    line='dataset.filter(lambda row: set(row["labels"]) != {-100})',
    model=lambda: tiny_bert(kind=BertForMaskedLM),
)
def _(fit, model, line):
    labels = [[-100] * 3, [-100] * 3, [-100, 4, -100]][: 3 if line else 2]
    dataset = rows(input_ids=[[4, 5, 6]] * len(labels), labels=labels)
    fit(model, own_loader(value(line, dataset=dataset)))


@mistake(
    "15 token beyond the vocabulary, own loader",
    *(DataError, "Token id 5 in batch 0 (row id 1)", "vocab_size 5"),
    line="model.resize_token_embeddings(len(tokenizer))",
    model=lambda: tiny_bert(vocab_size=5),
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad"], labels=[0, 1]))
    value(line, model=model, tokenizer=tiny_tokenizer())
    fit(model, own_loader(dataset))


LONG = {"text": ["good movie " * 20, "bad movie"], "label": [0, 1]}


@mistake(
    "16 too many tokens, own loader",
    *(DataError, "A sequence of 20 tokens in batch 0", "takes 16"),
    line="truncation=True, max_length=16",
    model=lambda: tiny_bert(max_position_embeddings=16),
)
def _(fit, model, line):
    dataset = rows(sentence=LONG["text"], labels=[0, 1])
    fit(model, own_loader(tokenized(dataset, **{"max_length": 20, **keywords(line)})))


RAGGED = (DataError, "The rows of a batch have lengths 2..4 in 'input_ids'", "they are not padded")


@mistake(
    "17 ragged rows of tensors, own loader",
    *RAGGED,
    line="DataCollatorWithPadding(tokenizer)",
    from_error=True,
)
def _(fit, model, line):
    dataset = rows(input_ids=[[4, 5, 6, 7], [4, 5]], labels=[0, 1])
    padding = {"collate_fn": DataCollatorWithPadding(tiny_tokenizer())} if line else {}
    fit(model, own_loader(dataset, **padding))


@mistake(
    "17 ragged rows of lists, own loader",
    *RAGGED,
    line="DataCollatorWithPadding(tokenizer)",
    from_error=True,
)
def _(fit, model, line):
    dataset = rows(input_ids=[[4, 5, 6, 7], [4, 5]], labels=[0, 1])
    padding = {"collate_fn": DataCollatorWithPadding(tiny_tokenizer())} if line else {}
    fit(model, DataLoader(dataset, batch_size=2, **padding))


@mistake(
    "17 rows of lists, which torch's collate turns around",
    *(DataError, "'input_ids' is a list of 3 tensors of shape (2,)", "default collate"),
    line='dataset.with_format("torch")',
)
def _(fit, model, line):
    dataset = rows(input_ids=[[4, 5, 6], [7, 8, 9]], labels=[0, 1])
    fit(model, DataLoader(value(line, dataset=dataset), batch_size=2))


MISALIGNED = (DataError, "labels have length 2, input_ids 4")


@mistake(
    "19 labels of tokens not padded, own loader",
    *(*MISALIGNED, "batch 0"),
    line="-100",
    model=lambda: tiny_bert(kind=BertForTokenClassification),
)
def _(fit, model, line):
    labels = [[0, 1] + ([-100] * 2 if line else [])] * 2
    fit(model, own_loader(rows(input_ids=[[4, 5, 6, 7]] * 2, labels=labels)))


@mistake(
    "19 ragged labels of tokens, own loader",
    *(*MISALIGNED, "row 1 of the 2 checked"),
    line="DataCollatorForTokenClassification(tokenizer)",
    model=lambda: tiny_bert(kind=BertForTokenClassification),
    from_error=True,
)
def _(fit, model, line):
    labels = [[0, 1, 1], [0, 1] + ([-100] * 2 if line else [])]
    dataset = rows(input_ids=[[4, 5, 6], [4, 5, 6, 7]], labels=labels)
    padding = {"collate_fn": DataCollatorForTokenClassification(tiny_tokenizer())} if line else {}
    fit(model, DataLoader(dataset, batch_size=2, **padding))


@mistake(
    "22 empty data set, own loader",
    *(DataError, "The training loader has 0 batches", "Check the filter of the dataset"),
    line="batch_size",
)
def _(fit, model, line):
    dataset = tokenized(rows().rename_column("label", "labels"))
    fit(model, own_loader(dataset if line else dataset.select([])))


@mistake(
    "23 all loaders for one",
    *(DataError, "Got a dict with splits train, test", "one loader is wanted"),
    line='loaders["train"]',
)
def _(fit, model, line):
    loaders = prepare_dataloaders(DatasetDict(train=rows(), test=rows()), tiny_tokenizer())
    fit(model, value(line, loaders=loaders))


@mistake(
    "23 Dataset for a loader",
    *(DataError, "Got a Dataset", "a loader of batches is wanted"),
    line='prepare_dataloaders(dataset, tokenizer)["train"]',
)
def _(fit, model, line):
    loader = prepare_dataloaders(rows(), tiny_tokenizer())["train"]
    fit(model, loader if line else rows())


@mistake(
    "32 parameters frozen after the optimizer was built",
    *(ModelError, "BertForSequenceClassification has 0 trainable parameters of 25"),
    line="for parameter in model.classifier.parameters(): parameter.requires_grad_(True)",
)
def _(fit, model, line):
    optimizer = torch.optim.AdamW(model.parameters())
    model.requires_grad_(False)
    exec(line or "", {"model": model})
    loaders = prepare_dataloaders(rows(), tiny_tokenizer(), model=model)
    fit(model, loaders["train"], optimizer=optimizer)


@mistake(
    "35 learning rate below 0",
    *(ConfigError, "lr=-0.001", "must be at least 0"),
    line="prepare_optimizer(model, lr=5e-5)",
)
def _(fit, model, line):
    loaders = prepare_dataloaders(rows(), tiny_tokenizer(), model=model)
    optimizer = value(line, model=model) if line else prepare_optimizer(model, lr=-1e-3)
    fit(model, loaders["train"], optimizer=optimizer)


@mistake(
    "36 both epochs and steps",
    *(ConfigError, "Give num_epochs=1 or max_steps=3"),
    line="max_steps=3",
)
def _(fit, model, line):
    loaders = prepare_dataloaders(rows(), tiny_tokenizer(), model=model)
    fit(model, loaders["train"], **(keywords(line) if line else {"num_epochs": 1, "max_steps": 3}))


@mistake(
    "36 a stream without max_steps, own loader",
    *(ConfigError, "A streaming dataset has no length"),
    line="max_steps=",
)
def _(fit, model, line):
    stream = tokenized(rows().rename_column("label", "labels")).to_iterable_dataset()
    fit(model, own_loader(stream), **({"max_steps": 1} if line else {}))


@each(MISTAKES)
@each_loop
def test_a_mistake_is_refused_before_the_first_update(mistake, fit, updates):
    assert_refused(mistake, fit, updates)


@each(MISTAKES)
def test_the_line_in_the_message_fixes_it(mistake, updates):
    assert_fixed(mistake, updates)


# What is seen only later, or is only warned of. ------------------------------------------------


def test_a_later_batch_is_explained_and_the_weights_stay_as_the_update_before_left_them(updates):
    labels = [0, 1, 0, 1, 0, 1, 2, 0]
    dataset = tokenized(rows(sentence=["good"] * 8, labels=labels))
    model = tiny_bert()
    state = TrainState(model, prepare_optimizer(model))
    steps = train_steps(state, DataLoader(dataset.with_format("torch"), batch_size=2), num_epochs=1)
    for _ in range(3):
        next(steps)
    before = bits_of(model)
    with pytest.raises(DataError) as refused:
        next(steps)
    assert str(refused.value) == (
        "Label 2 in batch 3 (row id 6) is not a class of the model, which has num_labels=2 (0..1). "
        "Correct the label, or load the model with more classes: from_pretrained(name, "
        "num_labels=3)."
    )
    assert isinstance(refused.value.__cause__, IndexError)
    assert len(updates) == state.progress.num_steps == 3
    assert_same_bits(model, before)


def test_the_row_of_a_shuffled_prepared_loader_is_named_by_its_number_in_the_dataset():
    labels = [0, 1] * 10
    labels[13] = 7
    dataset = rows(input_ids=[[4, 5]] * 20, labels=labels)
    model = tiny_bert()
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=3)["train"]
    number = next(n for n, batch in enumerate(loader.batch_sampler) if 13 in batch)
    with pytest.raises(DataError, match=rf"Label 7 in train batch {number} \(row id 13\)"):
        by_train_loop(model, loader)


class Elsewhere(nn.Module):
    """A model with a tensor on another device, which it multiplies by."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.inner = nn.Linear(2, 2), nn.Module()
        far = torch.ones(2, 2, device="meta")
        if kind == "parameter":
            self.inner.far = nn.Parameter(far)
        elif kind == "buffer":
            self.inner.register_buffer("far", far)
        else:
            self.inner.far = far

    def forward(self, x, labels):
        return {"loss": (self.first(x) @ self.inner.far).sum()}  # which torch takes for a number


@pytest.mark.parametrize("loss_fn", [None, lambda model, batch: model(**batch)["loss"]])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_part_of_a_model_on_another_device_is_named(kind, loss_fn):
    model, batch = Elsewhere(kind), {"x": torch.ones(3, 2), "labels": torch.zeros(3)}
    options = {"loss_fn": loss_fn, "max_steps": 1, "progress_bar": False}
    where = {"strategy": Accelerator(cpu=True, device_placement=False)}
    with pytest.raises(ModelError, match=r"first.weight on cpu and inner.far on meta") as refused:
        train_loop(model, [batch], **options, **({} if kind == "attribute" else where))
    line = str(refused.value).split("make it a buffer, ")[1].removesuffix(".")
    del model.inner.far
    exec(line, {"self": model.inner, "tensor": torch.eye(2)})
    train_loop(model, [batch], **options)


@pytest.mark.parametrize(
    ("config", "columns", "message"),
    [
        ({}, {"labels": [0, 2]}, "Label 2 in .*num_labels=3"),
        ({"vocab_size": 5}, {"labels": [0, 1]}, r"Token id 5 in .*resize_token_embeddings"),
        ({"max_position_embeddings": 6}, {"labels": [0, 1]}, "8 tokens in .*max_length=6"),
    ],
    ids=["09-label", "15-token", "16-length"],
)
def test_an_evaluation_is_explained_in_the_same_words(config, columns, message, updates):
    model = tiny_bert(**config)
    before = bits_of(model)
    loader = own_loader(tokenized(rows(sentence=["good", "bad"], **columns)))
    with pytest.raises(DataError, match=message):
        evaluate_loop(model, loader, "accuracy")
    assert updates == []
    assert_same_bits(model, before)


@pytest.fixture
def warnings_of(caplog) -> Callable[[], list[str]]:
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_13_classes_under_a_regression_head_prepared(warnings_of):
    prepare_dataloaders(rows(), tiny_tokenizer(), model=tiny_bert(1))
    (message,) = warnings_of()
    assert message == (
        "The model has num_labels=1, which means regression (MSE loss), but 'label' of train look "
        "like classes: 0, 1. For classes load the model with num_labels=2; for values set "
        'model.config.problem_type = "regression".'
    )


integers_for_values = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason=f"the MSE loss of transformers {transformers.__version__} refuses integer labels",
)


@integers_for_values
@each_loop
def test_13_classes_under_a_regression_head_own_loader(fit, warnings_of):
    dataset = tokenized(rows().rename_column("label", "labels"))
    fit(tiny_bert(1), own_loader(dataset))
    (message,) = warnings_of()
    assert "the labels of batch 0 look like classes: 0, 1." in message


@pytest.mark.parametrize(
    "fix",
    [
        "num_labels=2",
        pytest.param("problem_type", marks=integers_for_values),
        "task",
        pytest.param("values", marks=integers_for_values),
    ],
)
def test_13_is_not_warned_of_when_fixed_or_meant(fix, warnings_of):
    model = tiny_bert(2 if fix == "num_labels=2" else 1)
    if fix == "problem_type":
        exec('model.config.problem_type = "regression"', {"model": model})
    labels = [30, 12, 55] if fix == "values" else [0, 1, 0]
    dataset = rows(text=["good", "bad", "fine"], labels=labels)
    task = "regression" if fix == "task" else None
    by_train_loop(
        model, prepare_dataloaders(dataset, tiny_tokenizer(), model=model, task=task)["train"]
    )
    by_train_loop(model, prepare_dataloaders(dataset, tiny_tokenizer(), task=task)["train"])
    assert warnings_of() == []


# What is no mistake. ---------------------------------------------------------------------------


def test_a_window_needs_one_label_not_one_in_each_batch(updates):
    dataset = tokenized(rows(sentence=["good"] * 4, labels=[-100, -100, 0, 1]))
    loader = DataLoader(dataset.with_format("torch"), batch_size=2)
    by_train_loop(tiny_bert(), loader, gradient_accumulation_steps=2)
    assert len(updates) == 1


def test_the_num_labels_of_a_model_that_is_no_classifier_says_nothing(updates):
    model = tiny_bert(kind=BertForPreTraining)
    assert model.config.num_labels == 2
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([[-100, 9, -100]])}
    by_train_loop(model, [{**batch, "next_sentence_label": torch.tensor([0])}])
    assert len(updates) == 1


IDS = torch.tensor([[2, 4, 3], [2, 5, 3]])


def converted(labels, line):
    batch = {"input_ids": IDS, "labels": labels}
    return eval(line, {"torch": torch, "batch": batch}) if line else batch


LIST = '{**batch, "labels": torch.tensor(batch["labels"])}'
INTEGERS = '{**batch, "labels": batch["labels"].long()}'
TYPES = {
    "a list": ([0, 1], "is a list, not a tensor", LIST),
    "a tuple": ((0, 1), "is a tuple, not a tensor", LIST),
    "an array": (np.array([0, 1]), "is a ndarray, not a tensor", LIST),
    **{
        str(dtype): (torch.tensor([0, 1], dtype=dtype), f"are {str(dtype)[6:]}, and the", INTEGERS)
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    },
}


@pytest.mark.parametrize("name", TYPES)
@each_loop
def test_labels_of_another_type_are_refused_with_the_line_that_converts_them(name, fit, updates):
    labels, says, line = TYPES[name]
    with pytest.raises(DataError, match=says) as refused:
        fit(tiny_bert(), [converted(labels, None)])
    assert line in str(refused.value)
    assert not updates
    fit(tiny_bert(), [converted(labels, line)])
    assert updates


def test_labels_of_another_type_in_a_later_batch_are_explained():
    batches = [
        converted(labels, None) for labels in (torch.tensor([0, 1]), TYPES["torch.int32"][0])
    ]
    with pytest.raises(DataError, match="are int32, and the loss takes int64"):
        by_train_loop(tiny_bert(), batches)


def test_a_graph_that_was_used_before_is_explained():
    def calls_backward(model, batch):
        loss = model(batch).sigmoid().mean()
        loss.backward()
        return loss

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.hidden = nn.GRUCell(2, 2), None

        def forward(self, x, labels=None):
            self.hidden = self.cell(x, self.hidden)
            return {"loss": self.hidden.square().mean()}

    with pytest.raises(DataError, match=r"If loss_fn calls loss.backward\(\), leave that to the"):
        train_loop(nn.Linear(2, 1), [torch.ones(2, 2)], max_steps=1, loss_fn=calls_backward)
    rows = [{"x": torch.ones(2, 2), "labels": torch.zeros(2)}] * 2
    with pytest.raises(DataError, match=r"such as a hidden state, .* hidden.detach\(\)\."):
        train_loop(Recurrent(), rows, max_steps=2)


@pytest.mark.parametrize("labels", [[-1, 1], [-1, -1]])
def test_a_batch_that_may_be_coded_by_minus_1_gets_both_lines(labels):
    with pytest.raises(DataError, match="If it is a class, number the classes from 0: ") as refused:
        by_train_loop(tiny_bert(), [converted(torch.tensor(labels), None)])
    renumbered, dropped = fixes_in(refused.value)
    dataset = rows(labels=[-1, 1, 1])
    assert run_fix(renumbered, dataset)["labels"][:] == [0, 1, 1]
    assert run_fix(dropped, dataset)["labels"][:] == [1, 1]


def test_columns_of_a_shape_of_their_own_are_no_mistake(updates):
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, texts: list[str], labels: list[dict[str, torch.Tensor]]):
            lengths = torch.tensor([[float(len(text))] for text in texts])
            return {"loss": self.linear(lengths).mean() + labels[0]["boxes"].mean()}

    batch = {"texts": ["good", "bad"], "labels": [{"boxes": torch.ones(3, 4)}] * 2}
    by_train_loop(Free(), [batch])
    assert len(updates) == 1


def test_a_forward_that_takes_anything_is_tried(updates):
    class Anything(Logits):
        def forward(self, **batch):
            logits = super().forward(batch["input_ids"])
            return {"loss": nn.functional.cross_entropy(logits, batch["labels"])}

    by_train_loop(Anything(), prepare_dataloaders(rows(), tiny_tokenizer())["train"])
    assert updates


def test_a_loss_of_ones_own_switches_the_checks_off(updates):
    batch = {"x": torch.ones(3, 1), "labels": torch.tensor([7, 8, 9])}
    by_train_loop(nn.Linear(1, 1), [batch], loss_fn=lambda model, batch: model(batch["x"]).mean())
    assert len(updates) == 1


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x)


def entropy(model, batch):
    x, labels = batch if isinstance(batch, list | tuple) else (batch["x"], batch["y"])
    return nn.functional.cross_entropy(model(x), labels)


def batches_of(labels, kind):
    x, labels = torch.ones(2, 2), torch.tensor(labels)
    good = torch.tensor([0, 2])
    if kind == "dict":
        return [{"x": x, "y": good}, {"x": x, "y": labels, "number": torch.tensor([7, -1])}]
    if kind == "tokens":  # ids that look like the wrong label
        return [{"x": x, "y": good}, {"input_ids": labels.flip(0), "x": x, "y": labels}]
    return [(x, good), (x, labels)]


@pytest.mark.parametrize("kind", ["dict", "tuple", "tokens"])
@pytest.mark.parametrize(
    ("labels", "fix"), [([0, 7], "more outputs (at least 8)"), ([2, -1], "ignore_index=-1")]
)
def test_a_wrong_label_in_a_loss_of_ones_own_is_named(labels, fix, kind):
    model, seen = Head(), []
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DataError, match=rf"Label {labels[1]} in row 1 of") as error:
        for step in train_steps(state, batches_of(labels, kind), num_epochs=1, loss_fn=entropy):
            seen.append((step.index, bits_of(model)))
    assert fix in str(error.value)
    assert repr(1 if kind == "tuple" else "y") in str(error.value).replace("'1'", "1")
    assert isinstance(error.value.__cause__, IndexError)
    assert seen[0][0] == 1
    assert_same_bits(model, seen[0][1])


def test_a_wrong_label_is_named_as_in_the_models_own_loss():
    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"])

    loader = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 4])}]
    messages = []
    for own in (None, loss_fn):
        model = tiny_bert()
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(DataError) as error:
            next(train_steps(state, loader, num_epochs=1, loss_fn=own))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "num_labels=5" in messages[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_another_type_in_a_loss_of_ones_own_are_named(dtype):
    model = Head()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = {"x": torch.ones(2, 2), "y": torch.tensor([0, 1], dtype=dtype)}
    if dtype == torch.uint8:  # cross_entropy takes those
        assert next(train_steps(state, [batch], num_epochs=1, loss_fn=entropy)).index == 1
        return
    with pytest.raises(DataError, match=r'"y": batch\["y"\]\.long\(\)'):
        next(train_steps(state, [batch], num_epochs=1, loss_fn=entropy))


def test_an_error_of_a_loss_that_is_no_label_stays_as_it_is():
    def loss_fn(model, batch):
        raise ValueError("Target practice")

    model = Head()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^Target practice$"):
        next(train_steps(state, batches_of([0, 1], "dict"), num_epochs=1, loss_fn=loss_fn))


class Own(nn.Module):
    """A model without a config that computes its own loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_a_wrong_label_of_a_model_without_a_config_is_named():
    loader = [{"x": torch.ones(2, 2), "labels": torch.tensor([0, 7])}]
    with pytest.raises(DataError, match=r"Label 7 in row 1 of .*at least 8"):
        by_train_loop(Own(), loader)
    with pytest.raises(DataError, match=r"Label 7 in row 1 of .*at least 8"):
        evaluate_loop(Own(), loader)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_wrong_label_is_named_in_an_evaluation_with_a_loss_of_ones_own(kind):
    model, loader = Head(), batches_of([0, 7], kind)
    with pytest.raises(DataError, match="Label 7 in row 1 of") as error:
        evaluate_loop(model, loader, loss_fn=entropy)
    assert isinstance(error.value.__cause__, IndexError)


def test_a_wrong_label_is_named_where_terms_compute_the_loss():
    def terms(outputs, batch):
        return [(nn.functional.cross_entropy(outputs["logits"], batch["labels"]), 2)]

    loader = [{"x": torch.ones(2, 2), "labels": torch.tensor([0, 7])}]
    model = Own()
    model.forward = lambda x, labels=None: {"logits": model.layer(x)}
    for run in (partial(by_train_loop, terms=terms), partial(evaluate_loop, terms=terms)):
        with pytest.raises(DataError, match="Label 7 in row 1 of"):
            run(model, loader)


ARRAYS = {
    "float64": np.ones((2, 2)),
    "float32": np.ones((2, 2), np.float32),
    "a list": [[1.0, 1.0], [1.0, 1.0]],
}


@pytest.mark.parametrize("own_loss", [False, True], ids=["the model's loss", "a loss_fn"])
@pytest.mark.parametrize("name", ARRAYS)
def test_inputs_that_are_no_tensors_are_named_with_the_line_that_converts_them(name, own_loss):
    options = {}
    if own_loss:
        options["loss_fn"] = lambda model, batch: model(batch["x"], batch["labels"])["loss"]
    good = {"x": torch.ones(2, 2), "labels": torch.tensor([0, 1])}
    batch = {**good, "x": ARRAYS[name]}
    for run in (by_train_loop, by_train_steps, evaluate_loop):
        with pytest.raises(DataError, match=r"'x' is a (ndarray|list), not a tensor") as error:
            run(Own(), [good, batch], **options)
        line = str(error.value).rpartition("make tensors: ")[2].removesuffix(".")
        run(Own(), [good, eval(line, {"torch": torch, "batch": batch})], **options)


def test_ids_and_labels_that_are_arrays_are_named_in_turn():
    ids, labels = np.ones((2, 3), np.int32), np.array([0, 1])
    batch = {"input_ids": ids, "labels": labels}
    with pytest.raises(DataError, match="'labels' of a batch is a ndarray") as error:
        by_train_loop(tiny_bert(), [batch])
    line = str(error.value).partition("Make it one: ")[2].removesuffix(".")
    batch = eval(line, {"torch": torch, "batch": batch})
    with pytest.raises(DataError, match="'input_ids' is a ndarray") as error:
        by_train_loop(tiny_bert(), [batch])
    line = str(error.value).rpartition("make tensors: ")[2].removesuffix(".")
    by_train_loop(tiny_bert(), [eval(line, {"torch": torch, "batch": batch})])


def test_batches_that_are_tuples_of_arrays_are_named():
    batch = (np.ones((2, 2)), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="0 is a ndarray") as error:
        by_train_loop(Head(), [batch], loss_fn=entropy)
    line = str(error.value).rpartition("make tensors: ")[2].removesuffix(".")
    by_train_loop(Head(), [eval(line, {"torch": torch, "batch": batch})], loss_fn=entropy)


def test_a_model_that_takes_arrays_is_let_be(updates):
    class Converting(Own):
        def forward(self, x, labels=None):
            return super().forward(torch.as_tensor(x, dtype=torch.float32), labels)

    by_train_loop(Converting(), [{"x": np.ones((2, 2)), "labels": torch.tensor([0, 1])}])
    assert updates
    own = [{"x": np.ones((2, 2)), "labels": torch.tensor([0, 1])}]
    with pytest.raises(TypeError, match="mine"):
        by_train_loop(Own(), own, loss_fn=lambda model, batch: raise_mine())


def raise_mine():
    raise TypeError("mine")


KINDS = {  # the batch, the loss, what is named
    "inputs in float64": (
        {"x": torch.ones(2, 2).double()},
        None,
        "'x' is float64, and the weights are float32",
    ),
    "a tuple in float64": ((torch.ones(2, 2).double(), torch.ones(2)), None, "'0' is float64"),
    "whole targets": (
        {"x": torch.ones(2, 2), "targets": torch.ones(2, 2).long()},
        nn.functional.binary_cross_entropy_with_logits,
        "'targets' is int64, and the loss takes floats",
    ),
    "bool targets": (
        (torch.ones(2, 2), torch.ones(2, 2).bool()),
        nn.functional.binary_cross_entropy_with_logits,
        "'1' is bool, and the loss takes floats",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_another_kind_are_named_with_the_line_that_converts_them(kind):
    bad, loss, message = KINDS[kind]

    def loss_fn(model, batch):
        columns = list(batch.values() if isinstance(batch, dict) else batch)
        outputs = model(columns[0])
        return outputs.mean() if loss is None else loss(outputs, columns[1])

    for run in (by_train_loop, evaluate_loop):
        with pytest.raises(DataError, match=message) as error:
            run(nn.Linear(2, 2), [bad], loss_fn=loss_fn)
        line = str(error.value).rpartition("convert it: ")[2].removesuffix(".")
        run(nn.Linear(2, 2), [eval(line, {"torch": torch, "batch": bad})], loss_fn=loss_fn)


def test_a_lone_row_of_batch_normalisation_is_named():
    loader = DataLoader(torch.ones(9, 2), batch_size=4)
    options = {"loss_fn": lambda model, batch: model(batch).mean(), "num_epochs": 1}
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(DataError, match=r"has one row, .* drop_last=True"):
        by_train_loop(model, loader, **options)
    by_train_loop(model, DataLoader(torch.ones(9, 2), batch_size=4, drop_last=True), **options)


def test_an_axis_that_a_tokenizer_made_for_each_row_is_named():
    made = [{n: c[:, None] for n, c in batch.items() if n != "labels"} for batch in tiny_batches()]
    batches = [{**batch, "labels": torch.tensor([0, 1])} for batch in made]
    with pytest.raises(DataError, match=r"shape \(2, 1, 4\): the axis of length 1 comes from"):
        by_train_loop(tiny_bert(), batches)


def tiny_batches():
    ids = torch.randint(5, VOCAB_SIZE, (2, 4))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}]


def test_tuples_are_no_columns_of_a_model_that_predicts():
    rows_of_tuples = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match=r'gives a tuple, .* return a dict: \{"input": \.\.\.\}'):
        predict_loop(nn.Linear(3, 2), rows_of_tuples)
    with pytest.raises(DataError, match=r"return a dict, or pass loss_fn="):
        evaluate_loop(nn.Linear(3, 2), rows_of_tuples)
    found = predict_loop(nn.Linear(3, 2), [{"input": x} for x, _ in rows_of_tuples])
    assert found.predictions.shape == (2,)


def test_a_loss_that_calls_a_method_alone_gives_no_predictions():
    def loss_fn(model, batch):
        return model.layer(batch["x"]).mean()

    with pytest.raises(ModelError, match="loss_fn has called a method of the model"):
        evaluate_loop(Own(), [{"x": torch.ones(2, 2), "labels": torch.tensor([0, 1])}], "accuracy",
                      loss_fn=loss_fn)  # fmt: skip
