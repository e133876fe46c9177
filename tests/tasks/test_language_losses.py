"""lm_loss and distil: the model's own loss and gradient, in pieces, for any split; or refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_language_models import (
    VOCAB,
    apart,
    gpt2,
    gradients,
    llama,
    needs_packs,
    of_kind,
    padded,
    rows_of,
)
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForCausalLM

from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    TrainState,
    accumulate_gradients,
    check_accumulation,
    count_items,
    evaluate_loop,
    train_loop,
    train_steps,
)
from manualloop.tasks import distil, heads, lm_loss

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft

BATCH = padded(rows_of((9, 4, 12, 2, 7)))
MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2, tied": gpt2,
    "gemma2, capped": lambda: of_kind("Gemma2", final_logit_softcapping=3.0, sliding_window=16),
    "cohere, scaled": lambda: of_kind("Cohere", logit_scale=0.0625),
    "granite, divided": lambda: of_kind("Granite", logits_scaling=7.0),
    "opt, projected": lambda: of_kind("OPT", ffn_dim=24, word_embed_proj_dim=8, dropout=0.0),
}


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of three positions, so that a small batch has several."""
    monkeypatch.setattr(heads, "_PIECE", 3 * VOCAB)
    monkeypatch.setattr(heads, "_MIN_ROWS", 1)


def own_loss(model, batch):
    """The model's own loss, without transformers' cast to float32."""
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def both(model, batch, loss_fn=lm_loss):
    """Loss and gradient of the model's own loss, and those of a loss_fn."""
    found = []
    for function in (own_loss, loss_fn):
        model.zero_grad()
        result = function(model, batch)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_the_models_own(name, pieces):
    (loss, gradient), (ours, found) = both(MODELS[name](), BATCH)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_and_items(left):
    model, batch = llama(), padded(rows_of((9, 4, 12)), left=left)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    (loss, gradient), (ours, found) = both(model, batch)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12
    assert lm_loss(model, batch)[1] == int((batch["labels"] != -100).sum())
    assert lm_loss.items(batch) == lm_loss(model, batch)[1]


def test_adapters_on_the_head_too(pieces):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(), config).double()
    (loss, gradient), (ours, found) = both(model, BATCH)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12


def test_dropout_in_the_head_is_that_of_the_forward_pass(pieces):
    config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(llama(), config).double()
    lm_loss(model, BATCH)  # proved
    torch.manual_seed(1)
    loss, _ = lm_loss(model, BATCH)
    loss.backward()
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    index, step = tuple(int(i) for i in weight.grad.abs().flatten().argmax().view(1)), 1e-6
    with torch.no_grad():
        numbers = []
        for sign in (1, -1):
            weight.view(-1)[index[0]] += sign * step
            torch.manual_seed(1)
            numbers.append(float(lm_loss(model, BATCH)[0].detach()))
            weight.view(-1)[index[0]] -= sign * step
    slope = (numbers[0] - numbers[1]) / (2 * step)
    assert slope == pytest.approx(float(weight.grad.view(-1)[index[0]]), rel=1e-5), name


def test_a_soft_prompt_before_the_tokens():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(llama(), config).double()
    (loss, gradient), (ours, found) = both(model, BATCH)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12


PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8
    ),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_soft_prompt_predicts_the_first_token(kind):
    model, rows = get_peft_model(llama(), PROMPTS[kind]).double(), rows_of((9, 4, 7), prompt=0)
    batch, is_soft = padded(rows), kind != "prefix"
    num_items = int((batch["labels"][:, 0 if is_soft else 1 :] != -100).sum())
    assert count_items(model, batch) == num_items
    report = check_accumulation(model, batch)
    assert report.num_items == num_items
    assert "Any split is the same update" in str(report)
    if is_soft:
        with pytest.raises(ModelError, match=r"soft prompt .* predicts the first token"):
            lm_loss(model, batch)
        batch["labels"][:, 0] = -100
    (loss, gradient), (ours, found) = both(model, batch)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12


@needs_packs
def test_packed_rows_stay_apart():
    """Restarted positions without a mask keep documents apart only without a cache."""
    rows = rows_of((5, 9, 3))
    pack = {
        "input_ids": torch.tensor([[t for row in rows for t in row["input_ids"]]]),
        "labels": torch.tensor([[t for row in rows for t in (-100, *row["labels"][1:])]]),
        "position_ids": torch.tensor([[p for row in rows for p in range(len(row["input_ids"]))]]),
    }
    model = llama()
    packed, items = lm_loss(model, pack)
    alone = [lm_loss(model, padded([row])) for row in rows]
    assert items == sum(n for _, n in alone)
    total = sum(float(mean.detach()) * n for mean, n in alone)
    assert float(packed.detach()) == pytest.approx(total / items, rel=1e-12)


