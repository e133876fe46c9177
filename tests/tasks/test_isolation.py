"""Documents in one sequence: kept apart, proved, or refused."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_language_models import llama, needs_packs
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from manualloop import (
    ModelError,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.tasks import check_isolation, distil, isolation, lm_loss

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
DRAW = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 40, (n,), generator=DRAW).tolist() for n in (9, 2, 7, 1, 12)]
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_of(name):
    """A tiny model in float64, without dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, **SIZES, **HEADS, **ENDS}
    if name == "GPT2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        sizes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **ENDS}
    if name in ("Mistral", "Gemma2", "Qwen2"):
        sizes["sliding_window"] = 4
    if name.startswith("Gemma"):
        sizes["head_dim"] = 8
    if name == "Qwen2":
        sizes |= {"use_sliding_window": True, "max_window_layers": 1}
    if name == "OPT":
        sizes |= {"ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.0}
    if name == "Bloom":
        sizes |= {"n_head": 2, "n_layer": 2}
    if name == "Lfm2":
        sizes |= {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = getattr(transformers, f"{name}Config")(**sizes)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).double()


APART = ["Llama", "Qwen2", "Mistral", "Gemma", "Gemma2", "GPT2", "GPTNeoX"]
TOGETHER = [
    name
    for name in ("OPT", "Bloom", "Mamba", "Lfm2")
    if hasattr(transformers, f"{name}Config")  # Lfm2 is newer than the oldest version
]


def packed_batch(**collator):
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return DataCollatorWithFlattening(**collator)(rows)


def loss_apart(model, rows=ROWS):
    """The mean loss of documents, each in a call of its own."""
    total, items = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits, ids[0, 1:], reduction="sum")
        items += len(row) - 1
    return total / items


def exact(model, batch):
    """The model's loss in float64: that of transformers is computed in float32."""
    inputs = {n: c for n, c in batch.items() if n in ("input_ids", "position_ids")}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten()), int((labels != -100).sum())


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.fixture
def gemma_in_float64(monkeypatch):
    """Gemma scales in float32, and Gemma 2 takes its softmax there, whatever its weights are."""

    def scaled(self, hidden):
        return self._norm(hidden) * (1.0 + self.weight)

    def softmax(logits, dim, dtype=None):
        return torch.softmax(logits, dim)

    for name in ("Gemma", "Gemma2"):
        module = getattr(transformers.models, name.lower())
        norm = getattr(getattr(module, f"modeling_{name.lower()}"), f"{name}RMSNorm")
        monkeypatch.setattr(norm, "forward", scaled)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@needs_packs
@pytest.mark.parametrize("name", APART)
@pytest.mark.usefixtures("gemma_in_float64")
def test_documents_in_a_pack_are_those_documents_alone(name):
    assert_packed_as_alone(name, 1e-12)


@needs_packs
@pytest.mark.parametrize("name", ["Gemma", "Gemma2"])
def test_gemma_keeps_documents_apart_to_the_rounding_of_float32(name):
    assert_packed_as_alone(name, 1e-6)


def assert_packed_as_alone(name, exactly):
    model, other = model_of(name), model_of(name)
    report = check_isolation(model)
    assert report.is_isolated
    assert report.difference < exactly
    assert report.leak == 0
    assert "are kept apart" in str(report)
    loss = loss_apart(other)
    loss.backward()
    right, value = gradient(other), loss.detach()
    for loss_fn, most in ((exact, exactly), (None, 1e-6)):
        model.zero_grad()
        update = accumulate_gradients(model, [packed_batch()], loss_fn=loss_fn)
        assert update.num_items == sum(len(row) - 1 for row in ROWS)
        assert float(update.loss) == pytest.approx(float(value), rel=most)
        assert float((gradient(model) - right).abs().max() / right.abs().max()) < most
        scores = evaluate_loop(model, [packed_batch()], "perplexity", loss_fn=loss_fn)
        assert scores["loss"] == pytest.approx(float(value), rel=most)
        assert scores["perplexity"] == pytest.approx(float(value.exp()), rel=10 * most)


