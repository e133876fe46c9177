"""A ``decode`` that gets the model; prompts padded on the right are refused, whoever pads them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import messages
from transformers import GPT2Config, GPT2LMHeadModel

from manualloop import DataError, evaluate_loop, predict_loop, prepare_strategy, train_loop
from manualloop.evaluation.trial import try_evaluation

EOS = 3


def model(**config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=EOS, **config))


def batch(side="right"):
    rows = [[4, 5, 6], [7], [8, 9]]
    ids, mask = torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    for number, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(3 - len(row), 3)
        ids[number, part], mask[number, part] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def written(made, batch, **options):
    columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False, **options}
    return made.generate(**columns, **options).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"max_new_tokens": 1}], ids=str
)
def test_prompts_padded_on_the_right_are_refused(options):
    made = model()
    by_closure = lambda outputs, batch: written(made, batch, **options)  # noqa: E731
    by_parameter = lambda outputs, batch, model: written(model, batch, **options)  # noqa: E731
    for decode in (by_closure, by_parameter):
        with pytest.raises(DataError, match=r"decode=manualloop.tasks.generated\(tokenizer\)"):
            predict_loop(made, [batch()], decode=decode)
        assert len(predict_loop(made, [batch("left")], decode=decode).predictions) == 3
    assert not made._forward_pre_hooks
    evaluate_loop(made, [batch()])


def test_forward_passes_in_a_decode_are_no_generation():
    made = model()

    def decode(outputs, batch, model):
        columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wider = {n: torch.nn.functional.pad(c, (0, 1), value=0) for n, c in columns.items()}
        assert model(**columns).logits.shape[1] + 1 == model(**wider).logits.shape[1]
        return [""] * len(batch["input_ids"])

    assert predict_loop(made, [batch()], decode=decode).predictions == [""] * 3


def test_only_a_parameter_called_model_gets_the_model():
    made = model()

    def third(outputs, batch, more=2):
        return [more] * 3

    def bound(outputs, batch, model):
        return [type(model).__name__] * 3

    for decode, expected in (
        (third, 2),
        (bound, "GPT2LMHeadModel"),
        (partial(bound), "GPT2LMHeadModel"),
        (partial(bound, model=7), "int"),
    ):
        assert predict_loop(made, [batch()], decode=decode).predictions == [expected] * 3


def test_the_model_runs_in_the_precision_of_the_strategy():
    made, seen = model(), []

    def decode(outputs, batch, model):
        seen.append(model(batch["input_ids"]).logits.dtype)
        assert not torch.is_grad_enabled()
        assert not model.training
        return [""] * 3

    predict_loop(made, [batch()], decode=decode, strategy=prepare_strategy("cpu"))
    predict_loop(
        made, [batch()], decode=decode, strategy=prepare_strategy("cpu", mixed_precision="bf16")
    )
    assert seen == [torch.float32, torch.bfloat16]


class Shown:
    """A ``decode`` whose first two rows are shown, and which needs no forward pass."""

    shows, uses_outputs = 2, False

    def __call__(self, outputs, batch, model):
        self.outputs = outputs
        return [f"text {number}" for number in range(len(batch["input_ids"]))]


def test_samples_are_shown_once_in_an_evaluation_and_not_in_its_trial(caplog):
    made, decode = model(), Shown()
    metric = lambda predictions, references: {"rows": len(predictions)}  # noqa: E731
    evaluate = partial(evaluate_loop, made, [batch(), batch()], metric, decode=decode)
    assert try_evaluation(evaluate) is not None
    assert not [line for line in messages(caplog) if "the model writes" in line]
    train_loop(made, [batch()], num_epochs=1, evaluate=evaluate, progress_bar=False)
    shown = [line for line in messages(caplog) if "the model writes" in line]
    assert [line.split(";")[0] for line in shown] == [
        "row 0: the model writes 'text 0'",
        "row 1: the model writes 'text 1'",
    ]


def test_a_forward_pass_is_left_out_where_nobody_uses_it():
    made, decode, calls = model(), Shown(), []
    made.register_forward_hook(lambda *of: calls.append(1))
    predict_loop(made, [batch()], decode=decode)
    assert decode.outputs is None
    assert not calls
    unlabelled = {name: column for name, column in batch().items() if name != "labels"}
    evaluate_loop(made, [unlabelled], lambda predictions, references, kept: {"n": 1}, decode=decode)
    assert not calls
    evaluate = partial(evaluate_loop, made, [batch()], lambda predictions, references: {"n": 1})
    evaluate(decode=decode)  # which tries once whether the model sees the next token
    calls.clear()
    scores = evaluate(decode=decode)
    assert calls == [1]
    assert scores["loss"] > 0
