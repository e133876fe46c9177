"""Fine-tune a model on any GLUE task: chapter 3 of the Hugging Face course, as a script.

    python examples/train_glue.py --task mrpc                        # BERT base, from the hub
    python examples/train_glue.py --task sst2 --data my/glue/sst2    # rows from a folder
    python examples/train_glue.py --task rte --config hidden_size=128 num_hidden_layers=2
                                                                     # a new model, no weights
    python examples/train_glue.py --task mrpc --max-grad-norm 1 --accumulation 4 --patience 3
    python examples/train_glue.py --task qqp --checkpoint-dir runs/qqp --checkpoint-every "10 min"
                                                                     # killed? run it again
    torchrun --nproc_per_node 2 examples/train_glue.py ...           # two processes
    accelerate launch examples/train_glue.py ...                     # as accelerate is configured

prepare_dataloaders finds the splits and columns; the metric is the one that GLUE uses for the task.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from manualloop import (
    evaluate_loop,
    inspect_batch,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_strategy,
    train_loop,
)

NUM_LABELS = {"stsb": 1, "mnli": 3}  # 2 for the others; 1 is a regression
BEST_METRIC = {"mrpc": "f1", "qqp": "f1", "cola": "matthews_correlation", "stsb": "spearmanr"}
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data and model")
    data.add_argument("--task", choices=TASKS, default="mrpc")
    data.add_argument("--data", help="folder or hub name of the task's splits; default: glue/TASK")
    data.add_argument("--model", default="bert-base-uncased", help="pretrained name or folder")
    data.add_argument("--tokenizer", help="name or folder; default: the model's")
    data.add_argument(
        "--config",
        nargs="+",
        metavar="KEY=VALUE",
        help="train a new BERT of this configuration instead of pretrained weights",
    )
    data.add_argument("--max-length", type=int, help="tokens at which texts are truncated")
    data.add_argument("--batch-size", type=int, default=8)
    data.add_argument("--eval-batch-size", type=int)
    data.add_argument("--num-workers", type=int, default=0)
    data.add_argument("--max-train-rows", type=int, help="use only the first rows")

    run = parser.add_argument_group("run")
    run.add_argument("--num-epochs", type=int, help="default: 3")
    run.add_argument("--max-steps", type=int, help="updates, instead of epochs")
    run.add_argument("--lr", type=float, default=5e-5)
    run.add_argument("--weight-decay", type=float, default=0.0)
    run.add_argument("--scheduler", default="linear", help="linear, cosine, constant, ...")
    run.add_argument(
        "--warmup", type=float, default=0.0, help="updates, or a share of them below 1"
    )
    run.add_argument("--accumulation", type=int, default=1, help="batches per update")
    run.add_argument("--max-grad-norm", type=float)
    run.add_argument("--seed", type=int, default=42)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda:1, mps, ...")
    run.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16", "auto"))

    safety = parser.add_argument_group("checkpoints")
    safety.add_argument("--checkpoint-dir", help="folder to resume from and save to")
    safety.add_argument("--checkpoint-every", type=cadence, default="epoch")
    safety.add_argument("--keep-checkpoints", type=int, default=2)
    safety.add_argument("--max-time", help='time after which to save and end, such as "50 min"')

    report = parser.add_argument_group("evaluation and report")
    report.add_argument(
        "--evaluate-every",
        type=cadence,
        default="epoch",
        help='updates, "epoch", "0.25 epoch" or "10 min"',
    )
    report.add_argument("--best-metric", help="metric such as f1 or -loss; default: the task's")
    report.add_argument(
        "--patience", type=int, help="evaluations without improvement after which to stop"
    )
    report.add_argument("--log-every", type=cadence, default=50)
    report.add_argument("--no-progress-bar", action="store_true")
    report.add_argument("--output", help="folder for the trained model and tokenizer")
    report.add_argument("--plot", help="file for the curves, such as curves.png")
    return parser.parse_args()  # fmt: skip


def cadence(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def load_splits(args: argparse.Namespace) -> DatasetDict:
    if not args.data:
        return load_dataset("glue", args.task)
    # "validation_matched" and "validation_mismatched" would both be taken for "validation".
    halves = [
        f"{split}_{half}" for split in ("validation", "test") for half in ("matched", "mismatched")
    ]
    files = {
        split: [str(path) for path in sorted(Path(args.data).rglob(f"*{split}[-.]*"))]
        for split in ("train", *halves)
    }
    if not files["validation_matched"]:
        return load_dataset(args.data)
    return load_dataset(args.data, data_files={split: of for split, of in files.items() if of})


def load_model(args: argparse.Namespace, vocab_size: int):
    num_labels = NUM_LABELS.get(args.task, 2)
    if not args.config:
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=num_labels)
    values = {name: json.loads(value) for name, _, value in (c.partition("=") for c in args.config)}
    config = AutoConfig.for_model("bert", vocab_size=vocab_size, num_labels=num_labels, **values)
    return AutoModelForSequenceClassification.from_config(config)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)  # before the model: its new head is random
    strategy = prepare_strategy(args.device, mixed_precision=args.mixed_precision)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    model = load_model(args, len(tokenizer))
    datasets = load_splits(args)
    if args.max_train_rows:
        datasets["train"] = datasets["train"].select(range(args.max_train_rows))

    loaders = prepare_dataloaders(
        datasets,
        tokenizer,
        model=model,
        max_length=args.max_length,
        batch_size=args.batch_size,
        eval_batch_size=args.eval_batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    if strategy.is_main:
        print(inspect_batch(loaders["train"], tokenizer))
    halves = ("matched", "mismatched")  # of mnli
    validation = loaders.get("validation") or {
        half: loaders[f"validation_{half}"] for half in halves
    }
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=args.lr, weight_decay=args.weight_decay),
        args.scheduler,
        num_epochs=args.num_epochs,
        max_steps=args.max_steps,
        num_warmup_steps=args.warmup,
        gradient_accumulation_steps=args.accumulation,
        max_grad_norm=args.max_grad_norm,
        strategy=strategy,
        evaluate=partial(evaluate_loop, model, validation, f"glue/{args.task}"),
        evaluate_every=args.evaluate_every,
        best_metric=args.best_metric or default_best_metric(args.task),
        patience=args.patience,
        max_time=args.max_time,
        checkpoint_dir=args.checkpoint_dir,
        checkpoint_every=args.checkpoint_every,
        keep_checkpoints=args.keep_checkpoints,
        log_every=args.log_every,
        progress_bar=not args.no_progress_bar,
    )
    if not strategy.is_main:
        return
    print(result)
    print("last", json.dumps(result.metrics))
    print("best", json.dumps(result.best_metrics))
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    if args.plot:
        result.plot().savefig(args.plot)


def default_best_metric(task: str) -> str:
    name = BEST_METRIC.get(task, "accuracy")
    return f"matched_{name}" if task == "mnli" else name


if __name__ == "__main__":
    main()
