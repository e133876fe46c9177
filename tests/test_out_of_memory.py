"""Out of memory in a micro-batch: the same update, in smaller pieces, said once."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from tiny_language_models import gpt2, padded, paired, pairs_of, rows_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from manualloop import TrainState, apply_update, prepare_strategy, train_loop, train_steps
from manualloop.tasks import distil, dpo, lm_loss

NUM_ROWS = 32


class Backward(torch.autograd.Function):
    """Passes through, and runs out of memory on the way back if there are too many rows."""

    @staticmethod
    def forward(ctx, x, max_rows):
        ctx.max_rows = max_rows
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > ctx.max_rows:
            raise torch.OutOfMemoryError("fake: out of memory in backward")
        return grad, None


def make_model(max_rows=10**9, where="forward", **config):
    """Make a BERT that runs out of memory above so many rows, going forward or coming back."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"vocab_size": 20, "intermediate_size": 8, "num_labels": 4} | config
    model = BertForSequenceClassification(BertConfig(**sizes, **dropout, **options)).double()
    model.num_calls = 0
    return limited(model, model.bert.embeddings, max_rows, where)


def limited(model, layer, max_rows, where="forward"):
    def come_back(module, args, output):
        model.num_calls += 1
        if where == "forward" and len(output) > max_rows:
            raise torch.OutOfMemoryError("fake: out of memory in forward")
        return Backward.apply(output, max_rows) if where == "backward" else output

    layer.register_forward_hook(come_back)
    return model


def batches(sizes=(16, 9, 7)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (NUM_ROWS, 5), generator=generator)
    labels = torch.randint(4, (NUM_ROWS,), generator=generator)
    labels[::5] = -100
    parts = zip(ids.split(sizes), labels.split(sizes), strict=True)
    return [{"input_ids": ids, "labels": labels} for ids, labels in parts]


def train(model, **options):
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in train_steps(state, batches(), num_epochs=3, **options):
        pass
    return state


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("max_rows", [15, 8, 3, 1])
def test_weights_equal_those_of_the_undisturbed_run(max_rows, where, accumulation, caplog):
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
    undisturbed = train(make_model(), **options)
    with caplog.at_level("INFO", logger="manualloop"):
        disturbed = train(make_model(max_rows, where), **options)
    assert disturbed.progress == undisturbed.progress
    for ours, theirs in zip(
        disturbed.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert disturbed.max_batch_rows <= max_rows
    notices = [record.getMessage() for record in caplog.records]
    assert len(notices) == len(set(notices)) > 0, "a size was said twice"


def test_the_smaller_size_is_kept():
    model = make_model(max_rows=4)
    state = train(model)
    num_halvings = 2  # 16 -> 8 -> 4 rows, in the first update only
    assert state.max_batch_rows == 4
    assert model.num_calls == num_halvings + 3 * (4 + 3 + 2)


def test_a_single_row_that_does_not_fit_is_the_users_error():
    model = make_model(max_rows=0)
    before = copy.deepcopy(model.state_dict())
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with pytest.raises(torch.OutOfMemoryError, match="in forward"):
        apply_update(state, batches(), prepare_strategy("cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Contrastive(nn.Module):
    """Compares the rows of a batch inside of its forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 8, dtype=torch.float64)

    def forward(self, x, labels):
        points = F.normalize(self.linear(x))
        return {"loss": F.cross_entropy(points @ points.T / 0.1, torch.arange(len(x)))}


class OwnForSequenceClassification(BertForSequenceClassification):
    """Has the name of a head, and another loss."""

    def forward(self, labels=None, **columns):
        outputs = super().forward(**columns)
        points = F.normalize(outputs.logits)
        outputs.loss = F.cross_entropy(points @ points.T, torch.arange(len(points)))
        return outputs


def own_class():
    model = make_model()
    model.__class__ = OwnForSequenceClassification
    return model


def own_loss():
    model = make_model()
    model.loss_function = lambda **columns: columns["pooled_logits"].square().sum()
    return model


def normed():
    model = make_model()
    model.dropout = nn.BatchNorm1d(8).double()
    return model


def info_nce(model, batch):
    points = F.normalize(model(**batch).logits)
    return F.cross_entropy(points @ points.T / 0.1, torch.arange(len(points)))


X = {"x": torch.randn(16, 4, dtype=torch.float64), "labels": torch.arange(16) % 4}
DOUBTFUL = {
    "a loss_fn": (make_model, batches(), {"loss_fn": info_nce}, "whether loss_fn compares"),
    "terms": (
        make_model, batches(), {"terms": lambda outputs, batch: [(outputs.loss, 1)]},
        "whether terms compares",
    ),
    "a model of the user's": (Contrastive, [X], {}, "whether the loss of Contrastive compares"),
    "a subclass with a loss": (own_class, batches(), {}, "whether the loss of OwnForSequence"),
    "a loss_function": (own_loss, batches(), {}, "whether the loss of BertForSequence"),
    "batch normalisation": (normed, batches(), {}, r"dropout \(BatchNorm1d\) computes"),
    "a column of another length": (
        make_model, [part | {"position_ids": torch.arange(5)[None]} for part in batches()], {},
        "not every column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_nothing_is_split_where_rows_may_be_compared(kind, caplog):
    """The error comes, and tells what to try; a size that an older run has found is not used."""
    make, parts, options, doubt = DOUBTFUL[kind]
    model = make()
    layer = model.linear if kind == "a model of the user's" else model.bert.embeddings
    model.num_calls = 0
    limited(model, layer, max_rows=15)
    steps = []
    with pytest.raises(torch.OutOfMemoryError, match="fake") as error:
        train_loop(
            model, parts, None, None, num_epochs=1, on_step=steps.append, progress_bar=False,
            **options,
        )  # fmt: skip
    assert not steps
    text = str(error.value)
    assert "Try batch_size=8 with gradient_accumulation_steps=2" in text
    assert re.search(doubt, text), text
    assert "another loss" in text

    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.max_batch_rows = 4  # from a checkpoint of 0.1.0
    model.num_calls = 0
    apply_update(state, parts[-1:] if len(parts) > 1 else [{k: v[:7] for k, v in X.items()}],
                 prepare_strategy("cpu"), **options)  # fmt: skip
    assert model.num_calls == (1 if layer is getattr(model, "linear", None) else 2)  # its hooks


@pytest.mark.parametrize("kind", ["lm_loss", "dpo", "distil"])
def test_losses_that_compare_no_rows_may_be_split(kind, caplog):
    rows = {"dpo": pairs_of(7)}.get(kind, rows_of((5, 9, 4, 7, 3, 8, 6)))
    collate = paired if kind == "dpo" else padded
    other = gpt2(initializer_range=0.1)
    loss_fn = {"lm_loss": lm_loss, "dpo": dpo(reference=other), "distil": distil(other)}[kind]
    ends = []
    for max_rows in (10**9, 4):  # dpo has two rows a pair
        model = gpt2()
        model.num_calls = 0
        limited(model, model.transformer.wte, max_rows)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in train_steps(state, [collate(rows)], max_steps=2, loss_fn=loss_fn):
            pass
        ends.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    assert "out of memory with 7 rows" in caplog.text


def test_frozen_batch_normalisation_may_be_split():
    model = normed()
    limited(model, model.bert.pooler, max_rows=8)
    model.dropout.eval()
    state = TrainState(model.train(), torch.optim.SGD(model.parameters(), lr=0.1))
    model.dropout.eval()
    apply_update(state, batches(), prepare_strategy("cpu"))
    assert state.max_batch_rows == 8
