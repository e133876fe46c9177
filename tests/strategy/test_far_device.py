"""All of `test_on_device.py`, and the examples of the docstrings, on an accelerator without a chip.

In a process of its own: a process has one accelerator, and keeps it.
"""

import os
from pathlib import Path

import processes
import pytest
from torch.utils import backend_registration

import manualloop

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys

import pytest

options = ["-pfar_device", "-pno:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
@pytest.mark.parametrize("what", ["device", pytest.param("examples", marks=pytest.mark.exhaustive)])
def test_an_accelerator_that_is_not_the_cpu(what, tmp_path):
    where = {
        "device": [TESTS / "strategy" / "test_on_device.py"],
        "examples": ["--doctest-modules", "--pyargs", manualloop.__name__],
    }
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    python_path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = processes.run(
        script, *where[what], env=os.environ | {"PYTHONPATH": python_path}, cwd=TESTS, timeout=3600
    )
    assert done.returncode == 0, done.output
    assert '"auto" is far' in done.output
