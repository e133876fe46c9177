"""The notebook, run from top to bottom in a kernel of its own."""

import asyncio
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "notebooks/full_training.ipynb"
TIMEOUT = 3600  # seconds, for the whole notebook
FEW_MODULES = """
AREAS = {area: " ".join(modules.split()[:3]) for area, modules in AREAS.items()}
"""


def run_notebook(tmp_path, **environment):
    """Run a copy as its reader would, in its own folder; return the cells by their id."""
    folder = tmp_path / "examples/notebooks"
    folder.mkdir(parents=True)
    shutil.copy(EXAMPLES / "docstrings.py", folder.parent)
    if environment["MANUALLOOP_NUM_ROWS"] != "0":  # then few modules have rows enough
        with open(folder.parent / "docstrings.py", "a") as file:
            file.write(FEW_MODULES)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    manager = AsyncKernelManager(
        # Only the kernel of this interpreter: a user may have put another under the same name.
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(tmp_path / "kernel.json"),
    )
    assert manager.kernel_spec.argv[0] == sys.executable
    deadline = time.monotonic() + TIMEOUT
    client = NotebookClient(
        notebook,
        km=manager,
        timeout_func=lambda cell: max(deadline - time.monotonic(), 1),
        resources={"metadata": {"path": str(folder)}},
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("MANUALLOOP_")}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython"), **environment}
    asyncio.run(client.async_execute(env=env, cleanup_kc=True))
    return {cell.id: cell for cell in notebook.cells}


def printed(cell, stream="stdout"):
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def assert_expected_output(cells, scores):
    code = [cell for cell in cells.values() if cell.cell_type == "code"]
    lines = [line for cell in code for line in printed(cell, "stderr").splitlines()]
    # The notebook imports transformers, whose tqdm misses ipywidgets, which the tests lack.
    lines = [line for line in lines if "IProgress not found" not in line]
    assert [line for line in lines if "Warning" in line or "manualloop:" in line] == []
    # The table and the bar of the run are in the file, in their final state.
    found = [output.get("data", {}).get("text/html", "") for output in cells["one-call"].outputs]
    (shown,) = [html for html in found if "<progress" in html]
    assert re.search(r'<progress value="(\d+)" max="\1" aria-label="Training"', shown)
    assert shown.count("<tr") == 3
    assert all(name in shown for name in ["Training loss", "Evaluation loss", *scores[1:]])
    assert re.match(r"manualloop: .*using .* -> labels", printed(cells["prepare-loaders"]))
    assert printed(cells["equal-bits"]) == "Equal to the last bit: True\n"
    assert "image/png" in cells["plot"].outputs[-1].data
    ranks = re.findall(r"^rank (\d) of 2: (.*)$", printed(cells["launch"]), re.MULTILINE)
    assert [rank for rank, _ in ranks] == ["0", "1"]
    (words,) = {words for _, words in ranks}  # the same on both
    assert re.fullmatch(" ".join(rf"{name} \d\.\d{{4}}" for name in scores), words)


def test_the_committed_notebook_is_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_rows", [96, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_the_notebook_runs_on_docstrings(num_rows, tmp_path):
    cells = run_notebook(tmp_path, MANUALLOOP_NUM_ROWS=str(num_rows))
    assert_expected_output(cells, ["loss", "accuracy", "f1_macro"])
    by_hand = re.search(r"accuracy (\S+)", printed(cells["evaluate-by-hand"]))
    assert num_rows or float(by_hand[1]) > 0.5  # of 7 areas; the largest alone is a quarter


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.shared
@pytest.mark.exhaustive
def test_the_notebook_runs_on_mrpc(shared, tmp_path):
    cells = run_notebook(
        tmp_path, MANUALLOOP_SHARED=str(shared.resolve()), MANUALLOOP_NUM_ROWS="200"
    )
    assert_expected_output(cells, ["loss", "accuracy", "f1"])