@pytest.mark.filterwarnings("ignore:.position_ids. have no functionality in BLOOM:FutureWarning")
@pytest.mark.parametrize("name", TOGETHER)
def test_models_that_never_keep_documents_apart_are_refused(name):
    model = model_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        assert not check_isolation(model).is_isolated
    except ModelError as error:
        assert "takes no input_ids with position_ids" in str(error)  # noqa: PT017
    with pytest.raises(ModelError, match="max_tokens=\\) without pack"):
        train_loop(model, [packed_batch()], max_steps=1, progress_bar=False, preflight=False)
    with pytest.raises(ModelError, match="see each other"):
        evaluate_loop(model, [packed_batch()])
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@needs_packs
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_of_adapters_leave_positions_out_and_are_refused(kind):
    model = get_peft_model(llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    with pytest.raises(ModelError, match="lets them see each other"):
        accumulate_gradients(model, [packed_batch()])
    assert not check_isolation(model).is_isolated


@needs_packs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_proof_holds_in_every_dtype(dtype):
    assert check_isolation(model_of("Llama").to(dtype)).is_isolated
    assert not check_isolation(model_of("OPT").to(dtype)).is_isolated
    model = model_of("Llama").to(dtype)
    accumulate_gradients(model, [packed_batch()])
    with pytest.raises(ModelError):
        accumulate_gradients(model, [packed_batch()], loss_fn=with_cache)


def with_cache(model, batch):
    return model(**batch).loss


def of_the_body(model, batch):
    """A loss that calls the model's body, as losses over chosen positions do."""
    hidden = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    return cross_entropy(model.lm_head(hidden[:, :-1]).flatten(0, 1), labels.flatten())


@needs_packs
@pytest.mark.parametrize("loss_fn", [exact, of_the_body])
def test_a_loss_function_that_keeps_documents_apart_trains(loss_fn):
    model, other = model_of("Llama"), model_of("Llama")
    accumulate_gradients(model, [packed_batch()], loss_fn=loss_fn)
    loss_apart(other).backward()
    right = gradient(other)
    assert float((gradient(model) - right).abs().max() / right.abs().max()) < 1e-12
    found = evaluate_loop(model, [packed_batch()], loss_fn=loss_fn)["loss"]
    assert found == pytest.approx(loss_apart(model).item(), rel=1e-12)


def test_a_loss_function_that_lets_them_see_each_other_is_refused():
    model = model_of("Llama")
    with pytest.raises(ModelError, match="use_cache=False"):
        accumulate_gradients(model, [packed_batch()], loss_fn=with_cache)
    with pytest.raises(ModelError, match="use_cache=False"):
        train_loop(model, [packed_batch()], loss_fn=with_cache, max_steps=1, progress_bar=False)
    with pytest.raises(ModelError, match="use_cache=False"):
        evaluate_loop(model, [packed_batch()], loss_fn=with_cache)


def with_mask(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def without_positions(batch):
    return {name: column for name, column in batch.items() if name != "position_ids"}


@pytest.mark.parametrize(
    "batch",
    [
        with_mask(packed_batch()),
        without_positions(packed_batch(return_flash_attn_kwargs=True)),
        without_positions(packed_batch(return_seq_idx=True)),
    ],
    ids=["mask", "cu_seq_lens", "seq_idx"],
)
def test_other_forms_of_packs_that_sdpa_does_not_heed_are_refused(batch):
    model = model_of("Llama")
    with pytest.raises(ModelError, match="see each other"):
        accumulate_gradients(model, [batch])
    assert all(weight.grad is None for weight in model.parameters())


@needs_packs
def test_every_attention_of_a_model_is_probed():
    model = model_of("Llama")
    accumulate_gradients(model, [packed_batch()])
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        update = accumulate_gradients(model, [packed_batch()])
        assert float(update.loss) == pytest.approx(loss_apart(model).item(), rel=1e-6)


def test_a_pack_that_comes_later_is_found():
    model = model_of("OPT")
    alone = {"input_ids": torch.tensor([ROWS[0]]), "labels": torch.tensor([ROWS[0]])}
    alone["position_ids"] = torch.arange(len(ROWS[0]))[None]
    with pytest.raises(ModelError, match="see each other"):
        train_loop(model, [alone, packed_batch()], num_epochs=1, progress_bar=False)


def test_positions_of_rows_that_are_padded_are_no_pack():
    model = model_of("OPT")
    row = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = (row != 0).long()
    # As generation makes them: 1 at the padding, then from 0.
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": row, "attention_mask": mask, "position_ids": positions}
    accumulate_gradients(model, [{**batch, "labels": row.masked_fill(mask == 0, -100)}])
    assert predict_loop(model, [batch]).predictions.shape == (2, 5)


@needs_packs
def test_the_cache_is_left_alone_elsewhere():
    model, seen = model_of("Llama"), []
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs.get("use_cache", "not passed")),
        with_kwargs=True,
    )
    plain = {"input_ids": torch.tensor([ROWS[0]]), "labels": torch.tensor([ROWS[0]])}
    accumulate_gradients(model, [plain])
    assert seen == ["not passed"]
    accumulate_gradients(model, [packed_batch()])
    assert set(seen[1:]) == {False}


