"""Each kind of loader on two ranks: every row once, and the same after a resume at every cut."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_every_row_once_and_exact_resumes_for_every_kind_of_loader(tmp_path):
    """dealt_loaders.py asserts on both ranks; also two ranks after one, and one after two."""
    outputs = ranks.run("dealt_loaders.py", tmp_path)
    assert all("13 loaders, 65 cuts" in output for output in outputs)
    assert "going on, not bit-exact because world_size: 2 -> 1." in outputs[0]
    assert "going on, not bit-exact because world_size: 1 -> 2." in outputs[0]
