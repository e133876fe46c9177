"""Run on each of two ranks: a task is trained, evaluated and resumed as in one process.

same_tasks.py FOLDER

Another task is another function in JOBS.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import TAGS, piece_tokenizer, questions, tagged_words, tiny_bert
from tiny_language_models import TELLS_PACKS_APART, gpt2, padded, paired, pairs_of, rows_of
from transformers import BertForQuestionAnswering, BertForTokenClassification

from manualloop import (
    SingleDevice,
    check_accumulation,
    evaluate_loop,
    prepare_dataloaders,
    prepare_strategy,
    train_loop,
)
from manualloop.tasks import (
    answer_windows,
    dpo,
    lm_loss,
    margins,
    preferred,
    span_logits,
    squad,
    tag_words,
)

BATCH_SIZE, NUM_STEPS = 2, 4
SETTINGS = {
    "vocab_size": 32,
    "initializer_range": 0.5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Job(NamedTuple):
    """A task: its model in float64, its loaders by batch size, and what else the calls take."""

    model: torch.nn.Module
    loaders: Callable[[int], Mapping[str, Any]]
    loss: Mapping[str, Any]  # loss_fn or terms
    evaluation: Mapping[str, Any]  # metric and decode


def token_classification():
    tokenizer = piece_tokenizer()
    model = tiny_bert(len(TAGS), BertForTokenClassification, **SETTINGS)
    data = {
        "train": Dataset.from_dict(tagged_words(22, 1)),
        "validation": Dataset.from_dict(tagged_words(9, 2)),
    }

    def loaders(batch_size):
        preprocess = tag_words(tokenizer, max_length=16)
        options = {"model": model, "preprocess": preprocess, "batch_size": batch_size}
        return prepare_dataloaders(data, tokenizer, **options)

    return Job(model, loaders, {}, {"metric": "seqeval"})


def question_answering():
    tokenizer = piece_tokenizer()
    model = tiny_bert(kind=BertForQuestionAnswering, **SETTINGS)
    data = {
        "train": Dataset.from_dict(questions(8, 1, none=0.0)),
        "validation": Dataset.from_dict(questions(5, 2, none=0.0)),
    }

    def loaders(batch_size):
        return prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=answer_windows(tokenizer, max_length=32, stride=6),
            keep=("id", "context", "offset_mapping"),
            batch_size=batch_size,
        )

    metric = squad(data["validation"])
    return Job(model, loaders, {}, {"metric": metric, "decode": span_logits})


def batches_of(rows, size, collate):
    return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]


def language_model():
    train, validation = (rows_of([3 + 5 * n % 9 for n in range(k)], seed=k) for k in (19, 7))

    def loaders(batch_size):
        splits = {"train": train, "validation": validation}
        return {name: batches_of(rows, batch_size, padded) for name, rows in splits.items()}

    return Job(gpt2(), loaders, {"loss_fn": lm_loss}, {"metric": "perplexity"})


def preferences():
    train, validation = pairs_of(19, seed=1), pairs_of(7, seed=2)

    def loaders(batch_size):
        splits = {"train": train, "validation": validation}
        return {name: batches_of(rows, batch_size, paired) for name, rows in splits.items()}

    loss_fn = dpo(0.5, reference=gpt2(initializer_range=0.1))
    return Job(gpt2(), loaders, {"loss_fn": loss_fn}, {"metric": preferred, "decode": margins})


def packs():
    """Packs on ranks; in one process several packs of the same order are one batch."""
    train, validation = (rows_of([3 + 5 * n % 9 for n in range(k)], seed=k) for k in (60, 7))
    model = gpt2()

    def loaders(batch_size):
        data = Dataset.from_list(train)
        whole = prepare_dataloaders(data, model=model, max_tokens=20, pack=True)["train"]
        splits = {"train": whole, "validation": batches_of(validation, batch_size, padded)}
        if batch_size == 2 * BATCH_SIZE:
            splits["train"] = batches_of(list(whole), 2, one_after_the_other)
        elif batch_size > 2 * BATCH_SIZE:
            splits["train"] = batches_of(train, batch_size, padded)  # of which rows can be split
        return splits

    return Job(model, loaders, {"loss_fn": lm_loss}, {"metric": "perplexity"})


def one_after_the_other(batches):
    return {name: torch.cat([batch[name] for batch in batches], dim=1) for name in batches[0]}


JOBS = {
    function.__name__: function
    for function in (
        token_classification,
        question_answering,
        language_model,
        preferences,
        packs,
    )
    if function is not packs or TELLS_PACKS_APART
}


def train(job, strategy, batch_size, folder, *, stop=None, **options):
    """Train some updates of 2 micro-batches; return model, losses and evaluations."""
    model = copy.deepcopy(job.model)
    loaders = job.loaders(batch_size)
    losses = []

    def on_step(step):
        losses.append(float(step.loss))
        if step.index == stop:
            raise InterruptedError

    try:
        result = train_loop(
            model,
            loaders["train"],
            torch.optim.SGD(model.parameters(), lr=0.1),
            max_steps=NUM_STEPS,
            gradient_accumulation_steps=2,
            checkpoint_dir=folder,
            checkpoint_every=1,
            on_step=on_step,
            progress_bar=False,
            strategy=strategy,
            **job.loss,
        )
    except InterruptedError:
        return None
    evaluated = result.state.model
    return (
        evaluated,
        losses,
        evaluate_loop(
            evaluated, loaders["validation"], strategy=strategy, **job.evaluation, **job.loss
        ),
    )


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def is_near(ours, theirs):
    return torch.allclose(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=0, atol=1e-12)


def check(name, job, strategy, folder):
    alone = SingleDevice("cpu")
    size = BATCH_SIZE * strategy.world_size
    found, losses, scores = train(job, strategy, BATCH_SIZE, folder / "whole")
    expected, other_losses, _ = train(job, alone, size, folder / f"alone-{strategy.rank}")
    assert len(losses) == NUM_STEPS
    assert is_near(losses, other_losses), (name, losses, other_losses)
    assert is_near(weights(found), weights(expected)), name

    # The same weights: to the last bit, in any batches.
    copied = copy.deepcopy(job.model)
    copied.load_state_dict(getattr(found, "module", found).state_dict())
    loader = job.loaders(3)["validation"]
    again = evaluate_loop(found, loader, strategy=strategy, **job.evaluation, **job.loss)
    single = evaluate_loop(copied, loader, strategy=alone, **job.evaluation, **job.loss)
    assert str(again) == str(single), (name, again, single)
    assert scores.keys() == single.keys()

    batch = next(iter(job.loaders(6)["train"]))
    for own in (strategy, alone):
        report = check_accumulation(copy.deepcopy(job.model), batch, strategy=own, **job.loss)
        assert report.is_exact, (name, str(report))

    train(job, strategy, BATCH_SIZE, folder / "parts", stop=2)
    resumed, _, _ = train(job, strategy, BATCH_SIZE, folder / "parts")
    assert torch.equal(weights(resumed), weights(found)), name


def main():
    strategy = prepare_strategy(Accelerator(cpu=True))
    for name, make in JOBS.items():
        job = make()
        job.model.double()
        check(name, job, strategy, Path(sys.argv[1]) / name)
        print(f"{name} is the same", flush=True)


if __name__ == "__main__":
    main()
