"""Weights spread over two gloo ranks by fully_shard: trained, scored, saved, resumed."""

import json

import pytest
import ranks
import torch
from sharded_by_one import new_state, scores_of, train

from manualloop import prepare_strategy

pytestmark = pytest.mark.distributed


def test_sharded_weights_train_as_ddp_does_and_resume_exactly(tmp_path):
    """sharded.py asserts on both ranks."""
    outputs = ranks.run("sharded.py", tmp_path)
    assert all("8 steps, at most" in output for output in outputs), "\n".join(outputs)


def test_a_sharded_run_goes_from_two_ranks_to_one_and_back(tmp_path):
    """It ends as a run of one process does whose weights were never sharded."""
    seen = []
    for until, num_ranks in ((3, 2), (5, 1), (8, 2)):
        ranks.run("sharded_by_one.py", tmp_path, until, num_ranks=num_ranks)
        found = json.loads((tmp_path / f"until-{until}.json").read_text())
        seen += found["seen"]
    strategy = prepare_strategy("cpu")
    whole = new_state(spread=False)
    torch.testing.assert_close(
        torch.tensor(seen), torch.tensor(train(whole, strategy)), rtol=1e-4, atol=1e-5
    )
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(
            torch.tensor(found["weights"][name]), weight, rtol=1e-3, atol=1e-5
        )
    # A buffer that no state_dict has: 3 updates of 2 batches, 2 of 4, and 3 of 2.
    assert found["num_passes"] == 20
    scores, predictions = scores_of(whole.model)
    assert found["predictions"] == predictions
    assert found["scores"]["accuracy"] == scores["accuracy"]
