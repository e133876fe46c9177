"""1 to 17 rows in batches of 1 to 5: two ranks find what one process finds, to the last bit."""

import pytest
import ranks

pytestmark = pytest.mark.distributed


def test_metrics_and_predictions_are_those_of_one_process():
    """exact_evaluation.py asserts on both ranks, for five kinds of loaders and six metrics."""
    outputs = ranks.run("exact_evaluation.py", 2)
    assert all("340 cases" in output for output in outputs), "\n".join(outputs)
