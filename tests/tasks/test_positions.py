"""Positions that depend on the longest row of a batch: reported once, where a row is too long."""

import pytest
import torch
import transformers
from helpers import messages
from tiny_language_models import SIZES, llama, padded, rows_of

from manualloop import accumulate_gradients, evaluate_loop
from manualloop.tasks import lm_loss
from manualloop.tasks.mixing import is_blind_to_padding


def long_rope(rope="longrope"):
    """A model with other positions for rows beyond 8 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]}
    scaling = {"rope_type": rope, "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Phi3Config(
        **sizes, **dropout, original_max_position_embeddings=8, rope_scaling={**scaling, **factors}
    )
    return with_large_weights(transformers.Phi3ForCausalLM(config).double())


def dynamic_rope():
    scaling = {"rope_type": "dynamic", "factor": 9.0, "rope_theta": 100.0}
    return with_large_weights(llama(rope_scaling=scaling, max_position_embeddings=8))


def with_large_weights(model):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.4, generator=draw)
    return model


def packed(rows):
    """A batch of one pack, as ``DataCollatorWithFlattening`` makes it."""
    ids = [token for row in rows for token in row["input_ids"]]
    positions = [number for row in rows for number in range(len(row["input_ids"]))]
    batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return batch | {"labels": torch.where(batch["position_ids"] == 0, -100, batch["input_ids"])}


def told(caplog):
    return [line for line in messages(caplog) if "positions for the longest row" in line]


@pytest.mark.parametrize("make", [long_rope, dynamic_rope])
@pytest.mark.parametrize("form", [padded, packed])
def test_a_long_row_that_changes_others_is_reported_once(make, form, caplog):
    model, short, long = make(), rows_of((5, 7, 8)), rows_of((5, 20))
    evaluate_loop(model, [form(short)], "perplexity")
    evaluate_loop(model, [padded(long[1:])], "perplexity")  # nothing is beside it
    assert not told(caplog)
    found = evaluate_loop(model, [form(short), form(long)], "perplexity")
    alone = evaluate_loop(model, [padded([row]) for row in short + long], "perplexity")
    assert abs(found["loss"] - alone["loss"]) > 1e-5  # the reason for the line
    accumulate_gradients(model, [form(long)])
    (line,) = told(caplog)
    assert "up to 20 tokens" in line
    assert "more than 8" in line
    assert not is_blind_to_padding(model)


def test_rows_that_are_all_long_have_the_same_positions(caplog):
    model, rows = long_rope(), rows_of((12, 20, 9))
    found = evaluate_loop(model, [padded(rows)], "perplexity", loss_fn=lm_loss)
    alone = evaluate_loop(model, [padded([row]) for row in rows], "perplexity", loss_fn=lm_loss)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert not told(caplog)


def test_other_models_are_not_looked_at(caplog):
    evaluate_loop(llama(max_position_embeddings=8), [padded(rows_of((5, 20)))], "perplexity")
    assert not told(caplog)
    assert is_blind_to_padding(llama())
