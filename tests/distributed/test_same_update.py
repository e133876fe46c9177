"""Two ranks make the updates of one rank with the same global batches."""

import json

import pytest
import ranks
import same_update
import torch

pytestmark = pytest.mark.distributed

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    stem = tmp_path_factory.mktemp("same") / "run"
    ranks.run("same_update.py", stem, num_ranks=1)
    ranks.run("same_update.py", stem, num_ranks=2)
    return [torch.load(f"{stem}-{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("number", range(len(same_update.CASES)), ids=str)
def test_losses_and_weights_and_learning_rates_are_equal(number, results):
    head, dtype, _ = same_update.CASES[number]
    (alone, weights), (ours, own_weights), (others, other_weights) = (r[number] for r in results)
    # transformers computes the loss of a causal LM in float32.
    tolerance = 1e-6 if head == "causal" else TOLERANCES[dtype]
    assert ours == others, "all ranks have the same values"
    assert torch.equal(own_weights, other_weights)
    for name in ("lr", "items", "rows", "ends", "num_steps"):
        assert [step[name] for step in ours] == [step[name] for step in alone], name
    for name in ("loss", "norm"):
        found = torch.tensor([step[name] for step in ours], dtype=torch.float64)
        expected = torch.tensor([step[name] for step in alone], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    difference = float((own_weights - weights).abs().max())
    print(f"{head} {dtype}: largest difference of a weight {difference:.1e}")
    assert difference <= tolerance


@pytest.mark.exhaustive
def test_the_line_of_trainer_beside_ours(tmp_path):
    """Ours is the same on any number of ranks; Trainer's is only printed: it may be fixed."""
    for num_ranks in (1, 2):
        ranks.run("trainer_line.py", tmp_path / "line", num_ranks=num_ranks)
    alone, together = (json.loads((tmp_path / f"line-{n}.json").read_text()) for n in (1, 2))
    for name in ("loss", "grad_norm"):
        assert together[0][name] == pytest.approx(alone[0][name], rel=1e-6)
        print(
            f"{name}: manualloop {alone[0][name]:.6f}, on 2 ranks {together[0][name]:.6f}; "
            f"Trainer {alone[1][name]:.6f}, on 2 ranks {together[1][name]:.6f}"
        )
