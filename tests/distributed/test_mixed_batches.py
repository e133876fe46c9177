"""Two ranks count batches of several kinds as one process does."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_batches_of_several_kinds_train_and_score_as_in_one_process():
    ranks.run("mixed_batches.py")
