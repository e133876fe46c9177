"""Tasks on two ranks: updates, evaluation and resumption as in one process."""

import pytest
import ranks
import same_tasks

pytestmark = pytest.mark.distributed


def test_tasks_on_two_ranks(tmp_path):
    """same_tasks.py asserts on every rank."""
    outputs = ranks.run("same_tasks.py", tmp_path)
    for name in same_tasks.JOBS:
        assert all(f"{name} is the same" in output for output in outputs), "\n".join(outputs)
