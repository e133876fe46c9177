"""After which of six updates a run is stopped: a sample of them, and all in exhaustive tests."""

import pytest


@pytest.fixture(
    params=[
        # Between two epochs, and inside the second.
        pytest.param((3, 4), id="some"),
        pytest.param((1, 2, 3, 4, 5), id="all", marks=pytest.mark.exhaustive),
    ]
)
def cuts(request):
    return request.param
