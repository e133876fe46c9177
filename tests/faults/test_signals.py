"""Signals and max_time: a run that is asked to stop saves, and the next process resumes it."""

import json
import os
import signal
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import Script, wait_until

from manualloop import SingleDevice, train_loop

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

# A script as a user would write it. It signals itself at `place`, in update 4 of 12.
SCRIPT = textwrap.dedent(
    """
    import atexit, json, os, signal, sys, time
    import torch
    from torch.utils.data import DataLoader, Dataset
    from manualloop import SingleDevice, evaluate_loop, train_loop

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if started in the background
    torch.set_num_threads(1)
    folder, log, place, number, workers = sys.argv[1:6]
    number = getattr(signal, number)
    calls = {"forward": 0, "evaluate": 0, "fsync": 0}

    class Rows(Dataset):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
        def __len__(self): return 64
        def __getitem__(self, row):
            return {"x": self.x[row] + 0.1 * torch.rand(8), "id": torch.tensor(row)}

    def hit(where):
        if where == place:
            (os.killpg if workers != "0" else os.kill)(
                os.getpgid(0) if workers != "0" else os.getpid(), number)
            time.sleep(0.02)

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = DataLoader(Rows(), 4, shuffle=True, num_workers=int(workers))
    scores = DataLoader(Rows(), 4, num_workers=int(workers))
    ids, steps = [], {"index": 0}

    def loss_fn(model, batch):
        ids.append(batch["id"].tolist())
        calls["forward"] += 1
        if calls["forward"] == 11:
            hit("forward")
        loss = model(batch["x"]).square().mean()
        if calls["forward"] == 11:
            loss.register_hook(lambda gradient: hit("backward"))
        return loss

    def after_step(*args):
        if steps["index"] == 3:
            hit("optimizer")
    optimizer.register_step_post_hook(after_step)

    inner_fsync = os.fsync
    def fsync(descriptor):
        calls["fsync"] += 1
        if calls["fsync"] == 15:  # in the save of step 6
            hit("save")
        inner_fsync(descriptor)
    os.fsync = fsync

    def on_step(s):
        steps["index"] = s.index
        with open(log, "a") as file:
            file.write(json.dumps({"step": s.index, "ids": list(ids)}) + "\\n")
        ids.clear()
        if s.index == 4:
            hit("on_step")

    def evaluate():
        calls["evaluate"] += 1
        total = 0.0
        for number, batch in enumerate(scores):
            with torch.no_grad():
                total += model(batch["x"]).sum().item() + torch.rand(()).item()
            if calls["evaluate"] == 2 and number == 5:
                hit("evaluation")
        return {"total": total}

    atexit.register(lambda: print("atexit ran"))
    if "own status" in sys.argv:
        inner_step = on_step
        def on_step(step):
            inner_step(step)
            if step.index == 4:
                raise KeyError("after the signal")
    result = train_loop(
        model, loader, optimizer, loss_fn=loss_fn, num_epochs=2, gradient_accumulation_steps=3,
        evaluate=evaluate, evaluate_every=2, log_every=5, checkpoint_dir=folder,
        checkpoint_every=3, on_step=on_step, progress_bar=False, strategy=SingleDevice("cpu"))
    print(json.dumps({
        "stopped_by": result.stopped_by,
        "num_steps": result.state.progress.num_steps,
        "weights": [w.tolist() for w in model.parameters()],
        "history": result.history,
        "drawn": torch.rand(3).tolist(),
    }))
    """
)