@pytest.mark.exhaustive  # dynamo takes seconds, and warns of what it looks at
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_models_and_the_proof_is_not_compiled_in(pieces):
    model = llama()
    expected = both(model, BATCH)[0]
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    loss, _ = lm_loss(compiled, BATCH)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected[0], rel=1e-12)
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled).items()}
    assert apart(found, expected[1]) < 1e-12
    assert float(compiled(**BATCH).loss.detach()) == pytest.approx(
        float(model(**BATCH).loss.detach()), rel=1e-6
    )
    torch.compiler.reset()


def test_bfloat16_by_autocast_and_by_weights(pieces):
    model = llama().float()
    batch = padded(rows_of((9, 4, 12)))
    lm_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**batch).loss
        ours, _ = lm_loss(model, batch)
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    own.backward()
    expected = gradients(model)
    model.zero_grad()
    ours.backward()
    assert apart(gradients(model), expected) < 2e-2
    half = model.bfloat16()
    assert float(lm_loss(half, batch)[0].detach()) == pytest.approx(
        float(half(**batch).loss.detach()), rel=1e-5
    )


def test_any_split_is_the_same_update():
    rows = rows_of((9, 4, 12, 2, 7, 3, 8))
    whole, model = llama(), llama()
    accumulate_gradients(whole, [padded(rows)], loss_fn=lm_loss)
    parts = [padded(part) for part in (rows[:3], rows[3:4], rows[4:])]
    update = accumulate_gradients(model, parts, loss_fn=lm_loss)
    assert update.num_items == lm_loss.items(padded(rows))
    assert apart(gradients(model), gradients(whole)) < 1e-12
    report = check_accumulation(llama().float(), padded(rows), loss_fn=lm_loss)
    assert report.is_exact, report


