"""Two optimizers on two ranks make the updates of one rank, and resume to the same bits."""

import pytest
import ranks
import torch

pytestmark = pytest.mark.distributed


def test_two_optimizers_on_two_ranks(tmp_path):
    ranks.run("two_optimizers.py", tmp_path / "run", num_ranks=1)
    ranks.run("two_optimizers.py", tmp_path / "run", num_ranks=2)
    alone, ours, others = (torch.load(tmp_path / f"run-{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert torch.equal(ours["whole"], others["whole"])
    for result in (alone, ours, others):
        # Muon adds up in bfloat16, where the order in which it lists its matrices does not matter.
        assert torch.equal(result["whole"], result["resumed"])
    assert float((alone["whole"] - ours["whole"]).abs().max()) < 1e-2
    assert alone["refusal"] == ""
    assert "extras['head'], whose gradients would differ from rank to rank" in ours["refusal"]
