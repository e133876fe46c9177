"""The run without a fault, once for all tests of faults."""

import bench
import pytest


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The digest and the log of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome, stopped_by, digest = bench.run(folder / "run", folder / "log.jsonl")
    assert (outcome, stopped_by) == ("finished", "num_epochs"), digest
    log = bench.merged(folder / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, bench.NUM_STEPS + 1))
    return digest, log


@pytest.fixture
def finish(undisturbed):
    """Start the same command again; it must end like the run without a fault."""

    def finish(folder, log=None):
        outcome = bench.run(folder, log)
        assert outcome == ("finished", "num_epochs", undisturbed[0])
        assert bench.junk(folder) == []
        if log is not None:
            assert bench.merged(log) == undisturbed[1]

    return finish
