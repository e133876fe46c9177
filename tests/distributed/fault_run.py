"""The run of tests/faults on several ranks, one of which fails.

    fault_run.py RANK FAULT FOLDER ...

Several runs, each with a fault and a folder of its own, follow each other in the same processes.
Each writes its outcome to FOLDER.RANK.json: what ended the run, its steps, one hash of its state.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import bench
import torch
from injections import KillAt
from limits import FOREVER, explain_after_a_report, wait_patiently, wait_until_stopped

from manualloop import NonFiniteError, prepare_strategy
from manualloop.data.sampler import order

SHORT = {"_REPORT": 0.2, "_ANSWER": 0.2}
BAD_ROW = order(bench.NUM_ROWS, 1, 0)[4 * 7]  # of batch 7, which is rank 1's


def main():
    victim, *rest = sys.argv[1:]
    # After "stop" and "exit" no rank has news, so the other one ends because its waiting ends.
    wait_patiently(**(SHORT if rest[0] in ("stop", "exit") else {}))
    if rest[0] == "exit":
        explain_after_a_report()
    strategy = prepare_strategy(timeout=FOREVER)
    for fault, folder in zip(rest[::2], rest[1::2], strict=True):
        run(folder, fault, strategy, int(victim))
        print(f"ran: {fault}", flush=True)


def run(folder, fault, strategy, victim):
    is_victim = strategy.rank == victim
    if fault in ("kill", "stop", "raise", "exit"):
        fail_in_forward(fault, is_victim, strategy.gather(os.getpid())[victim])
    if fault == "killed after its save" and is_victim:
        KillAt("rename:after", 2)()
    log, init = f"{folder}.{strategy.rank}.jsonl", bench.Rows.__init__
    try:
        result = bench.train(folder, log, strategy=strategy, **options(fault, is_victim))
    except NonFiniteError as error:
        print(f"NonFiniteError: {error}", flush=True)
        return
    finally:
        bench.Rows.__init__ = init
    outcome = {
        "stopped_by": result.stopped_by,
        "num_steps": result.state.progress.num_steps,
        "num_skipped": result.state.progress.num_skipped,
        "digest": bench.digest(result),
        "random": torch.rand(()).item(),
        "history": result.history,
    }
    Path(f"{folder}.{strategy.rank}.json").write_text(json.dumps(outcome))


def fail_in_forward(fault, is_victim, victim_pid):
    """Fail in the second batch of the third window; before a stop, the other rank waits for it."""
    ids, seen = note_rows(), 0

    def fail(module, args):
        nonlocal seen
        if not module.training or type(module) is not torch.nn.Sequential:
            return
        seen += 1
        if seen != 3 * 2 + 2:
            return
        if not is_victim:
            if fault == "stop":
                wait_until_stopped(victim_pid)
        elif fault == "kill":
            bench.kill_self()
        elif fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "raise":
            raise ValueError(f"bad rows {ids[seen - 1]}")
        elif fault == "exit":
            sys.exit(3)

    torch.nn.modules.module.register_module_forward_pre_hook(fail)


def note_rows():
    ids, make = [], bench.ordered_loader

    def collate(rows):
        ids.append([int(row["id"]) for row in rows])
        return torch.utils.data.default_collate(rows)

    bench.ordered_loader = lambda *args, **kwargs: make(*args, **kwargs, collate_fn=collate)
    return ids


def options(fault, is_victim):
    if fault in ("SIGTERM", "SIGUSR1") and is_victim:
        number = getattr(signal, fault)
        return {"on_step": lambda step: step.index == 3 and os.kill(os.getpid(), number)}
    if fault == "max_time":
        return {"max_time": 0.001 if is_victim else 3600.0}
    if fault == "clock":  # of rank 0; rank 1 is the slower one, and has another
        return {
            "checkpoint_every": "0.05 s",
            "evaluate_every": "0.03 s",
            "on_step": lambda step: time.sleep(0.03 if is_victim else 0),
            "keep_checkpoints": 99,
        }
    if fault.startswith("nan"):
        init = bench.Rows.__init__

        def spoil(rows):
            init(rows)
            rows.x[BAD_ROW] = torch.nan

        bench.Rows.__init__ = spoil
        return {"on_nonfinite": "skip" if fault == "nan" else "raise"}
    return {}


if __name__ == "__main__":
    main()
