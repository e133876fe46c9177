"""A compiled run: as many compilations however many lengths, the same names, the same numbers."""

import shutil
from functools import partial

import pytest
import torch
from helpers import WORDS, rows, tiny_bert, tiny_tokenizer
from torch import nn

from manualloop import (
    Accelerated,
    ConfigError,
    SingleDevice,
    evaluate_loop,
    prepare_dataloaders,
    prepare_strategy,
    train_loop,
)
from manualloop.strategy.compiled import repeated_blocks

# torch's own, while it traces a block.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Counting:
    """A backend that computes as it did, and counts the graphs that it is asked to compile."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loaders_of():
    texts = [" ".join(WORDS[: 1 + number % 12]) for number in range(60)]
    data = {"train": rows(sentence=texts, label=[0, 1] * 30), "validation": rows(20)}
    return prepare_dataloaders(data, tiny_tokenizer(), batch_size=4, group_by_length=True)


def run(strategy, folder=None, num_layers=3, scores=True, **options):
    model = tiny_bert(
        num_hidden_layers=num_layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    loaders = loaders_of()
    result = train_loop(
        model,
        loaders["train"],
        strategy=strategy,
        evaluate=partial(evaluate_loop, model, loaders["validation"], "accuracy")
        if scores
        else None,
        checkpoint_dir=folder,
        progress_bar=False,
        **(options or {"num_epochs": 2}),
    )
    return model, result


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_lengths_compile_nothing_anew_and_the_numbers_are_the_same():
    backend = Counting()
    model, result = run(SingleDevice("cpu", compile={"backend": backend}))
    shapes = {tuple(batch["input_ids"].shape) for batch in loaders_of()["train"]}
    assert len(shapes) >= 10
    # With padding and without, for training and for evaluation, and for a single row: not one for
    # each layer, nor for each length.
    assert 1 <= backend.num_graphs <= 5
    plain, expected = run(SingleDevice("cpu"))
    assert weights_of(model).keys() == weights_of(plain).keys()
    for name, value in weights_of(plain).items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)


def test_it_is_compiled_once_and_in_place():
    strategy = prepare_strategy("cpu", compile={"backend": Counting()})
    model = tiny_bert(num_hidden_layers=3)
    assert strategy.prepare_model(model) is model
    compiled = [block._compiled_call_impl for block in model.bert.encoder.layer]
    assert None not in compiled
    assert model._compiled_call_impl is None
    strategy.prepare_model(model)
    assert [block._compiled_call_impl for block in model.bert.encoder.layer] == compiled


def test_an_accelerator_is_told_where_its_strategy_is_built():
    from accelerate import Accelerator

    backend = Counting()
    strategy = Accelerated(Accelerator(cpu=True), compile={"backend": backend})
    run(strategy, num_layers=2, scores=False, max_steps=1)
    assert backend.num_graphs > 0


def test_a_model_that_the_user_has_prepared_is_compiled_too():
    from accelerate import Accelerator

    backend, accelerator = Counting(), Accelerator(cpu=True)
    model = accelerator.prepare(tiny_bert(num_hidden_layers=2))
    strategy = Accelerated(accelerator, compile={"backend": backend})
    assert strategy.prepare_model(model) is model
    model(**tiny_tokenizer()(["a fine plot"], return_tensors="pt"))
    assert backend.num_graphs > 0


def test_a_checkpoint_goes_on_compiled_or_not_and_that_is_said(tmp_path, caplog):
    options = {"num_layers": 2, "scores": False}
    run(SingleDevice("cpu", compile={"backend": Counting()}), tmp_path, max_steps=3, **options)
    with caplog.at_level("INFO", logger="manualloop"):
        _, result = run(SingleDevice("cpu"), tmp_path, max_steps=6, **options)
    assert result.state.progress.num_steps == 6
    assert "not bit-exact, because compile: True -> False" in caplog.text


def test_blocks_are_found_where_they_repeat():
    model = tiny_bert(num_hidden_layers=3)
    assert repeated_blocks(model) == list(model.bert.encoder.layer)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert repeated_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) == []


def test_what_has_settings_of_its_own_is_refused():
    with pytest.raises(
        ConfigError, match=r"compile=True belongs to where the SingleDevice is built"
    ):
        prepare_strategy(SingleDevice("cpu"), compile=True)


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_real_compiler_trains_as_well(monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "0")  # the compiler sets it
    model, result = run(SingleDevice("cpu", compile=True))
    plain, expected = run(SingleDevice("cpu"))
    for name, value in weights_of(plain).items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5), name
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-5)
