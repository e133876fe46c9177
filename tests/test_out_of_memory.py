"""Out of memory in a micro-batch: the same update, in smaller pieces, said once."""

import copy

import pytest
import torch

from manualloop import TrainState, apply_update, prepare_strategy, train_steps

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


class Model(torch.nn.Module):
    """Runs out of memory above so many rows, going forward or coming back."""

    def __init__(self, max_rows=10**9, where="forward"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        self.max_rows, self.where, self.num_calls = max_rows, where, 0

    def forward(self, x, labels):
        self.num_calls += 1
        if self.where == "forward" and len(x) > self.max_rows:
            raise torch.OutOfMemoryError("fake: out of memory in forward")
        hidden = self.first(x).tanh()
        if self.where == "backward":
            hidden = Backward.apply(hidden, self.max_rows)  # the second layer has its gradient then
        logits = self.second(hidden)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(sizes=(16, 9, 7)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (NUM_ROWS,), generator=generator)
    labels[::5] = -100
    parts = zip(x.split(sizes), labels.split(sizes), strict=True)
    return [{"x": x, "labels": labels} for x, labels in parts]


def train(model, **options):
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for _ in train_steps(state, batches(), num_epochs=3, **options):
        pass
    return state


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("max_rows", [15, 8, 3, 1])
def test_weights_equal_those_of_the_undisturbed_run(max_rows, where, accumulation, caplog):
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
    undisturbed = train(Model(), **options)
    with caplog.at_level("INFO", logger="manualloop"):
        disturbed = train(Model(max_rows, where), **options)
    assert disturbed.progress == undisturbed.progress
    for ours, theirs in zip(
        disturbed.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert disturbed.max_batch_rows <= max_rows
    notices = [record.getMessage() for record in caplog.records]
    assert len(notices) == len(set(notices)) > 0, "a size was said twice"


def test_the_smaller_size_is_kept():
    model = Model(max_rows=4)
    state = train(model)
    num_halvings = 2  # 16 -> 8 -> 4 rows, in the first update only
    assert state.max_batch_rows == 4
    assert model.num_calls == num_halvings + 3 * (4 + 3 + 2)


def test_a_single_row_that_does_not_fit_is_the_users_error():
    model = Model(max_rows=0)
    before = copy.deepcopy(model.state_dict())
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with pytest.raises(torch.OutOfMemoryError, match="in forward"):
        apply_update(state, batches(), prepare_strategy("cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
