"""The generators of each rank are saved and restored."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_each_rank_resumes_with_the_states_of_its_own_generators(tmp_path):
    outputs = ranks.run("own_generators.py", tmp_path / "run")
    assert all("equal" in output for output in outputs)
