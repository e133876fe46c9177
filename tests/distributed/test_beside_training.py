"""Two ranks evaluate, save and resume as one process does."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_an_evaluation_beside_training_on_two_ranks(tmp_path):
    ranks.run("beside_training.py", tmp_path)
