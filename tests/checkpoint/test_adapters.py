"""The folder of a checkpoint is what PeftModel.from_pretrained takes."""

import json
import logging

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny_language_models import llama, padded, rows_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manualloop import TrainState, evaluate_loop, load_checkpoint, save_checkpoint, train_loop
from manualloop.tasks import lm_loss

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft

BATCH = padded(rows_of((9, 4, 7)))
CAUSAL = {"task_type": TaskType.CAUSAL_LM}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **CAUSAL}
FEED = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KINDS = {
    "lora": LoraConfig(**LORA),
    "lora with biases": LoraConfig(**LORA, bias="lora_only"),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora on a head": LoraConfig(**LORA | {"target_modules": ["lm_head"], "use_rslora": True}),
    "whole modules": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "new tokens": LoraConfig(**LORA, trainable_token_indices=[3, 4]),
    "ia3": IA3Config(**FEED, init_ia3_weights=False, **CAUSAL),
    "vera, whose matrices are shared": VeraConfig(r=2, target_modules=["q_proj"], **CAUSAL),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}


def adapted(config, **options):
    torch.manual_seed(1)
    return get_peft_model(llama(**options).float(), config)


def train(model, folder, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    options = {"max_steps": 2, "loss_fn": lambda m, b: m(**b).loss, **options}
    return train_loop(
        model, [BATCH], optimizer, None, checkpoint_dir=folder, progress_bar=False, **options
    )


def logits(model):
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # by PEFT 0.21
def test_a_checkpoint_loads_by_peft(name, tmp_path):
    bias = {"attention_bias": True} if "biases" in name else {}
    model = adapted(KINDS[name], **bias)
    before = logits(model)
    model.train()
    result = train(model, tmp_path)
    expected = logits(model)
    assert not torch.equal(before, expected)
    loaded = PeftModel.from_pretrained(llama(**bias).float(), result.last_checkpoint)
    assert torch.equal(logits(loaded), expected)
    saved = load_file(result.last_checkpoint / "adapter_model.safetensors")
    assert not any("default" in key for key in saved)


def test_the_best_checkpoint(tmp_path):
    model = adapted(KINDS["lora"])
    scores = iter([3.0, 1.0, 2.0])
    result = train(
        model,
        tmp_path,
        max_steps=3,
        evaluate=lambda: {"score": next(scores)},
        evaluate_every=1,
        checkpoint_every=1,
        best_metric="score",
    )
    assert result.best_step == 1
    best = PeftModel.from_pretrained(llama().float(), result.best_checkpoint)
    other = adapted(KINDS["lora"])
    load_checkpoint(tmp_path, other, which="best")
    assert torch.equal(logits(best), logits(other))
    assert not torch.equal(logits(best), logits(model))


def test_the_scored_weights_are_those_of_the_adapter(tmp_path):
    model = adapted(KINDS["lora"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0), extras={"ema": average})
    with torch.no_grad():
        for weight in average.module.parameters():
            if weight.requires_grad:
                weight.mul_(0.5)
    scores = evaluate_loop(average.module, [BATCH], loss_fn=lm_loss)
    folder = save_checkpoint(tmp_path, state, metrics=scores)
    loaded = PeftModel.from_pretrained(llama().float(), folder)
    assert torch.equal(logits(loaded), logits(average.module))


def test_the_active_one_of_several_adapters(tmp_path):
    model = adapted(KINDS["lora"])
    model.add_adapter("second", LoraConfig(**LORA | {"r": 3}))
    model.set_adapter("second")
    folder = save_checkpoint(tmp_path, TrainState(model, torch.optim.SGD(model.parameters())))
    loaded = PeftModel.from_pretrained(llama().float(), folder)
    assert torch.equal(logits(loaded), logits(model))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    other = adapted(KINDS["lora"])
    other.add_adapter("second", LoraConfig(**LORA | {"r": 3}))
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(weight.requires_grad)
    load_checkpoint(folder.parent, other)
    for name in ("default", "second"):
        model.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(logits(model), logits(other))


def test_adapters_that_transformers_holds(tmp_path):
    model = llama().float()
    torch.manual_seed(1)
    try:
        model.add_adapter(LoraConfig(**LORA))
    except ValueError as error:
        pytest.skip(f"transformers refuses this PEFT: {error}")
    folder = save_checkpoint(tmp_path, TrainState(model, torch.optim.SGD(model.parameters())))
    loaded = PeftModel.from_pretrained(llama().float(), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_the_base_is_found_by_its_name(tmp_path):
    llama().float().save_pretrained(tmp_path / "base")
    base = peft.AutoPeftModelForCausalLM._target_class.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA))
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    folder = save_checkpoint(tmp_path / "run", state)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("case", ["beside", "several"])
def test_what_peft_does_not_read_is_told_once(case, tmp_path, caplog):
    caplog.set_level(logging.INFO, "manualloop")
    model = adapted(KINDS["lora"])
    if case == "beside":
        model.base_model.model.lm_head.weight.requires_grad_(True)
    else:
        model.add_adapter("second", LoraConfig(**LORA))
        model.base_model.set_adapter(["default", "second"])
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    save_checkpoint(tmp_path, state)
    folder = save_checkpoint(tmp_path, state)
    lines = [line for line in caplog.messages if "PeftModel.from_pretrained does not" in line]
    assert len(lines) == 1
    assert ("lm_head" in lines[0]) == (case == "beside")
    assert (folder / "adapter_config.json").exists() == (case == "beside")
