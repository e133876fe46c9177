"""A wish to stop, of one rank, belongs to one run: the next one in the same ranks trains."""

import os

import pytest
import ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals"),
]


def test_each_run_of_the_same_ranks_ends_by_its_own_causes(tmp_path):
    ranks.run("two_runs.py", tmp_path)
