"""manualloop, the loop of the course and the peers, side by side.

    nox -s benchmarks [-- --only overhead train --task sst2 mrpc --num-turns 5 --write]

All contestants of a section take turns, on the same rows, from the same weights, on one thread; see
``loops.py`` for how each is set up. Every turn asserts that all trained: on every row, as many
updates, every weight changed. What is printed is Markdown; ``--write`` puts it into
docs/benchmarks.md, where the sections that were not run stay as they are.

All sections but ``overhead``, ``instructions`` and ``imports`` need MANUALLOOP_SHARED, the folder
of the data sets. ``instructions``, which needs valgrind, ``ceiling``, meant for a GPU, and
``accuracy``, which trains for many minutes, run only when they are named.
"""

import argparse
import json
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow
import torch
from datasets import disable_progress_bars
from instructions import per_step
from jobs import base_job, bert_job, check_trained, digest, linear_job
from loops import (
    BASE,
    EVALUATE,
    OVERHEAD,
    SAME_BITS,
    TRAIN,
    bare,
    manualloop,
    manualloop_evaluation,
)
from measure import DEVICE, clock, spread, table, take_turns, timed, write
from scipy.stats import t
from torch.utils.data import RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import get_length_grouped_indices

from manualloop import evaluate_loop

NAMES = {"sst2": "SST-2", "mrpc": "MRPC"}
REFERENCES = ["the course's loop", "manualloop"]
TRAIN_REFERENCES = ["the course's loop", "Trainer", "manualloop, grouped"]
IMPORTS = [
    "import torch",
    "from manualloop import train_loop",
    "from accelerate import Accelerator",
    "from lightning.fabric import Fabric",
    "from ignite.engine import Engine",
    "import evaluate",
    "from lightning.pytorch import Trainer",
    "from transformers import Trainer",
]


def race(contestants, job, args, check=None):
    """Let contestants of loops.py take turns; return their seconds, and what each left behind."""
    chosen = {
        name: contestant
        for name, contestant in contestants.items()
        if not args.contestants or any(part in name for part in args.contestants)
    }
    left = {}

    def once(name):
        seconds, left[name] = compete(chosen[name], job)
        if check is not None:
            check(job, *left[name])
        return seconds

    return take_turns({name: partial(once, name) for name in chosen}, args.num_turns), left


def compete(contestant, job, seed=1):
    """Time one contestant; return the seconds, and its model with what its run returned."""

    def prepare():
        model, run = contestant(job)
        return lambda: (model, run())

    return timed(prepare, seed)


def check_same_bits(left):
    """Refuse other weights than those of the bare loop on the same batches; say that it was done.

    Not on a GPU, where two runs of one loop differ.
    """
    pairs = [(one, other) for one, other in SAME_BITS if one in left and other in left]
    if not pairs or DEVICE.type != "cpu":
        return ""
    for one, other in pairs:
        assert digest(left[one][0]) == digest(left[other][0]), f"{other} is not {one}"
    return "manualloop ends with the weights of the bare loop on the same batches, to the bit. "


def padding(job, left):
    """Show which share of the tokens that went through each model was padding."""
    real = sum(map(len, job.rows["input_ids"][:]))
    shares = {name: 1 - real / model.seen["tokens"] for name, (model, _) in left.items()}
    return "padding", {name: f"{share:.1%}" for name, share in shares.items()}


def padding_of_all(task, batch_size):
    """Show the same of a whole epoch: of few rows, the Trainer sorts only a quarter at a time."""
    job = bert_job(task, None, batch_size)
    lengths = np.array([len(tokens) for tokens in job.rows["input_ids"][:]])
    torch.manual_seed(1)
    orders = {
        "shuffled": torch.randperm(len(lengths)).tolist(),
        "grouped by manualloop": job.prepared(group_by_length=True).batch_sampler.rows(),
        "grouped by the Trainer": get_length_grouped_indices(lengths, job.batch_size),
    }
    texts = []
    for name, order in orders.items():
        starts = np.arange(0, len(order), job.batch_size)
        sizes = np.diff([*starts, len(order)])
        padded = (np.maximum.reduceat(lengths[order], starts) * sizes).sum()
        texts.append(f"{1 - lengths.sum() / padded:.1%} {name}")
    return f"With all {len(lengths)} rows the share of padding would be {', '.join(texts)}."


