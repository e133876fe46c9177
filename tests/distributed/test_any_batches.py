"""Two ranks make the updates of one process from batches and losses of any kind."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_make_the_updates_of_one_process():
    ranks.run("any_batches.py")
