"""Give the forty mistakes to manualloop and to transformers' Trainer, and print both as Markdown.

    nox -s mistakes                      # the table of docs/mistakes.md
    nox -s mistakes -- --only 9 25 31    # some of them

For each: what the user sees, and after how many updates. Nothing is judged but that.
"""

import argparse
import logging
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from forty import FORTY, folder_of_another_run
from mistakes import by_train_loop
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PrinterCallback, Trainer, TrainingArguments

MOST = 110  # characters of a message


class Outcome(NamedTuple):
    """What somebody sees who makes a mistake.

    Attributes:
        num_updates: Number of updates before the error, or in the whole run.
        error: Class of the error; None if there was none.
        text: First line of the error, else the line that tells; empty if nothing does.
    """

    num_updates: int
    error: str | None
    text: str

    @property
    def kind(self) -> str:
        if self.error is None:
            return "told" if self.text else "silent"
        return "after updates" if self.num_updates else "before"

    def _updates(self) -> str:
        return "1 update" if self.num_updates == 1 else f"{self.num_updates} updates"

    def cell(self) -> str:
        text = self.text if len(self.text) <= MOST else f"{self.text[:MOST]} ..."
        text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        if self.kind == "silent":
            return f"**nothing**, {self._updates()}"
        if self.kind == "told":
            return f"a line: {text}"
        late = f" **after {self._updates()}**" if self.num_updates else ""
        return f"`{self.error}`{late}: {text}"


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.getMessage()))


def outcome_of(script: Any, parts: tuple[str, ...]) -> Outcome:
    """Run a script; of what is logged, only a line with the first of some parts tells."""
    updates: list[Any] = []
    hook = register_optimizer_step_pre_hook(lambda *_: updates.append(1))
    lines, error = Lines(), None
    loggers = [logging.getLogger(name) for name in ("manualloop", "transformers")]
    for logger in loggers:
        logger.addHandler(lines)
        logger.setLevel(logging.INFO if logger.name == "manualloop" else logging.WARNING)
        logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                script(updates)
            except Exception as caught:
                error = caught
    finally:
        hook.remove()
        for logger in loggers:
            logger.removeHandler(lines)
    if error is not None:
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        for folder in (tempfile.gettempdir(), str(Path.cwd())):
            text = re.sub(rf"{re.escape(folder)}/\w+", "runs/own", text)
        return Outcome(len(updates), type(error).__name__, " ".join(text.split()))
    found = [line for _, line in lines.records] + [str(w.message) for w in warned]
    told = [line for line in found if any(part in line for part in parts)]
    return Outcome(len(updates), None, told[0] if told else "")


def train_with_trainer(updates: list[Any]) -> Any:
    """Return the function that builds a Trainer and trains one epoch."""

    def train(
        model: Any,
        dataset: Any,
        collator: Any = None,
        compute_metrics: Any = None,
        *,
        eval_dataset: Any = None,
        optimizers: Any = (None, None),
        resume_from_checkpoint: Any = None,
        counts: bool = True,
        **arguments: Any,
    ) -> None:
        options = {
            "output_dir": tempfile.mkdtemp(),
            "num_train_epochs": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        if compute_metrics is not None:
            eval_dataset = dataset if eval_dataset is None else eval_dataset
            options["eval_strategy"] = "epoch"
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**options, **arguments}),
            train_dataset=dataset,
            data_collator=collator,
            compute_metrics=compute_metrics,
            eval_dataset=eval_dataset,
            optimizers=optimizers,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        if not counts:
            updates.clear()

    return train


TELLING = {13: "regression", 20: "ignored", 21: "ignored", 31: "greater_is_better", 34: "schedul"}
"""Words by which a line of the Trainer would tell, where there is no error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mistakes")
    only = parser.parse_args().only
    folder_of_another_run()
    print(f"manualloop beside transformers {version('transformers')}\n")
    print("| # | mistake | manualloop | the Trainer |\n|---|---|---|---|")
    kinds: list[tuple[str, str]] = []
    for mistake in FORTY:
        if only and mistake.number not in only:
            continue
        ours = outcome_of(
            lambda updates, mistake=mistake: mistake.ours(by_train_loop, mistake.model(), None),
            mistake.says,
        )
        theirs = outcome_of(
            lambda updates, mistake=mistake: mistake.theirs(train_with_trainer(updates)),
            (TELLING[mistake.number],) if mistake.number in TELLING else (),
        )
        kinds.append((ours.kind, theirs.kind))
        print(
            f"| {mistake.number} | {mistake.title} | {ours.cell()} | {theirs.cell()} |", flush=True
        )
    print("\n| what the user sees | manualloop | the Trainer |\n|---|---|---|")
    for kind, words in (
        ("before", "an error before the first update"),
        ("told", "a line before the first update"),
        ("after updates", "an error after updates were made"),
        ("silent", "nothing"),
    ):
        counts = [sum(side == kind for side in sides) for sides in zip(*kinds, strict=True)]
        print(f"| {words} | {counts[0]} | {counts[1]} |")


if __name__ == "__main__":
    main()