def overhead(args):
    job = linear_job(args.num_steps)
    found, left = race(OVERHEAD, job, args, check_trained)
    microseconds = 1e6 / job.num_steps
    yield (
        "What a step costs beside the model",
        f"The model is one linear layer and makes {job.num_steps} steps of {job.batch_size} rows. "
        f'{check_same_bits(left)}"At its best" means that Lightning and Ignite update their bars '
        "every 50 steps, and that the Trainer neither logs nor checks for NaN.",
        table(found, "us a step", ".0f", REFERENCES, scale=lambda number: number * microseconds),
    )


def instructions(args):
    """What does a step cost where other processes disturb the clock? Valgrind must be installed."""
    chosen = [
        name
        for name in OVERHEAD
        if not args.contestants or any(part in name for part in args.contestants)
    ]
    found = {name: [per_step(name)] for name in chosen}  # the same in each turn
    yield (
        "Instructions of a step beside the model",
        "The same model of one linear layer and the same steps, under valgrind: the processor "
        "executes as many instructions however busy the machine is, though not each in the same "
        "time. What bars draw is not in it: they draw by the clock. "
        "`nox -s benchmarks -- --only instructions`.",
        table(found, "thousands", ".0f", REFERENCES, scale=lambda number: number / 1000),
    )


def train(args):
    for task in args.task:
        job = bert_job(task, args.num_rows, args.batch_size)
        found, left = race(TRAIN, job, args, check_trained)
        yield (
            f"Fine-tuning on rows of {NAMES[task]}",
            f"{len(job.rows)} rows, batches of {job.batch_size}, one epoch; BERT of 4 layers, 256 "
            f"wide, random weights. {check_same_bits(left)}{padding_of_all(task, job.batch_size)}",
            table(found, "s", ".2f", TRAIN_REFERENCES, notes=padding(job, left)),
        )


def ceiling(args):
    """Which share of what the device can multiply goes into the model? In bf16, BERT base."""
    job = base_job(args.num_base_steps)
    top = max(products_a_second() for _ in range(10))
    needed = operations_of_a_step(job) * job.num_steps
    found, left = race(BASE, job, args, check_trained)
    shares = {
        name: spread([100 * needed / seconds / top for seconds in numbers], ".0f")
        for name, numbers in found.items()
    }
    yield (
        "BERT base in bf16",
        f"{job.num_steps} steps of {job.batch_size} rows of {len(job.rows[0]['input_ids'])} random "
        f"tokens, random weights, autocast to bfloat16. {check_same_bits(left)}A step needs "
        f"{needed / job.num_steps / 1e12:.2f} tera operations in matrix products, forward and "
        f"backward; large ones alone reach {top / 1e12:.2f} tera operations a second here.",
        table(
            found,
            "ms a step",
            ".1f",
            list(BASE)[:2],
            scale=lambda seconds: 1e3 * seconds / job.num_steps,
            notes=("% of that reached", shares),
        ),
    )


def products_a_second():
    """Measure floating-point operations a second, of a product of large matrices in bf16."""
    size, num_times = (8192, 20) if DEVICE.type == "cuda" else (1024, 5)
    one, other = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    one @ other
    start = clock()
    for _ in range(num_times):
        one @ other
    return 2 * size**3 * num_times / (clock() - start)


def operations_of_a_step(job):
    """Count the floating-point operations of a step's products; by plain attention on one row."""
    batch = next(iter(job.prepared()))
    row = {name: tensor[:1].to(DEVICE) for name, tensor in batch.items()}
    model = job.new_model().to(DEVICE)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**row)["loss"].backward()
    return counter.get_total_flops() * job.batch_size


def evaluate(args):
    for split in ("train", "validation"):
        job = bert_job("sst2", args.num_eval_rows, split=split, as_split="validation")
        found, left = race(EVALUATE, job, args)
        scores = {name: result["accuracy"] for name, (_, result) in left.items()}
        apart = max(scores.values()) - min(scores.values())
        assert apart * len(job.rows) < 1.5, scores  # a row on the edge may fall to either side
        assert {model.seen["rows"] for model, _ in left.values()} == {len(job.rows)}
        yield (
            f"Evaluating on rows of SST-2's split {split}",
            f"{len(job.rows)} rows, batches of {job.batch_size}, accuracy; the same BERT. The "
            "metric of the course's loop is built from the classes of `evaluate`, because "
            "`evaluate.load` downloads its metrics.",
            table(found, "s", ".2f", REFERENCES, notes=padding(job, left)),
        )


