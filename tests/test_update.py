"""Windows and gradients: every batch once, in order, and the gradient of the one big batch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    SingleDevice,
    TrainState,
    accumulate_gradients,
    apply_update,
    evaluate_loop,
    windows,
)
from manualloop.data.sampler import OrderedBatchSampler


def batches_of(*sizes):
    start, batches = 0, []
    for size in sizes:
        batches.append({"x": torch.arange(start, start + size)})
        start += size
    return batches


class Stream(IterableDataset):
    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __iter__(self):
        yield from range(self.num_rows)


@given(
    sizes=st.lists(st.integers(1, 4), max_size=12),
    size=st.integers(1, 5),
    has_length=st.booleans(),
)
def test_windows_hold_every_batch_once_and_in_order(sizes, size, has_length):
    batches = batches_of(*sizes)
    loader = batches if has_length else iter(batches)
    found = list(windows(loader, size))
    assert [batch["x"].tolist() for window in found for batch in window.batches] == [
        batch["x"].tolist() for batch in batches
    ]
    assert [len(window.batches) for window in found[:-1]] == [size] * (len(found) - 1)
    assert [window.ends_epoch for window in found] == [False] * (len(found) - 1) + [True] * bool(
        found
    )
    assert sum(window.num_samples for window in found) == sum(sizes)


@given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 5), size=st.integers(1, 3))
def test_skipping_gives_the_rest_and_nothing_twice(num_rows, batch_size, size):
    sampler = OrderedBatchSampler(num_rows, batch_size, shuffle=True, seed=3)
    loader = DataLoader(
        range(num_rows), batch_sampler=sampler, collate_fn=lambda x: {"x": torch.tensor(x)}
    )

    def rows(found):
        return [row for window in found for batch in window.batches for row in batch["x"].tolist()]

    whole = list(windows(loader, size))
    position = 0
    for number, window in enumerate(whole):
        rest = list(windows(loader, size, skip=position))
        assert rows(rest) == rows(whole[number:])
        assert [w.ends_epoch for w in rest] == [w.ends_epoch for w in whole[number:]]
        position += window.num_samples


def test_a_loader_with_a_length_is_never_read_ahead():
    read = []

    class Recording(list):
        def __iter__(self):
            for batch in super().__iter__():
                read.append(len(batch["x"]))
                yield batch

    pass_over = windows(Recording(batches_of(1, 2, 3, 4)), 2)
    next(pass_over)
    assert read == [1, 2]


def test_a_stream_tells_its_last_window():
    loader = DataLoader(Stream(7), batch_size=2)
    assert [window.ends_epoch for window in windows(loader, 2)] == [False, True]


@pytest.mark.parametrize(("claimed", "found"), [(2, "more than 2"), (4, "3")])
def test_a_wrong_length_is_an_error(claimed, found):
    class Liar(list):
        def __len__(self):
            return claimed

    with pytest.raises(DataError, match=rf"gave {found} batches, but its len\(\) is {claimed}"):
        list(windows(Liar(batches_of(1, 1, 1)), 1))


class Line(torch.nn.Module):
    """y = w . x in float64, with transformers' way of returning a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x, labels):
        logits = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(num_rows, *, ignored=()):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (num_rows,), generator=generator)
    labels[list(ignored)] = -100
    return {
        "x": torch.randn(num_rows, 3, dtype=torch.float64, generator=generator),
        "labels": labels,
    }


def split(batch, sizes):
    parts = {name: tensor.split(sizes) for name, tensor in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    ignored=st.sets(st.integers(0, 5)),
    counted_by_loss_fn=st.booleans(),
)
def test_any_split_has_the_gradient_of_the_one_batch(cuts, ignored, counted_by_loss_fn):
    """Labels of -100 make micro-batches hold different numbers of items, some none."""
    num_rows = sum(cuts)
    batch = rows(num_rows, ignored=[i for i in ignored if i < num_rows - 1])
    loss_fn = None
    if counted_by_loss_fn:

        def loss_fn(model, batch):
            kept = batch["labels"] != -100
            return model(**batch)["loss"], int(kept.sum())

    whole, parts = Line(), Line()
    whole(**batch)["loss"].backward()
    update = accumulate_gradients(parts, split(batch, cuts), loss_fn=loss_fn)
    for ours, theirs in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(update.loss, whole(**batch)["loss"].detach(), rtol=1e-12, atol=0)
    assert update.num_items == int((batch["labels"] != -100).sum())
    assert not update.loss.requires_grad


def test_items_that_only_the_loss_knows_are_weighted_by_one_rescale():
    """Hard-negative mining: the loss keeps rows by their value, which no count can foresee."""

    def hard_rows(model, batch):
        losses = torch.nn.functional.cross_entropy(
            model.linear(batch["x"]), batch["labels"], reduction="none"
        )
        hard = losses > 0.6
        return losses[hard].mean(), hard.sum()

    batch = rows(12)
    whole, parts = Line(), Line()
    loss, _ = hard_rows(whole, batch)
    loss.backward()
    update = accumulate_gradients(parts, split(batch, [5, 4, 3]), loss_fn=hard_rows)
    assert 0 < update.num_items < 12
    for ours, theirs in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_class_weights_are_items_of_a_fraction():
    weight = torch.tensor([0.2, 3.1], dtype=torch.float64)

    def weighted(model, batch):
        logits = model.linear(batch["x"])
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], weight=weight)
        return loss, weight[batch["labels"]].sum()

    batch = rows(12)
    whole, parts = Line(), Line()
    loss, num_items = weighted(whole, batch)
    loss.backward()
    update = accumulate_gradients(parts, split(batch, [1, 7, 4]), loss_fn=weighted)
    assert update.num_items == pytest.approx(float(num_items), rel=1e-12)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-12, atol=1e-14)
    scores = [
        evaluate_loop(whole, split(batch, sizes), loss_fn=weighted)["loss"]
        for sizes in ([12], [1, 7, 4])
    ]
    assert scores == pytest.approx([float(loss.detach())] * 2, rel=1e-12)


