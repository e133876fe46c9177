"""1 to 17 rows in batches of 1 to 5: two ranks find what one process finds, to the last bit."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


SOME = [1, 2, 5, 8, 17]


@pytest.mark.parametrize(
    "num_rows", [SOME, pytest.param([*range(1, 18)], marks=pytest.mark.exhaustive)], ids=len
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_metrics_and_predictions_are_those_of_one_process(num_ranks, num_rows):
    """exact_evaluation.py asserts on every rank, for six kinds of loaders and six metrics."""
    outputs = ranks.run("exact_evaluation.py", num_ranks, *num_rows, num_ranks=num_ranks)
    num_cases = 5 * 5 * len(num_rows)
    assert all(f"{num_cases} cases" in output for output in outputs), "\n".join(outputs)
