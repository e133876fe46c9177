"""Weights spread over two gloo ranks by fully_shard: trained, scored, saved, resumed."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_sharded_weights_train_as_ddp_does_and_resume_exactly(tmp_path):
    """sharded.py asserts on both ranks."""
    outputs = ranks.run("sharded.py", tmp_path)
    assert all("8 steps, at most" in output for output in outputs), "\n".join(outputs)
