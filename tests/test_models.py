"""An evaluation leaves no trace in a model: tensors, configs and modes."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pytest
import torch
from helpers import tiny_bert
from torch import nn
from transformers import BertConfig, PretrainedConfig

from manualloop import (
    DataError,
    ManualLoopError,
    SingleDevice,
    TrainState,
    check_accumulation,
    evaluate_loop,
    predict_loop,
    train_loop,
    train_steps,
)
from manualloop.models import coarsest_dtype, evaluation_mode, remember_configs, unwrap_model

CPU = SingleDevice("cpu")


@cache
def shared_table(length):
    """A table that is not the model's: it is made once in the process."""
    return torch.linspace(0, 1, length)[:, None]


class Cached(nn.Module):
    """Keeps a table from its first forward pass, where ``kind`` says."""

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kind, self.table, self.tables = kind, None, {}
        self.register_buffer("buffer", torch.zeros(1, 1), persistent=False)

    def lookup(self, length):
        if self.kind == "attribute":
            if self.table is None or len(self.table) < length:
                self.table = torch.linspace(0, 1, length)[:, None]
            return self.table[:length]
        if self.kind == "dict":
            return self.tables.setdefault(length, torch.linspace(0, 1, length)[:, None])
        if self.kind == "buffer":
            if len(self.buffer) < length:
                self.buffer = torch.linspace(0, 1, length)[:, None]
            return self.buffer[:length]
        return shared_table(length)

    def forward(self, x, labels=None):
        logits = (self.linear(x) * self.lookup(x.shape[1])).mean(1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(2, 5, 3, generator=generator), "labels": torch.tensor([0, 1])}
        for _ in range(4)
    ]


def train(kind, before=None, during=None):
    torch.manual_seed(0)
    model = Cached(kind)
    if before is not None:
        before(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches() * 2:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        if during is not None:
            during(model)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def under_inference_mode(model):
    with torch.inference_mode():
        evaluate_loop(model, batches())


@pytest.mark.parametrize("kind", ["attribute", "dict", "buffer", "cache"])
@pytest.mark.parametrize(
    "look",
    [
        lambda model: evaluate_loop(model, batches()),
        lambda model: predict_loop(model, batches()),
        under_inference_mode,
    ],
)
def test_what_a_model_keeps_from_an_evaluation_can_be_trained_with(kind, look):
    shared_table.cache_clear()
    evaluated = train(kind, before=look, during=look)
    shared_table.cache_clear()
    assert torch.equal(evaluated, train(kind))


def test_an_evaluation_has_no_gradients():
    model, seen = Cached("attribute"), []
    model.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    evaluate_loop(model, batches())
    assert not any(seen)
    assert torch.is_grad_enabled()


# Configs ------------------------------------------------------------------------------------------

FLOATS, CLASSES = torch.tensor([0.0, 1.0]), torch.tensor([0, 1])


def tokens(labels):
    ids = torch.arange(8).view(2, 4) + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def attempt(call):
    with suppress(ManualLoopError, RuntimeError, ValueError):
        call()


@pytest.mark.parametrize("labels", [CLASSES, FLOATS, torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
def test_looking_at_a_model_leaves_its_config_as_it_was(labels):
    model = tiny_bert()
    before = model.config.to_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: evaluate_loop(model, [tokens(labels)]),
        lambda: evaluate_loop(model, [tokens(labels)], "accuracy"),
        lambda: predict_loop(model, [tokens(labels)]),
        lambda: check_accumulation(model, tokens(labels)),
        lambda: train_loop(model, [tokens(FLOATS)], progress_bar=False),
        lambda: next(train_steps(TrainState(model, optimizer), [tokens(FLOATS)], preflight=False)),
    ):
        attempt(call)
        assert model.config.to_dict() == before
    result = train_loop(model, [tokens(CLASSES)], num_epochs=1, progress_bar=False)
    assert result.state.progress.num_steps == 1


def test_a_step_that_was_made_decides():
    model = tiny_bert()
    train_loop(model, [tokens(CLASSES)], num_epochs=1, progress_bar=False)
    assert model.config.problem_type == "single_label_classification"


def test_an_evaluation_that_fails_leaves_no_trace():
    model = tiny_bert()
    model.train()
    model.bert.embeddings.dropout.eval()
    modes = [module.training for module in model.modules()]
    state, before = torch.get_rng_state(), model.config.to_dict()

    def broken():
        yield tokens(CLASSES)
        torch.rand(3)
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="gone"):
        evaluate_loop(model, broken())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == before


class Composed(PretrainedConfig):
    model_type = "composed"

    def __init__(self, **options):
        super().__init__(**options)
        self.text, self.sizes, self.names = BertConfig(), [1, 2], {"a": {"b": 1}}


def test_configs_inside_configs_and_their_containers_are_put_back():
    model = nn.Linear(1, 1)
    model.config, inner = Composed(), nn.Linear(1, 1)
    model.inner, inner.config = inner, BertConfig()
    before = [model.config.to_dict(), inner.config.to_dict()]
    put_back = remember_configs(model)
    model.config.text.problem_type = "regression"
    model.config.sizes.append(3)
    model.config.names["a"]["b"] = 2
    model.config.added = 1
    inner.config.hidden_size = 3
    put_back()
    assert [model.config.to_dict(), inner.config.to_dict()] == before
    assert not hasattr(model.config, "added")


def test_a_config_that_is_no_config_is_left_alone():
    model = nn.Linear(1, 1)
    model.config = {"seen": []}
    with evaluation_mode(model, CPU.device):
        model.config["seen"].append(1)
    assert model.config == {"seen": [1]}


def test_the_numbers_with_the_fewest_digits_count():
    cpu, model = torch.device("cpu"), nn.Linear(2, 2)
    assert coarsest_dtype(model, cpu) == torch.float32
    assert coarsest_dtype(nn.Linear(2, 2).double(), cpu) == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert coarsest_dtype(model, cpu) == torch.bfloat16
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        assert coarsest_dtype(model, cpu) == torch.float16
        assert coarsest_dtype(nn.Linear(2, 2).double(), cpu) == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")
    assert coarsest_dtype(nn.Linear(2, 2).to(torch.float8_e4m3fn), cpu) == torch.bfloat16
    model.config = PretrainedConfig(quantization_config={"load_in_4bit": True})
    assert coarsest_dtype(model, cpu, torch.float32) == torch.bfloat16


def test_wrappers_are_taken_off_and_nothing_else():
    inner = nn.Linear(1, 1)
    compiled = torch.compile(inner)
    for wrapped in (nn.DataParallel(inner), compiled, nn.DataParallel(compiled)):
        assert unwrap_model(wrapped) is inner
    # fully_shard() makes a subclass of the class of what it shards.
    compiled.__class__ = type("FSDPOptimizedModule", (type(compiled),), {})
    assert unwrap_model(compiled) is inner
    own = nn.Module()
    own.module = own.base_model = inner
    assert unwrap_model(own) is own
