"""Checkpoints of every release resume with today's code, to the same bits.

``write_release.py`` has written them, and ``ends.json`` with the release that wrote them: the ends
of runs that nobody interrupted.
"""

import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import ranks
import write_release
from write_release import CASES, EXACT, ON_TWO_RANKS, RELEASES, run

STORED = [
    (release.name, archive.name.removesuffix(".tar.xz"))
    for release in sorted(RELEASES.iterdir())
    for archive in sorted(release.glob("*.tar.xz"))
]


def numbers(end):
    """All numbers of an end by where they stand; a NaN equals itself."""
    if isinstance(end, dict):
        return {f"{k}.{name}": v for k, e in end.items() for name, v in numbers(e).items()}
    if isinstance(end, list):
        return numbers(dict(enumerate(end)))
    return {"": float.fromhex(end) if isinstance(end, str) else end}


def without_beginning(end, resumed):
    """An end of a whole run, with the losses and rows that a resumed one has, too."""
    return {
        name: value[len(value) - len(resumed[name]) :] if name in ("losses", "rows") else value
        for name, value in end.items()
    }


def test_every_case_is_stored():
    assert sorted(STORED) == sorted(
        (release.name, case) for release in RELEASES.iterdir() for case in CASES
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("release", "case"),
    [
        pytest.param(*stored, marks=[pytest.mark.distributed] if stored[1] in ON_TWO_RANKS else [])
        for stored in STORED
    ],
)
def test_a_checkpoint_resumes_to_the_same_bits(release, case, tmp_path, monkeypatch):
    monkeypatch.setattr(
        write_release, "on_two_ranks", partial(ranks.run, Path(write_release.__file__))
    )
    with tarfile.open(RELEASES / release / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path / "stored", filter="data")
    stored = json.loads((RELEASES / release / "ends.json").read_text())[case]

    resumed, whole = run(case, tmp_path / "stored" / case, tmp_path / "whole" / case)

    assert 0 < len(resumed["losses"]) < len(stored["losses"])
    assert whole["rows"] == stored["rows"]
    assert whole["progress"] == resumed["progress"] == stored["progress"]
    if case in EXACT or whole == stored:
        assert whole == stored
        assert resumed == without_beginning(stored, resumed)
        return
    # This machine rounds otherwise than the one that has written the checkpoint: today's run from
    # the first step on differs from the stored one, too, and no more than rounding explains.
    expected = numbers(without_beginning(stored, resumed))
    assert numbers(without_beginning(whole, resumed)) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert numbers(resumed) == pytest.approx(expected, rel=1e-3, abs=1e-4)
