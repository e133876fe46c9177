"""Each kind of loader on two ranks: every row once, and the same bits after a resume anywhere."""

import distributed_loaders
import pytest
import ranks

pytestmark = pytest.mark.distributed


# There are three updates an epoch.
CUTS = ["1,4", pytest.param("1,2,3,4,5", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module", params=CUTS)
def outputs(request, tmp_path_factory):
    """The output of both ranks, which run all scenarios one after the other."""
    folder = tmp_path_factory.mktemp("loaders")
    return ranks.finish(ranks.start("distributed_loaders.py", folder, request.param))


@pytest.mark.parametrize("name", distributed_loaders.SCENARIOS)
def test_every_row_is_read_once_and_every_resume_is_exact(name, outputs):
    for output in outputs:
        assert f"passed: {name}" in output.splitlines(), output


def test_a_change_of_the_number_of_ranks_is_reported(outputs):
    assert "not bit-exact, because world_size: 2 -> 1." in outputs[0]
    assert "not bit-exact, because world_size: 1 -> 2." in outputs[0]


def test_a_stream_that_splits_itself_is_reported(outputs):
    before, whole, split, after = outputs[0].split("splits itself: ")[:4]
    assert "the ranks read different batches" in split
    assert not any("the ranks read different batches" in text for text in (before, whole, after))
