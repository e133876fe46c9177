"""1 to 17 rows in batches of 1 to 5: two ranks find what one process finds, to the last bit."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


CASES = {"some": ([1, 3, 5], [1, 5, 17]), "all": ([*range(1, 6)], [*range(1, 18)])}


@pytest.mark.parametrize("cases", ["some", pytest.param("all", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_metrics_and_predictions_are_those_of_one_process(num_ranks, cases):
    """exact_evaluation.py asserts on every rank, for six kinds of loaders and six metrics."""
    numbers = [",".join(map(str, some)) for some in CASES[cases]]
    outputs = ranks.run("exact_evaluation.py", num_ranks, *numbers, num_ranks=num_ranks)
    num_cases = 5 * len(CASES[cases][0]) * len(CASES[cases][1])
    assert all(f"{num_cases} cases" in output for output in outputs), "\n".join(outputs)