def loader(args):
    job = bert_job("sst2", args.num_loader_rows)

    def by_hand(rows):
        order = RandomSampler(rows, generator=torch.Generator().manual_seed(42))
        return job.loader(rows, None, sampler=order)

    loaders = {
        '`set_format("torch")`': partial(by_hand, job.torch_rows),
        "plain rows": partial(by_hand, job.rows),
        "manualloop": job.prepared,
        "manualloop, grouped": partial(job.prepared, group_by_length=True),
    }
    for ours, theirs in zip(job.prepared(), by_hand(job.torch_rows), strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name

    def rows_a_second(name):
        def prepare():
            batches = loaders[name]()
            return lambda: sum(len(batch["labels"]) for batch in batches)

        seconds, num_rows = timed(prepare)
        assert num_rows == len(job.rows)
        return num_rows / seconds

    found = take_turns({name: partial(rows_a_second, name) for name in loaders}, args.num_turns)
    yield (
        "Batches from a loader",
        f"{len(job.rows)} tokenized SST-2 rows, shuffled, batches of {job.batch_size}. The others "
        "are padded by `DataCollatorWithPadding`; manualloop's tensors are the same.",
        table(found, "rows a second", ",.0f", list(loaders)[:2]),
    )


def imports(args):
    def seconds(line):
        code = f"import json, time\nimport torch\ntorch_done = time.process_time()\n{line}\n"
        both = json.loads(
            fresh("-I", "-c", f"{code}print(json.dumps([torch_done, time.process_time()]))")
        )
        left[line].append(both[1] - both[0])
        return both[1]

    left = {line: [] for line in IMPORTS}
    found = take_turns({line: partial(seconds, line) for line in IMPORTS}, args.num_turns)
    more = {line: spread(numbers[1:], ".2f") for line, numbers in left.items()}
    yield (
        "Imports",
        "Each line runs in a new process, which imports torch first.",
        table(found, "s, all", ".2f", IMPORTS[:1], notes=("s after torch", more)),
    )


def memory(args):
    figures, runs = peaks(
        ["train by-hand", "train manualloop"], args.num_memory_rows, args.num_turns
    )
    if DEVICE.type == "cpu":
        assert len({run["weights"] for run in runs}) == 1, "not the same training"
    yield (
        "Peak memory of training",
        f"An epoch of {args.num_memory_rows} SST-2 rows, not grouped, the same BERT, in new "
        'processes; "by-hand" is the bare loop.',
        figures,
    )
    figures, _ = peaks(["evaluate 1", "evaluate 8"], args.num_memory_rows, args.num_turns)
    yield (
        "Peak memory of evaluating",
        f"manualloop, in new processes, on {args.num_memory_rows} SST-2 rows, taken 1 and 8 times.",
        figures,
    )


def peaks(names, num_rows, num_turns):
    """Let children take turns; return the table of their peak memory, and all that they told."""
    runs = {name: [] for name in names}

    def peak(name):
        told = fresh(__file__, "--child", name, "--num-rows", str(num_rows))
        runs[name].append(json.loads(told))
        return runs[name][-1]["peak"]

    found = take_turns({name: partial(peak, name) for name in names}, num_turns)
    added = {name: spread([run["added"] for run in of[1:]], ".0f") for name, of in runs.items()}
    figures = table(found, "MB", ".0f", names[:1], notes=("MB of these added by the run", added))
    return figures, [run for of in runs.values() for run in of]


def child(name, num_rows):
    """Train or evaluate; print the highest memory, what of it the run added, and the weights."""
    what, how = name.split()
    if what == "train":
        job = bert_job("sst2", num_rows)
        model, run = bare(job) if how == "by-hand" else manualloop(job)
    else:
        job = bert_job("sst2", num_rows, as_split="validation", num_times=int(how))
        model, run = manualloop_evaluation(job)
    torch.manual_seed(1)
    before, _ = megabytes()
    run()
    _, peak = megabytes()
    print(json.dumps({"peak": peak, "added": peak - before, "weights": digest(model)}))


def megabytes():
    """Memory in use, and the most there was: resident; on a GPU that of its tensors."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    # VmHWM and not ru_maxrss, which remembers the process that started this one.
    return [int(re.search(rf"{line}:\s+(\d+)", status)[1]) / 1024 for line in ("VmRSS", "VmHWM")]


def fresh(*arguments):
    """Run Python in a new process; return the last line that it printed."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def accuracy(args):
    """Is less padding paid for with accuracy? The same seeds, trained to some success."""
    budget = 15 * 32  # tokens, which makes about as many updates of SST-2 as batches of 32 rows
    names = ["the course's loop", "manualloop, grouped", f"manualloop, max_tokens={budget}"]
    contestants = [TRAIN[names[0]], TRAIN[names[1]], partial(manualloop, max_tokens=budget)]
    scores, seconds = {name: [] for name in names}, {name: [] for name in names}
    for seed in range(args.num_seeds):
        job = bert_job("sst2", args.num_accuracy_rows, seed=seed, lr=3e-4)
        num_steps = [None, None, len(job.prepared(max_tokens=budget))]
        validation = bert_job("sst2", split="validation", as_split="validation").prepared()
        for name, contestant, number in zip(names, contestants, num_steps, strict=True):
            spent, (model, optimizer) = compete(contestant, job, seed)
            check_trained(job, model, optimizer, number)
            seconds[name].append(spent)
            scores[name].append(100 * evaluate_loop(model, validation, "accuracy")["accuracy"])
        print(f"seed {seed}", {name: of[-1] for name, of in scores.items()}, file=sys.stderr)
    notes = {name: accuracy_note(of, scores[names[0]]) for name, of in scores.items()}
    yield (
        "Accuracy with rows grouped by length",
        f"One epoch of {len(job.rows)} SST-2 rows, batches of {job.batch_size} or a budget, "
        f"learning rate {job.lr}, the same BERT, {args.num_seeds} seeds for weights, order and "
        "dropout; accuracy on the split validation, and the difference from the course's loop.",
        table(
            seconds, "s", ".1f", names[:1], notes=("accuracy, % (95 % of the difference)", notes)
        ),
    )


def accuracy_note(scores, reference):
    """Show a mean, its spread, and the interval of the mean difference of pairs."""
    shown = f"{fmean(scores):.1f} (sd {stdev(scores):.1f})"
    if scores is reference:
        return shown
    pairs = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
    half = t.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5
    low, high = fmean(pairs) - half, fmean(pairs) + half
    return f"{shown}: {fmean(pairs):+.1f} ({low:+.1f} to {high:+.1f})"


SECTIONS = {
    section.__name__: section
    for section in (
        overhead,
        instructions,
        train,
        evaluate,
        loader,
        imports,
        memory,
        ceiling,
        accuracy,
    )
}
ONLY_WHEN_NAMED = {"instructions", "ceiling", "accuracy"}
INTRO = """## Side by side

```console
$ MANUALLOOP_SHARED=... nox -s benchmarks
```

manualloop, the loop of the Hugging Face course ("A full training") and other libraries take turns
on the same rows, from the same weights, on one thread. Every turn asserts that each contestant saw
all rows, made the same number of updates, and changed every weight. The tables show medians and
ranges; ratios are taken within each turn. The course's loop is used unchanged. All others use fused
AdamW and plain rows, with every costly option switched off that is not needed
(`tests/benchmarks/loops.py` lists them). The time to build models, loaders and trainers is not
included."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--contestants", nargs="+", help="only those whose names hold one of these")
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=2000, help="of overhead")
    parser.add_argument("--task", nargs="+", choices=NAMES, default=["sst2"], help="of train")
    parser.add_argument("--num-rows", type=int, default=3200, help="of train")
    parser.add_argument("--batch-size", type=int, help="of train; 32 for sst2, 8 for mrpc")
    parser.add_argument("--num-eval-rows", type=int, default=2000, help="of evaluate")
    parser.add_argument("--num-loader-rows", type=int, default=10_000)
    parser.add_argument("--num-memory-rows", type=int, default=1000, help="of memory, and 8 times")
    parser.add_argument("--num-base-steps", type=int, default=100, help="of ceiling")
    parser.add_argument("--num-accuracy-rows", type=int, default=20_000)
    parser.add_argument("--num-seeds", type=int, default=5, help="of accuracy")
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/benchmarks.md"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    disable_progress_bars()
    if args.child:
        child(args.child, args.num_rows)
        return
    where = "on the CPU, CPU time" if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    for section in args.only or [name for name in SECTIONS if name not in ONLY_WHEN_NAMED]:
        for title, text, figures in SECTIONS[section](args):
            if section not in ("instructions", "accuracy"):
                text += f" {args.num_turns} turns {where}."
            print(f"\n### {title}\n\n{text}\n\n{figures}", flush=True)
            if args.write:
                write(INTRO, title, f"{textwrap.fill(text, 100)}\n\n{figures}")


if __name__ == "__main__":
    main()
