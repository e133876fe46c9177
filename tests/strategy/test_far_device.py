"""All of `test_on_device.py`, and the examples of the docstrings, on an accelerator without a chip.

In a process of its own: a process has one accelerator, and keeps it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

import manualloop

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
@pytest.mark.parametrize("what", ["device", pytest.param("examples", marks=pytest.mark.exhaustive)])
def test_an_accelerator_that_is_not_the_cpu(what):
    where = {
        "device": [TESTS / "strategy" / "test_on_device.py"],
        "examples": ["--doctest-modules", "--pyargs", manualloop.__name__],
    }
    python_path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-pfar_device", "-pno:cacheprovider", *where[what]],
        env=os.environ | {"PYTHONPATH": python_path},
        cwd=TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert '"auto" is far' in done.stdout
