"""Two gloo processes, ragged micro-batches: the gradient is that of the one big batch."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_gradients_of_two_ranks_equal_the_big_batch():
    """gloo_gradients.py asserts on both ranks, for heads, splits and ranks without an item."""
    outputs = ranks.run("gloo_gradients.py", ACCELERATE_USE_CPU=1)
    assert all("6 heads, 18 splits" in output for output in outputs), "\n".join(outputs)