def test_short_windows_of_an_epoch_are_exact():
    rows = rows_of((9, 4, 12, 2, 7))
    ends = []
    for size in (1, 2):
        model = llama()
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.5))
        loader = [padded(rows[at : at + size]) for at in range(0, 5, size)]
        options = {"num_epochs": 1, "gradient_accumulation_steps": 4 // size}
        for _ in train_steps(state, loader, loss_fn=lm_loss, **options):
            pass
        ends.append({name: weight.detach() for name, weight in model.named_parameters()})
    assert apart(*ends) < 1e-12


def test_evaluation_does_not_depend_on_the_batch_size():
    model, rows = llama(), rows_of((9, 4, 12, 2, 7, 3))
    scores = [
        evaluate_loop(
            model,
            [padded(rows[at : at + size]) for at in range(0, 6, size)],
            "perplexity",
            loss_fn=lm_loss,
        )
        for size in (1, 2, 4, 6)
    ]
    for score in scores:
        assert score["loss"] == pytest.approx(
            float(own_loss(model, padded(rows)).detach()), rel=1e-12
        )
        assert score["perplexity"] == pytest.approx(scores[0]["perplexity"], rel=1e-12)


def test_metrics_of_tokens_are_refused():
    with pytest.raises((DataError, ModelError, ValueError), match=r"shape|predictions"):
        evaluate_loop(llama(), [BATCH], "accuracy", loss_fn=lm_loss)


class Doubled(LlamaForCausalLM):
    """Its logits are twice what its head returns, which no config tells."""

    def forward(self, **inputs):
        labels = inputs.pop("labels", None)
        outputs = super().forward(**inputs)
        outputs.logits = 2 * outputs.logits
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


class Capped(LlamaForCausalLM):
    """It caps its logits, which makes no difference to those of a new model."""

    def forward(self, **inputs):
        labels = inputs.pop("labels", None)
        outputs = super().forward(**inputs)
        outputs.logits = torch.tanh(outputs.logits / 30) * 30
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


def mixtral():
    return of_kind("Mixtral", num_local_experts=2, output_router_logits=True).float()


@pytest.mark.parametrize("kind", [Doubled, Capped, mixtral])
def test_another_loss_is_refused_before_the_first_update(kind, updates):
    model = kind() if kind is mixtral else kind(llama().config)
    with pytest.raises(ModelError, match=r"loss of \d+\.\d+ on .*own loss is \d+\.\d+.*out"):
        train_loop(model, [BATCH], loss_fn=lm_loss, max_steps=1, progress_bar=False)
    assert not updates


class Penalized(LlamaForCausalLM):
    """It adds a small loss of its logits."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1e-4 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


@pytest.mark.parametrize("by", ["weights", "autocast"])
@pytest.mark.parametrize("kind", [mixtral, Penalized])
def test_rounding_hides_no_other_loss(kind, by):
    model = (kind() if kind is mixtral else kind(llama().config)).float()
    with torch.autocast("cpu", enabled=by == "autocast"), pytest.raises(ModelError, match="adds"):
        lm_loss(model.bfloat16() if by == "weights" else model, BATCH)


def test_a_setting_that_changes_is_proved_again():
    model = of_kind("Granite", logits_scaling=7.0)
    lm_loss(model, BATCH)
    model.config.logits_scaling = 3.0
    (loss, gradient), (ours, found) = both(model, BATCH)
    assert ours == pytest.approx(loss, rel=1e-12)
    assert apart(found, gradient) < 1e-12


def test_other_models_and_batches_are_refused():
    with pytest.raises(ModelError, match="no causal language model"):
        lm_loss(torch.nn.Linear(2, 2), BATCH)
    with pytest.raises(ModelError, match="no causal language model"):
        lm_loss(llama(kind="LlamaForSequenceClassification"), BATCH)
    with pytest.raises(DataError, match="labels"):
        lm_loss(llama(), {"input_ids": BATCH["input_ids"]})


def test_the_proof_is_made_once_and_leaves_no_trace():
    model, calls = gpt2(resid_pdrop=0.5), []
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    heads.proved_head(model, BATCH)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    first = len(calls)
    lm_loss(model, BATCH)
    assert len(calls) == first + 1
    assert not model.lm_head._forward_hooks


@pytest.mark.parametrize("rows", [[{"input_ids": [3, 4], "labels": [-100, -100]}], None])
def test_a_batch_without_labels_has_no_items_and_no_gradient(rows):
    model = llama()
    batch = padded(rows) if rows else {k: c[:, :1] for k, c in BATCH.items()}
    loss, items = lm_loss(model, batch)
    loss.backward()
    assert (float(loss.detach()), items) == (0.0, 0)
    assert all(not gradient.any() for gradient in gradients(model).values())


def distilled(model, teacher, batch, temperature, alpha):
    """The loss of distil, written out."""
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    kept, labels = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    logits, wanted = (m(**inputs).logits[:, :-1][kept] for m in (model, teacher))
    goal = (wanted / temperature).softmax(-1).detach()
    apart = (goal * (goal.log() - (logits / temperature).log_softmax(-1))).sum(-1).mean()
    own = F.cross_entropy(logits, labels[kept])
    return alpha * temperature**2 * apart + (1 - alpha) * own


@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.5), (1.0, 1.0), (3.0, 0.0)])
def test_distil_is_the_formula(temperature, alpha, pieces):
    teacher, model = llama(seed=1, hidden_size=24), llama()
    loss_fn = distil(teacher, temperature=temperature, alpha=alpha)
    ours, items = loss_fn(model, BATCH)
    ours.backward()
    found = gradients(model)
    model.zero_grad()
    expected = distilled(model, teacher, BATCH, temperature, alpha)
    expected.backward()
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert apart(found, gradients(model)) < 1e-12
    assert items == loss_fn.items(BATCH) == lm_loss.items(BATCH)
    assert not teacher.training
    assert all(weight.grad is None for weight in teacher.parameters())
    assert check_accumulation(model, BATCH, loss_fn=loss_fn).is_exact


def test_distil_refuses_what_cannot_be_meant():
    model = llama()
    with pytest.raises(ConfigError, match="teacher has weights of the model that is trained"):
        distil(model)(model, BATCH)
    with pytest.raises(ModelError, match=r"51 logits .* 41"):
        distil(llama(vocab_size=51))(model, BATCH)
    for options in ({"temperature": 0}, {"alpha": 1.5}):
        with pytest.raises(ConfigError):
            distil(llama(), **options)
    with pytest.raises(ConfigError, match="not a model"):
        distil("gpt2")
    assert pickle.loads(pickle.dumps(lm_loss)) is lm_loss


def test_a_compiled_model_whose_head_hides_a_layer_is_refused():
    sizes = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    config = RobertaConfig(**sizes, **depth, is_decoder=True)
    model = RobertaForCausalLM(config).eval()
    batch = padded(rows_of((9, 4, 12)))
    lm_loss(model, batch)
    with pytest.raises(ModelError, match="Leave it uncompiled"):
        lm_loss(torch.compile(model, backend="eager"), batch)
    torch.compiler.reset()
