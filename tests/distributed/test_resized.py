"""Another number of ranks makes updates of another size: the run ends with its schedule."""

import json

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_a_run_that_continues_on_another_number_of_ranks_ends_with_its_schedule(tmp_path):
    parts = []
    for num_ranks, stop in ((1, 7), (2, 9), (1, 99)):
        outputs = ranks.run("resized.py", tmp_path / "run", stop, num_ranks=num_ranks)
        parts.append(json.loads((tmp_path / "run.json").read_text()))
        assert ("another size" in outputs[0]) == (len(parts) > 1)
    one, two, three = (part["steps"] for part in parts)
    # 24 updates of 2 rows; 12 of 4 rows: those of one rank are worth half of those of two.
    assert [lr for _, lr, _, _ in one] == pytest.approx([1 - k / 24 for k in range(6)])
    assert [lr for _, lr, _, _ in two] == pytest.approx([1 - k / 12 for k in (3, 4)])
    assert [lr for _, lr, _, _ in three] == pytest.approx([1 - k / 24 for k in range(10, 24)])
    assert three[-1] == [22, pytest.approx(1 / 24), 22, True]
    used = [row for part in parts for row in part["rows"]]
    assert sorted(used[:24]) == sorted(used[24:]) == list(range(24))
