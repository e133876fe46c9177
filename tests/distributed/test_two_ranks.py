"""Two ranks do what one process does; each script's docstring tells in what.

They run one after the other in the same two processes, because starting these takes longer than
most of the scripts. Many of them assert on both ranks, and the others leave files.
"""

import json

import another_run
import distributed_loaders
import exact_evaluation
import pytest
import ranks
import resized
import same_update
import torch
import two_optimizers
from limits import needs_to_fail_soon
from sharded_by_one import new_state, scores_of, train

from manualloop import prepare_strategy

pytestmark = pytest.mark.distributed

FIRST = [
    "any_batches",
    "mixed_batches",
    "gloo_gradients",
    "ejected",
    "same_update",
    "exact_evaluation",
    "distributed_loaders",
    "resized 9",
    "sharded",
    "sharded_by_one 3",
]
SECOND = [
    "another_run",
    "before_a_run",
    "job",
    "beside_training",
    "own_generators",
    "replicas",
    "two_optimizers",
    "two_runs",
    "sharded_by_one 8",
    "calls",  # after it the ranks have no connection
]

HAS_MUON = hasattr(torch.optim, "Muon")
SHARDS = hasattr(torch.cpu.Stream, "record_event")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason=f"torch {torch.__version__} has no Muon")
needs_shards = pytest.mark.skipif(
    not SHARDS, reason=f"fully_shard of torch {torch.__version__} does not run on a CPU"
)
MARKS = {
    "sharded": needs_shards,
    "sharded_by_one 3": needs_shards,
    "sharded_by_one 8": needs_shards,
    "two_optimizers": needs_muon,
    "calls": needs_to_fail_soon,
}


def that_run_here(scripts):
    return [name for name in scripts if name not in MARKS or not MARKS[name].args[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


class Outcome:
    """How both starts of the scripts ended, and what each rank has printed."""

    def __init__(self, folder):
        resized.main(folder / "resized", 7)
        self.codes, self.outputs = [], ["", ""]
        self.start("two_ranks.py", folder, *that_run_here(FIRST))
        if SHARDS:
            self.start("sharded_by_one.py", folder / "sharded_by_one", 5, num_ranks=1)
        self.start("two_ranks.py", folder, *that_run_here(SECOND))

    def start(self, *arguments, **options):
        children = ranks.start(*arguments, **options)
        for rank, output in enumerate(ranks.finish(children)):
            self.outputs[rank] += output
        self.codes += [child.returncode for child in children]

    def of_script(self, script):
        """What rank 0 has printed in a script."""
        before, _, _ = self.outputs[0].partition(f"passed: {script}\n")
        return before.rpartition("\npassed: ")[2]


@pytest.fixture(scope="module")
def outcome(folder):
    return Outcome(folder)


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=MARKS.get(name, ())) for name in (*FIRST, *SECOND)]
)
def test_a_script_passes_on_both_ranks(script, outcome):
    for output in outcome.outputs:
        assert f"passed: {script}" in output.splitlines(), output
    print(outcome.of_script(script))


def test_the_ranks_end_as_they_should(outcome):
    assert set(outcome.codes) == {0}, "\n".join(outcome.outputs)


@pytest.mark.parametrize("name", distributed_loaders.SCENARIOS)
def test_every_row_is_read_once_and_every_resume_is_exact(name, outcome):
    for output in outcome.outputs:
        assert f"passed: {name}" in output.splitlines(), output


def test_a_change_of_the_number_of_ranks_is_reported(outcome):
    assert "not bit-exact, because world_size: 2 -> 1." in outcome.outputs[0]
    assert "not bit-exact, because world_size: 1 -> 2." in outcome.outputs[0]


def test_a_stream_that_splits_itself_is_reported(outcome):
    before, whole, split, after = outcome.outputs[0].split("splits itself: ")[:4]
    assert "the ranks read different batches" in split
    assert not any("the ranks read different batches" in text for text in (before, whole, after))


@pytest.mark.exhaustive
def test_every_resume_is_exact_at_every_cut(tmp_path):
    ranks.run("distributed_loaders.py", tmp_path, "1,2,3,4,5")


@pytest.mark.filterwarnings("ignore")
def test_metrics_and_predictions_of_an_accelerator_of_one_rank_are_those_of_one_process():
    exact_evaluation.main(cases=[(3, 5)])


@pytest.mark.exhaustive
def test_three_ranks_keep_one_model(tmp_path):
    ranks.run("replicas.py", tmp_path, num_ranks=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_metrics_and_predictions_of_every_number_of_rows_are_those_of_one_process(num_ranks):
    ranks.run("exact_evaluation.py", num_ranks=num_ranks)


def test_all_ranks_refuse_another_run_and_one_process_gets_the_result(outcome, folder):
    folder = folder / "another_run"
    assert another_run.train(folder) == []
    assert another_run.train(folder, gradient_accumulation_steps=2) == []  # the same updates
    assert "- lr: 0.01 -> 0.02" in another_run.train(folder, lr=0.02)


def test_a_run_that_continues_on_another_number_of_ranks_ends_with_its_schedule(
    outcome, folder, tmp_path, caplog
):
    caplog.set_level("INFO", logger="manualloop")
    resized.main(tmp_path / "resized", 7)
    assert "another size" not in caplog.text
    assert "another size" in outcome.of_script("resized 9")
    resized.main(folder / "resized", 99)
    assert "another size" in caplog.text
    one, two, three = (json.loads((folder / f"resized-{n}.json").read_text()) for n in (7, 9, 99))
    # 24 updates of 2 rows; 12 of 4 rows: those of one rank are worth half of those of two.
    assert [lr for _, lr, _, _ in one["steps"]] == pytest.approx([1 - k / 24 for k in range(6)])
    assert [lr for _, lr, _, _ in two["steps"]] == pytest.approx([1 - k / 12 for k in (3, 4)])
    rates = [lr for _, lr, _, _ in three["steps"]]
    assert rates == pytest.approx([1 - k / 24 for k in range(10, 24)])
    assert three["steps"][-1] == [22, pytest.approx(1 / 24), 22, True]
    used = [row for part in (one, two, three) for row in part["rows"]]
    assert sorted(used[:24]) == sorted(used[24:]) == list(range(24))


TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def updates_by_ranks(outcome, folder):
    same_update.main(folder / "same_update")
    return [torch.load(folder / "same_update" / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("number", range(len(same_update.CASES)), ids=str)
def test_losses_and_weights_and_learning_rates_are_equal(number, updates_by_ranks):
    head, dtype, _ = same_update.CASES[number]
    (alone, weights), (ours, own_weights), (others, other_weights) = (
        of_rank[number] for of_rank in updates_by_ranks
    )
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


@needs_muon
def test_two_optimizers_on_two_ranks(outcome, folder):
    folder = folder / "two_optimizers"
    two_optimizers.main(folder)
    alone, ours, others = (torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(ours["whole"], others["whole"])
    for result in (alone, ours, others):
        # Muon adds up in bfloat16, where the order in which it lists its matrices does not matter.
        assert torch.equal(result["whole"], result["resumed"])
    assert float((alone["whole"] - ours["whole"]).abs().max()) < 1e-2
    assert alone["refusal"] == ""
    assert "extras['head'], whose gradients would differ from rank to rank" in ours["refusal"]


@needs_shards
def test_a_sharded_run_goes_from_two_ranks_to_one_and_back(outcome, folder):
    """It ends as a run of one process does whose weights were never sharded."""
    seen = []
    for until in (3, 5, 8):
        found = json.loads((folder / "sharded_by_one" / f"until-{until}.json").read_text())
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