class Run:
    """The script in a folder of its own, started as often as it takes."""

    def __init__(self, tmp_path, name="run"):
        self.folder, self.log = tmp_path / name, tmp_path / f"{name}.jsonl"
        self.path = tmp_path / "script.py"
        self.path.write_text(SCRIPT)

    def start(self, place="nothing", number="SIGTERM", workers=0, *more):
        arguments = (self.folder, self.log, place, number, workers, *more)
        return Script(self.path, *arguments, is_merged=False)

    def run(self, *arguments):
        self.process = self.start(*arguments)
        assert self.process.end(600), self.process.errors
        lines = self.process.output.splitlines()
        assert lines, self.process.errors
        assert lines[-1] == "atexit ran", self.process.errors
        results = [json.loads(line) for line in lines if line.startswith("{")]
        self.result = results[0] if results else None
        return self.result

    def steps(self):
        steps = {}
        for line in self.log.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] = entry
        return [steps[step] for step in sorted(steps)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The script's result and steps without a signal, by number of workers."""
    known = {}

    def undisturbed(workers):
        if workers not in known:
            script = Run(tmp_path_factory.mktemp("undisturbed"))
            known[workers] = script.run("nothing", "SIGTERM", workers), script.steps()
            assert script.process.returncode == 0
        return known[workers]

    return undisturbed


def check(script, undisturbed, place, number, workers=0):
    """The script is stopped: nothing behind train_loop runs. The same command completes it."""
    assert script.run(place, number, workers) is None
    errors, status = script.process.errors, 128 + getattr(signal, number)
    if number == "SIGINT":
        # Python ends itself by the signal, as after every Ctrl-C, unless a library runs code behind
        # it: torch prints its compile times at the end of a process if tabulate is installed.
        assert script.process.returncode in (-signal.SIGINT, 1), errors
        assert errors.rstrip().splitlines()[-1].startswith("KeyboardInterrupt: ended after step 4")
    else:
        assert script.process.returncode == status, errors
    step = 6 if place == "save" else 4
    assert (script.folder / f"step-{step:08}").is_dir()
    printed = script.process.output
    assert f"{number}: ended after step {step}. The same command resumes there, from " in printed
    assert str(script.folder) in printed
    assert not list(script.folder.glob(".*"))
    expected, steps = undisturbed(workers)
    finished = script.run("nothing", "SIGTERM", workers)
    assert script.process.returncode == 0
    assert finished == expected
    assert script.steps() == steps


WHERE = ["forward", "backward", "optimizer", "on_step", "evaluation", "save"]


def sample(cases, kept):
    return [pytest.param(c, marks=() if c in kept else pytest.mark.exhaustive) for c in cases]


@pytest.mark.parametrize("where", sample(WHERE, ("forward", "evaluation", "save")))
def test_f09_sigterm_finishes_the_update_saves_and_ends_the_script_with_143(
    where, tmp_path, undisturbed
):
    check(Run(tmp_path), undisturbed, where, "SIGTERM")


@pytest.mark.exhaustive  # of a group with workers the next test has SIGINT, the last one SIGTERM
@pytest.mark.parametrize("where", WHERE)
def test_f10_sigterm_to_the_whole_group_leaves_the_workers_alive(where, tmp_path, undisturbed):
    check(Run(tmp_path), undisturbed, where, "SIGTERM", workers=2)


@pytest.mark.parametrize(
    "case",
    sample(
        [("SIGUSR1", 0), ("SIGINT", 0), ("SIGUSR1", 2), ("SIGINT", 2)],
        (("SIGINT", 2), ("SIGUSR1", 0)),
    ),
    ids=str,
)
def test_f10_other_signals_end_the_script_as_well(case, tmp_path, undisturbed):
    number, workers = case
    check(Run(tmp_path), undisturbed, "backward", number, workers)


def test_f09_an_error_after_a_sigterm_keeps_its_own_status(tmp_path):
    script = Run(tmp_path)
    script.run("forward", "SIGTERM", 0, "own status")
    assert script.process.returncode == 1
    assert "KeyError: 'after the signal'" in script.process.errors


def members(session):
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_f10_no_process_is_left(tmp_path):
    process = Run(tmp_path).start("forward", "SIGTERM", 2)
    wait_until(lambda: len(members(process.pid)) > 1)
    process.wait(600)
    wait_until(lambda: members(process.pid) == [])
    assert process.end(600)
    assert process.returncode == 143


def train(folder, on_step=None, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    return train_loop(
        model,
        [torch.ones(2, 1)] * 8,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, batch: model(batch).square().mean(),
        strategy=SingleDevice("cpu"),
        checkpoint_dir=folder,
        on_step=on_step,
        progress_bar=False,
        **options,
    )


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def handlers():
    """Handlers of the program's own, which must be restored afterwards."""
    seen = []

    def handle(number, frame):
        seen.append(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    yield seen
    now = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert set(now.values()) == {handle}


def test_f11_the_first_ctrl_c_stops_and_the_handlers_are_put_back(tmp_path, handlers):
    def on_step(step):
        if step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"ended after step 3\. The same command resumes"):
        train(tmp_path, on_step)
    assert (tmp_path / "step-00000003").is_dir()
    assert handlers == []


@pytest.fixture
def ctrl_c():
    """Python's own handler, which processes started in the background lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_f11_the_second_ctrl_c_is_immediate(tmp_path, ctrl_c):
    seen = []

    def on_step(step):
        seen.append(step.index)
        if step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("still here")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step)
    assert signal.getsignal(signal.SIGINT) is before
    assert seen == [1, 2, 3]


def test_f11_the_second_signal_reaches_the_handler_from_before(tmp_path, handlers):
    def on_step(step):
        if step.index == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        train(tmp_path, on_step)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert handlers == [signal.SIGTERM]


def test_f11_the_handlers_are_put_back_after_an_error(tmp_path, handlers):
    def on_step(step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, on_step)


def test_without_a_folder_ctrl_c_ends_the_script_as_usual(ctrl_c):
    def on_step(step):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(None, on_step)


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path):
    def on_step(step):
        if step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = train(tmp_path, on_step)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stopped_by == "num_epochs"


def test_outside_the_main_thread_signals_are_left_as_they_are(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path)))
    thread.start()
    thread.join(600)
    assert results[0].stopped_by == "num_epochs"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only ``tick`` moves, by 20 ms; no other time passes."""

    class Clock:
        now = 1000.0

        def tick(self, step):
            self.now += 0.02

    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_max_time_saves_and_the_next_process_resumes(tmp_path, clock):
    whole = train(tmp_path / "whole", log_every=3)
    stops = []
    while not stops or stops[-1][0] == "max_time":
        result = train(tmp_path / "cut", clock.tick, log_every=3, max_time=0.19)
        stops.append((result.stopped_by, result.state.progress.num_steps))
    assert stops == [("max_time", 10), ("max_time", 20), ("num_epochs", 24)]
    assert result.history == whole.history
    assert result.state.model.weight.tolist() == whole.state.model.weight.tolist()


def test_max_time_without_a_folder_ends_with_an_evaluation(clock):
    result = train(None, clock.tick, max_time="0.15 s", evaluate=lambda: {"score": 1.0})
    assert result.stopped_by == "max_time"
    assert result.state.progress.num_steps == 8
    assert result.metrics == {"score": 1.0}
