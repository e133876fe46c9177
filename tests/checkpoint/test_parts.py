"""Models on a frozen base, with PEFT and bitsandbytes: saved without it, resumed exactly.

bitsandbytes writes to the terminal where it is installed, so that only `nox -s quantized` has it.
"""

import pytest
import torch
import transformers
from helpers import bert_config, rows, tiny_bert, tiny_tokenizer, whole_and_resumed
from peft import LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from manualloop import (
    CheckpointError,
    TrainState,
    evaluate_loop,
    load_checkpoint,
    prepare_dataloaders,
    prepare_optimizer,
    save_checkpoint,
    train_loop,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
LORA = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def loaders():
    return prepare_dataloaders(
        {"train": rows(44), "validation": rows(13)}, tiny_tokenizer(), batch_size=4
    )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A model with layers that bitsandbytes takes: of 64 numbers at least."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = bert_config(hidden_size=64, num_attention_heads=2, intermediate_size=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def lora(folder, seed=3):
    torch.manual_seed(seed)
    return get_peft_model(tiny_bert(), LoraConfig(**LORA))


def prompt(folder):
    torch.manual_seed(3)
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    return get_peft_model(tiny_bert(), config)


def adapter_of_transformers(folder):
    model = tiny_bert()
    torch.manual_seed(3)
    try:
        model.add_adapter(LoraConfig(**LORA | {"modules_to_save": ["classifier"]}))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} needs another peft: {error}")
    return model


class Whole(torch.nn.Linear):
    """A frozen layer of whole numbers; its state has a name that it does not take back."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        scale = self.weight.detach().abs().max() / 127
        whole = (self.weight.detach() / scale).round().to(torch.int8)
        self.weight, self.scale = torch.nn.Parameter(whole, requires_grad=False), scale
        self.bias.requires_grad_(False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self.scale


def whole_numbers(folder):
    model = tiny_bert()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense = Whole(layer.intermediate.dense)
    return model


def bits(folder, **how):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=["classifier"])
    return AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )


def lora_on(model):
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**LORA))


def lora_on_4_bits(folder):
    return lora_on(bits(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def lora_on_8_bits(folder):
    return lora_on(bits(folder, load_in_8bit=True))


def a_head_on_4_bits(folder):
    model = bits(folder, load_in_4bit=True)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


KINDS = [
    lora,
    prompt,
    adapter_of_transformers,
    whole_numbers,
    lora_on_4_bits,
    lora_on_8_bits,
    a_head_on_4_bits,
]


@pytest.mark.parametrize("make", KINDS)
def test_adapters_go_on_to_the_last_bit_and_the_base_is_not_saved(
    make, loaders, base_folder, tmp_path
):
    def run(folder, on_step):
        model = make(base_folder)
        torch.manual_seed(0)
        return train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=1e-2),
            num_epochs=2,
            evaluate=lambda: evaluate_loop(model, loaders["validation"], "accuracy"),
            best_metric="-loss",
            checkpoint_dir=folder,
            checkpoint_every=3,
            on_step=on_step,
            progress_bar=False,
        )

    whole, _ = whole_and_resumed(run, tmp_path, dies_after=7)
    weights = dict(whole.state.model.named_parameters())
    before = dict(make(base_folder).named_parameters())
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert any(not torch.equal(weights[name], before[name]) for name in trained)
    (newest,) = (tmp_path / "parts").glob("step-00000022")
    saved = set(load_file(newest / "model.safetensors"))
    assert trained <= saved
    frozen = {name for name in saved & set(weights) if "default" not in name.split(".")}
    if make in (whole_numbers, a_head_on_4_bits):
        assert all(weights[name].is_floating_point() for name in frozen)
    else:
        assert not frozen


def test_an_adapter_that_rests_is_saved_too(tmp_path):
    def make(seed):
        model = lora(None, seed)
        model.add_adapter("second", LoraConfig(**LORA))
        return TrainState(model, prepare_optimizer(model))

    state, other = make(3), make(4)
    names = [name for name, _ in state.model.named_parameters() if "second" in name.split(".")]
    assert names
    assert not any(dict(state.model.named_parameters())[name].requires_grad for name in names)
    save_checkpoint(tmp_path, state)
    load_checkpoint(tmp_path, other)
    ours, theirs = (dict(s.model.named_parameters()) for s in (other, state))
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_another_base_is_refused_and_nothing_is_loaded(tmp_path):
    model = lora(None)
    state = TrainState(model, prepare_optimizer(model))
    save_checkpoint(tmp_path, state)
    other = lora(None, seed=4)
    with torch.no_grad():
        other.base_model.model.bert.embeddings.word_embeddings.weight.add_(1e-3)
    before = {name: weight.clone() for name, weight in other.named_parameters()}
    with pytest.raises(CheckpointError, match="its frozen weights are not those"):
        load_checkpoint(tmp_path, TrainState(other, prepare_optimizer(other)))
    assert all(torch.equal(weight, before[name]) for name, weight in other.named_parameters())
