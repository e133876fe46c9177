"""A function that takes all ranks and is called on one of them is named, on all of them."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_a_call_on_one_rank_alone_is_named_on_both(tmp_path):
    outputs = ranks.run("calls.py", tmp_path)
    assert all("told" in output for output in outputs)
