"""Items are counted as torch's losses average, on any device and without a wait on the CPU."""

import pytest
import torch

from manualloop.tasks.places import count_positions
from manualloop.tasks.task import count_kept, count_shifted_labels


@pytest.mark.parametrize("shape", [(0,), (1,), (64,), (65,), (3, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_labels_that_are_kept_are_counted_as_torch_counts_them(shape, dtype):
    labels = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[labels == -1] = -100
    assert count_kept(labels) == int((labels != -100).sum())


def test_labels_that_are_not_contiguous_are_counted():
    labels = torch.tensor([[1, -100], [2, 3], [-100, 4]]).t()
    assert count_kept(labels) == 4
    assert count_kept(labels[..., 1:]) == 3


def test_no_position_predicts_the_first_token():
    assert count_shifted_labels({"labels": torch.tensor([[1, 2, -100], [3, -100, 5]])}) == (2,)


def test_starts_and_ends_are_counted_apart():
    batch = {
        "input_ids": torch.zeros(3, 4),
        "start_positions": torch.tensor([0, 4, 9]),
        "end_positions": torch.tensor([3, 1, 4]),
    }
    assert count_positions(batch) == (1, 2)
