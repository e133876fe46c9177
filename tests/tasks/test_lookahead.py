"""A model that sees the tokens that it is to predict is refused, or reported if it is one's own."""

import copy

import pytest
import torch
import transformers
from helpers import messages
from tiny_language_models import (
    SIZES,
    VOCAB,
    gpt2,
    llama,
    of_kind,
    padded,
    paired,
    pairs_of,
    rows_of,
)
from torch.nn.functional import cross_entropy

from manualloop import ModelError, evaluate_loop, train_loop
from manualloop.tasks import distil, dpo, lm_loss
from manualloop.tasks.lookahead import refuse_lookahead

TOLD = "sees the tokens that are its labels"


def batch_of(lengths=(9, 12, 5)):
    return padded(rows_of(lengths))


def encoder(kind="Bert", name="BertLMHeadModel", **config):
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
    for weight in model.parameters():
        weight.data *= 3  # as large as trained ones
    return model


ENCODERS = {
    "Bert": ("Bert", "BertLMHeadModel"),
    "Roberta": ("Roberta", "RobertaForCausalLM"),
    "Electra": ("Electra", "ElectraForCausalLM"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_without_a_causal_mask_is_refused(kind, dtype):
    model = encoder(*ENCODERS[kind], max_position_embeddings=64).to(dtype)
    before = copy.deepcopy(model.state_dict())
    for loss_fn in (None, lm_loss, lambda model, batch: model(**batch).loss):
        with pytest.raises(ModelError, match=r"from_pretrained\(name, is_decoder=True\)"):
            train_loop(model, [batch_of()], loss_fn=loss_fn, max_steps=1, progress_bar=False)
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        evaluate_loop(model, [batch_of()], "perplexity")
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    fixed = encoder(*ENCODERS[kind], max_position_embeddings=64, is_decoder=True).to(dtype)
    train_loop(fixed, [batch_of()], max_steps=1, progress_bar=False)


def test_in_pairs_and_beside_a_teacher_it_is_refused():
    model, pairs = encoder(), paired(pairs_of(3))
    for loss_fn, batch in ((dpo(reference=encoder()), pairs), (distil(encoder()), batch_of())):
        with pytest.raises(ModelError, match="sees the tokens"):
            refuse_lookahead(model, [batch], loss_fn)
    for loss_fn, batch in ((dpo(reference=model), pairs), (distil(model), batch_of())):
        with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens"):
            refuse_lookahead(llama().float(), [batch], loss_fn)


CAUSAL = {
    "Llama": llama,
    "GPT2": gpt2,
    "Mixtral": lambda: of_kind("Mixtral", num_local_experts=2),
    "OPT": lambda: of_kind("OPT", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
    "Bloom": lambda: of_kind("Bloom", n_head=2, n_layer=1),
    "Mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    ),
    "Bert": lambda: encoder(is_decoder=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_left_alone(name, dtype, caplog):
    model, state = CAUSAL[name]().to(dtype).train(), torch.get_rng_state()
    refuse_lookahead(model, [batch_of()])
    refuse_lookahead(model, [batch_of()], lambda model, batch: model(**batch).loss)
    if name != "Mamba":
        refuse_lookahead(model, [paired(pairs_of(3))], dpo(reference=copy.deepcopy(model)))
    assert not messages(caplog)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_may_be_seen_as_a_whole():
    def loss_fn(model, batch):  # what lies before the first label sees all of it
        ids, labels = batch["input_ids"], batch["labels"]
        width = ids.shape[1]
        is_prompt = ((labels != -100).cumsum(1) == 0)[:, None, None]
        mask = torch.ones(width, width).tril().bool() | is_prompt
        mask = mask & (batch["attention_mask"] != 0)[:, None, None]
        return model(ids, attention_mask=mask, labels=labels).loss

    refuse_lookahead(llama().float(), [batch_of()], loss_fn)


class Own(torch.nn.Module):
    """A model of one's own, whose labels are the tokens in their places or those that follow."""

    def __init__(self, is_causal, shifts):
        super().__init__()
        self.words, self.is_causal, self.shifts = torch.nn.Embedding(VOCAB, 8), is_causal, shifts

    def forward(self, input_ids, labels):
        states = self.words(input_ids)
        width = input_ids.shape[1]
        seen = torch.ones(width, width).tril() if self.is_causal else torch.ones(width, width)
        logits = (seen / seen.sum(-1, keepdim=True)) @ states @ self.words.weight.T
        if self.shifts:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def own_batch(shifts):
    ids = torch.randint(3, VOCAB, (4, 9))
    if shifts:
        return {"input_ids": ids, "labels": ids.clone()}
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@pytest.mark.parametrize("loss_fn", [None, lambda model, batch: model(**batch)["loss"]])
@pytest.mark.parametrize("shifts", [True, False])
def test_a_model_of_ones_own_is_reported(shifts, loss_fn, caplog):
    options = {"loss_fn": loss_fn, "max_steps": 1, "progress_bar": False}
    train_loop(Own(True, shifts), [own_batch(shifts)], **options)
    assert not any(TOLD in line for line in messages(caplog))
    model = Own(False, shifts)
    for _ in range(2):
        train_loop(model, [own_batch(shifts)], **options)
    assert len([line for line in messages(caplog) if TOLD in line]) == 1


def test_other_labels_are_no_reason():
    batch = {**own_batch(True), "labels": torch.randint(0, 3, (4, 9))}
    refuse_lookahead(Own(False, True), [batch])
    tags = encoder("Bert", "BertForTokenClassification", num_labels=VOCAB)
    refuse_lookahead(tags, [own_batch(True)])
    masked = encoder("Bert", "BertForMaskedLM")
    refuse_lookahead(masked, [batch_of()])


class Counting:
    """A loss that counts its calls."""

    def __init__(self):
        self.num_calls, self.seen = 0, []

    def __call__(self, model, batch):
        self.num_calls += 1
        self.seen.append(len(batch["input_ids"]))
        return model(**batch).loss


def test_a_loss_does_not_count_the_trial():
    loss_fn = Counting()
    train_loop(llama().float(), [batch_of()], loss_fn=loss_fn, max_steps=1, progress_bar=False)
    assert (loss_fn.num_calls, loss_fn.seen) == (1, [3])