def test_a_loss_fn_may_count_where_labels_are_all_ignored():
    def distilled(model, batch):
        return model.linear(batch["x"]).square().mean(), len(batch["x"])

    batch = rows(6, ignored=range(6))
    whole, parts = Line(), Line()
    distilled(whole, batch)[0].backward()
    assert accumulate_gradients(parts, split(batch, [2, 4]), loss_fn=distilled).num_items == 6
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-12, atol=1e-14)


def test_parameters_of_the_loss_are_rescaled_too():
    """A learned temperature, in the optimizer but not in the model."""
    batch = rows(8)

    def loss_of(temperature):
        def loss_fn(model, batch):
            losses = torch.nn.functional.cross_entropy(
                model.linear(batch["x"]) * temperature, batch["labels"], reduction="none"
            )
            kept = batch["x"][:, 0] > 0
            return losses[kept].mean(), int(kept.sum())

        return loss_fn

    found = []
    for sizes in ([8], [3, 5]):
        model, temperature = Line(), torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
        state = TrainState(model, optimizer)
        apply_update(state, split(batch, sizes), SingleDevice(), loss_fn=loss_of(temperature))
        found.append(float(temperature.grad))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: model.linear(batch["x"]).detach().mean(),
        lambda model, batch: model.linear(batch["x"]),
        lambda model, batch: 0.5,
    ],
)
def test_a_loss_that_cannot_be_learned_from_says_so(loss_fn):
    with pytest.raises(ModelError, match="must be one number that depends on trainable"):
        accumulate_gradients(Line(), [rows(4)], loss_fn=loss_fn)


def test_one_micro_batch_keeps_the_bits():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    x = torch.randn(7, 3)

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean(), 5  # any count: a single mean is taken as it is

    loss_fn(twin, {"x": x})[0].backward()
    update = accumulate_gradients(model, [{"x": x}], loss_fn=loss_fn)
    assert torch.equal(model.weight.grad, twin.weight.grad)
    assert update.num_items == 5


def test_an_update_takes_one_of_loss_fn_and_terms():
    model = torch.nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), None)
    both = {"loss_fn": lambda model, batch: None, "terms": lambda outputs, batch: []}
    with pytest.raises(ConfigError, match="loss_fn"):
        apply_update(state, batches_of(2), SingleDevice(), **both)


def test_nothing_to_learn_from_moves_nothing():
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = TrainState(model, optimizer, lr_scheduler)
    before = copy.deepcopy(model.state_dict())
    batch = rows(4, ignored=range(4))
    update = apply_update(state, [batch, batch], SingleDevice(), max_grad_norm=1.0)
    assert (update.applied, update.num_items) == (False, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert lr_scheduler.last_epoch == 0
    assert not optimizer.state


def test_clipping_comes_after_weighting():
    batch = rows(9)
    whole, parts = Line(), Line()
    whole(**batch)["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    state = TrainState(parts, torch.optim.SGD(parts.parameters(), lr=1.0))
    update = apply_update(state, split(batch, [4, 4, 1]), SingleDevice(), max_grad_norm=0.01)
    torch.testing.assert_close(update.grad_norm, norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-12, atol=1e-14)


def test_a_model_without_a_loss_says_so():
    with pytest.raises(ModelError, match=r"forward returned a Tensor of shape \(2, 1\), not"):
        accumulate_gradients(torch.nn.Linear(1, 1), [{"input": torch.zeros(2, 1)}])


@pytest.mark.parametrize("by_state", [False, True])
def test_weights_that_the_loop_does_not_know_are_rescaled_too(by_state):
    """A head beside the model, with items that only the loss counts, and a loose temperature."""
    batch = rows(8)
    model, head, temperature = Line(), torch.nn.Linear(1, 1).double(), torch.zeros(1)
    temperature = temperature.double().requires_grad_()

    def loss_fn(model, batch):
        out = head(model(**batch)["loss"].reshape(1, 1)) * temperature.exp()
        return out.sum(), 2.5 * len(batch["labels"])

    known = [*model.parameters(), *head.parameters(), temperature]
    means = [loss_fn(model, part)[0] for part in split(batch, [5, 3])]
    wanted = torch.autograd.grad((means[0] * 5 + means[1] * 3) / 8, known)
    if by_state:
        other = torch.optim.SGD([*head.parameters(), temperature], lr=0.0)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
        state.extras["other"] = other
        apply_update(state, split(batch, [5, 3]), SingleDevice(), loss_fn=loss_fn)
    else:
        accumulate_gradients(model, split(batch, [5, 3]), loss_fn=loss_fn)
    torch.testing.assert_close([w.grad for w in known], [*wanted], rtol=1e-12, atol=1e-14)