@needs_packs
def test_the_proof_leaves_no_trace():
    model = model_of("GPT2")
    model.transformer.h[0].eval()
    model.transformer.drop.p = 0.5
    modes = [module.training for module in model.modules()]
    before, config = torch.get_rng_state(), model.config.to_dict()
    assert check_isolation(model).is_isolated
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(weight.grad is None for weight in model.parameters())


def test_a_model_that_cannot_be_probed_is_told(caplog):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, position_ids, labels):
            return {"loss": self.weight * input_ids.sum()}

    accumulate_gradients(Odd(), [packed_batch()])
    assert "nothing tells whether the packed documents see each other" in caplog.text


@needs_packs
def test_positions_decide_how_long_a_sequence_is():
    model = model_of("GPT2")  # with room for 16 positions, and packs of 31 tokens
    data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    loaders = prepare_dataloaders(
        data, model=model, batch_size=5, collate_fn=DataCollatorWithFlattening()
    )
    train_loop(model, loaders["train"], max_steps=1, progress_bar=False)


def test_the_verdict_on_one_teacher_is_not_that_of_another():
    model, batch = llama(), {"position_ids": torch.zeros(1, 3)}
    first, second = (isolation._key_of(model, batch, distil(llama())) for _ in range(2))
    teacher = llama()
    same = [isolation._key_of(model, batch, distil(teacher)) for _ in range(2)]
    assert first != second
    assert same[0] == same[1] != first


class Peeking(transformers.MixtralForCausalLM):
    """A mixture of experts in which the logits of a token depend a little on those before it."""

    def forward(self, input_ids=None, position_ids=None, labels=None, use_cache=None):
        columns = {"position_ids": position_ids, "use_cache": use_cache}
        outputs = super().forward(input_ids, **columns)
        before = outputs.logits.cumsum(1).roll(1, 1)
        before[:, 0] = 0
        numbers = torch.arange(1, before.shape[1] + 1)[:, None]
        outputs.logits = outputs.logits + (0.03 * before / numbers).to(before.dtype)
        if labels is not None:
            outputs.loss = cross_entropy(outputs.logits[0, :-1].float(), labels[0, 1:])
        return outputs


def experts(kind=transformers.MixtralForCausalLM):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, **SIZES, **HEADS, **ENDS, "num_local_experts": 4}
        return kind(transformers.MixtralConfig(**sizes)).bfloat16().eval()


def mean_of_tokens(model, batch):
    return model(**batch, use_cache=False).loss


@needs_packs
@pytest.mark.parametrize("loss_fn", [None, mean_of_tokens])
def test_a_leak_below_the_rounding_of_experts_is_found(loss_fn):
    options = {"loss_fn": loss_fn, "max_steps": 1, "progress_bar": False}
    assert check_isolation(experts()).is_isolated
    train_loop(experts(), [packed_batch()], **options)
    report = check_isolation(experts(Peeking))
    assert not report.is_isolated
    assert report.leak < 4 * torch.finfo(torch.bfloat16).eps  # as little as rounding makes
    with pytest.raises(ModelError, match="see each other"):
        train_loop(experts(Peeking), [packed_batch()], **options)


@needs_packs
def test_a_pack_is_checked_by_its_documents():
    for loss_fn in (None, lm_loss):
        report = check_accumulation(model_of("Llama"), packed_batch(), loss_fn=loss_fn)
        assert report.is_exact, report
        assert report.num_rows == len(ROWS)
