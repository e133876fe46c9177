"""A causal language model that does not learn to end a text is reported before it is trained."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers import messages, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
)

from manualloop import DataError, prepare_dataloaders, train_loop
from manualloop.tasks import cut

TEXTS = ["good movie", "bad", "very dull acting", "fine"]


def tokenizer(pad="[SEP]", **options):
    return tiny_tokenizer(eos_token="[SEP]", pad_token=pad, **options)


def model(tok, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tok), num_attention_heads=2, **sizes, **config)
    )


def encoded(tok):
    return Dataset.from_list([{"input_ids": tok(text)["input_ids"]} for text in TEXTS])


def own_loss(model, batch):
    return model(**batch).loss


def train(loader, made, caplog, **options):
    caplog.clear()
    train_loop(made, loader, max_steps=1, progress_bar=False, **options)
    return [line for line in messages(caplog) if "never learns to end a text" in line]


def prepared(tok, made):
    collate = DataCollatorForLanguageModeling(tok, mlm=False)
    return prepare_dataloaders(encoded(tok), tok, model=made, collate_fn=collate)["train"]


def by_hand(tok, made):
    return DataLoader(encoded(tok), 2, collate_fn=DataCollatorForLanguageModeling(tok, mlm=False))


def by_preprocess(tok, made):
    """Labels that leave the pad token out, made before there is a collator."""

    def encode(rows):
        ids = tok(rows["text"], padding="max_length", max_length=6)["input_ids"]
        labels = [[-100 if t == tok.pad_token_id else t for t in row] for row in ids]
        mask = tok(rows["text"], padding="max_length", max_length=6)["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    data = Dataset.from_dict({"text": TEXTS})
    return prepare_dataloaders(data, tok, model=made, preprocess=encode)["train"]


def without_mask(tok, made):
    collate = DataCollatorForLanguageModeling(tok, mlm=False)
    rows = [tok(text)["input_ids"] for text in TEXTS]
    return DataLoader(rows, 2, collate_fn=collate)


LOADERS = [prepared, by_hand, by_preprocess, without_mask]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_pad_token_that_is_eos_is_reported_with_a_line_that_fixes_it(loader, side, caplog):
    tok = tokenizer(padding_side=side)
    made = model(tok)
    (line,) = train(loader(tok, made), made, caplog)
    assert "EOS is the pad token, too" in line
    fix = line.split("another pad token: ")[1].removesuffix(".")
    exec(fix, {"tokenizer": tok, "model": made})
    assert tok.pad_token_id != tok.eos_token_id == 3
    fixed = loader(tok, made)
    assert not train(fixed, made, caplog)
    assert (next(iter(fixed))["labels"] == 3).any()


def test_a_loss_of_the_users_does_not_hide_it(caplog):
    tok = tokenizer()
    made = model(tok)
    assert train(prepared(tok, made), made, caplog, loss_fn=own_loss)


def test_without_a_tokenizer_the_config_tells(caplog):
    tok = tokenizer()
    rows = [tok(text)["input_ids"] for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, 3)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 3, -100)}
    made = model(tok, eos_token_id=3)
    (line,) = train([batch], made, caplog)
    assert line.endswith("labels are -100 where attention_mask is 0, and elsewhere tokens.")


def test_what_is_right_is_not_reported(caplog):
    tok = tokenizer()
    data = Dataset.from_dict({"text": TEXTS})
    made = model(tok)
    # Our own padding knows its length, whatever the pad token is.
    loader = prepare_dataloaders(data, tok, model=made, preprocess=cut(tok, 8))["train"]
    batch = next(iter(loader))
    assert (batch["labels"] == 3).sum() == len(batch["labels"])
    assert not train(loader, made, caplog)
    # A prompt ends with EOS, and so does the answer, of which alone there are labels.
    chat = {"input_ids": torch.tensor([[4, 3, 5, 3]]), "labels": torch.tensor([[-100, -100, 5, 3]])}
    assert not train([chat], made, caplog)
    # A text without an end, of which nobody has said that it should have one.
    endless = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([[4, 5, 6]])}
    assert not train([endless], made, caplog)


def test_our_own_advice_does_not_lead_there():
    for options in ({}, {"unk_token": "[SEP]"}):
        tok = tiny_tokenizer(eos_token="[SEP]", pad_token=None, **options)
        made = model(tok)
        with pytest.raises(DataError, match="has no pad token") as error:
            prepare_dataloaders(encoded(tok), tok, model=made)
        line = str(error.value).split("Give it one: ")[1].removesuffix(".")
        exec(line, {"tokenizer": tok, "model": made})
        assert tok.pad_token_id not in (None, tok.eos_token_id)
        assert made.config.pad_token_id == tok.pad_token_id
        assert made.get_input_embeddings().num_embeddings > tok.pad_token_id
        padded = DataCollatorWithPadding(tok)([{"input_ids": [4]}, {"input_ids": [4, 5]}])
        made(**padded)
