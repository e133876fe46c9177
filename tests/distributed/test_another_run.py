"""A finished run of two ranks is recognized by all of them, and by one process."""

import pytest
import ranks
from another_run import train

pytestmark = pytest.mark.distributed


def test_all_ranks_refuse_another_run_and_one_process_gets_the_result(tmp_path):
    ranks.run("another_run.py", tmp_path)
    assert train(tmp_path) == []
    assert train(tmp_path, gradient_accumulation_steps=2) == []  # the same updates
    assert "- lr: 0.01 -> 0.02" in train(tmp_path, lr=0.02)
