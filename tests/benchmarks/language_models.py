"""manualloop beside TRL: the same rows, the same weights, float64 and plain SGD.

    python -m venv trl && trl/bin/pip install -c constraints.txt trl==1.16.0 -e .
    trl/bin/python tests/benchmarks/language_models.py [--write]

Tiny Llamas with random weights train on 7 rows of unequal length, in micro-batches of 2 and windows
of 2, so that the last window of the epoch has 3 rows in micro-batches of 2 and 1. What is right is
written out by hand: the gradient of the mean over all items of a window, each row by itself. The
figures are the largest difference of a weight after the epoch, relative to the largest change of a
weight. `--write` puts the table into docs/benchmarks.md.
"""

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from manualloop import evaluate_loop, prepare_dataloaders, train_loop
from manualloop.tasks import chat, dpo, lm_loss, preference_pairs, reward

DOCS = Path(__file__).parents[2] / "docs/benchmarks.md"
BEGIN, END = "<!-- trl:begin -->", "<!-- trl:end -->"
WORDS = [f"t{number}" for number in range(40)]
SPECIAL = ["<pad>", "</s>", "<unk>", "user:", "assistant:"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
RATE, BETA = 0.05, 0.1


def tokenizer():
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "</s>"])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)
    fast.chat_template = TEMPLATE
    return fast


TOKENIZER = tokenizer()


def llama(kind=LlamaForCausalLM, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = {"num_attention_heads": 2, "initializer_range": 0.3, "pad_token_id": 0} | config
    made = kind(LlamaConfig(vocab_size=len(TOKENIZER), eos_token_id=1, **sizes, **config))
    return made.double()


def words(length, draw):
    numbers = torch.randint(len(WORDS), (length,), generator=draw).tolist()
    return " ".join(WORDS[number] for number in numbers)


def completions(number, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = [(2 + 3 * n % 5, 1 + 7 * n % 11) for n in range(number)]
    return [{"prompt": words(a, draw) + " ", "completion": words(b, draw)} for a, b in lengths]


def preferences(number, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt": words(2 + n % 3, draw) + " ",
            "chosen": words(1 + 5 * n % 7, draw),
            "rejected": words(1 + 3 * n % 8, draw),
        }
        for n in range(number)
    ]


def ids_of(row, answer):
    prompt = TOKENIZER(row["prompt"].strip())["input_ids"]
    return prompt, [*TOKENIZER(row[answer])["input_ids"], TOKENIZER.eos_token_id]


def rows_of_tokens(rows):
    """Rows of input_ids and labels, which both sides get."""
    pairs = [ids_of(row, "completion") for row in rows]
    return [{"input_ids": a + b, "labels": [-100] * len(a) + b} for a, b in pairs]


def by_hand(model, rows, loss_of, size=4):
    """Train an epoch by plain SGD with the mean over all items of each window of rows."""
    model = copy.deepcopy(model)
    for at in range(0, len(rows), size):
        model.zero_grad()
        parts = [loss_of(model, row) for row in rows[at : at + size]]
        total, items = (sum(part[place] for part in parts) for place in (0, 1))
        (total / items).backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
    return model


def sft_of(model, row):
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    return cross_entropy(logits, labels, reduction="sum"), int((labels != -100).sum())


def logp(model, row, answer):
    before, after = ids_of(row, answer)
    ids = torch.tensor([before + after])
    each = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return each.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum()


def dpo_of(model, row, reference):
    with torch.no_grad():
        before = logp(reference, row, "chosen") - logp(reference, row, "rejected")
    apart = logp(model, row, "chosen") - logp(model, row, "rejected") - before
    return -logsigmoid(BETA * apart), 1


def reward_of(model, row):
    rows = [ids_of(row, answer) for answer in ("chosen", "rejected")]
    scores = [model(input_ids=torch.tensor([a + b])).logits[0, 0] for a, b in rows]
    return -logsigmoid(scores[0] - scores[1]), 1


def off(found, right, start):
    """The largest difference of a weight, relative to the largest change."""
    names = dict(right.named_parameters())
    size = max(float((w - names[n]).abs().max()) for n, w in start.named_parameters())
    return max(float((w - names[n]).abs().max()) for n, w in found.named_parameters()) / size


# ------------------------------------------------------------------------------------------- TRL


def trl_arguments(kind, folder, **options):
    given = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return kind(**(given | options))


def trl_trainer(kind, config, model, rows, options=None, **more):
    folder = tempfile.mkdtemp()
    arguments = trl_arguments(config, folder, **(options or {}))
    dataset = Dataset.from_list(rows)
    return kind(
        model=model, args=arguments, train_dataset=dataset, processing_class=TOKENIZER, **more
    )


def trained_by_trl(*args, **more):
    trainer = trl_trainer(*args, **more)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer.model


# ------------------------------------------------------------------------------------ manualloop


def trained(model, rows, preprocess, loss_fn, **options):
    """Train an epoch in the order of the rows."""
    data = Dataset.from_list(rows)
    prepared = prepare_dataloaders(
        {"validation": data}, TOKENIZER, model=model, preprocess=preprocess, batch_size=2
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train_loop(
        model,
        prepared["validation"],
        optimizer,
        None,
        num_epochs=1,
        gradient_accumulation_steps=2,
        loss_fn=loss_fn,
        progress_bar=False,
        **options,
    )
    return model


def losses():
    """Yield, for each loss, how far both are off, without and with a short last window."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    reference = llama(seed=1)
    for number in (8, 7):
        windows = "whole windows" if number == 8 else "a short last window"
        rows, pairs = rows_of_tokens(completions(number)), preferences(number)
        start = llama()
        right = by_hand(start, rows, sft_of)
        options = {"packing": False}
        theirs = trained_by_trl(SFTTrainer, SFTConfig, copy.deepcopy(start), rows, options)
        ours = trained(copy.deepcopy(start), rows, None, lm_loss)
        yield f"SFT, {windows}", off(theirs, right, start), off(ours, right, start)

        right = by_hand(start, pairs, partial(dpo_of, reference=reference))
        options = {"beta": BETA, "max_length": None}
        more = {"ref_model": copy.deepcopy(reference)}
        model = copy.deepcopy(start)
        theirs = trained_by_trl(DPOTrainer, DPOConfig, model, pairs, options, **more)
        loss_fn = dpo(BETA, reference=reference)
        ours = trained(copy.deepcopy(start), pairs, preference_pairs(TOKENIZER), loss_fn)
        yield f"DPO, {windows}", off(theirs, right, start), off(ours, right, start)

        start = llama(LlamaForSequenceClassification, num_labels=1)
        right = by_hand(start, pairs, reward_of)
        whole = [
            {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in pairs
        ]
        model = copy.deepcopy(start)
        theirs = trained_by_trl(RewardTrainer, RewardConfig, model, whole, {"max_length": None})
        ours = trained(copy.deepcopy(start), pairs, preference_pairs(TOKENIZER), reward)
        yield f"reward model, {windows}", off(theirs, right, start), off(ours, right, start)


def evaluation():
    from trl import SFTConfig, SFTTrainer

    rows, model = rows_of_tokens(completions(11)), llama()
    data = Dataset.from_list(rows)
    theirs, ours = [], []
    for size in (1, 2, 4, 8):
        options = {"per_device_eval_batch_size": size, "eval_strategy": "no"}
        trainer = trl_trainer(
            SFTTrainer, SFTConfig, copy.deepcopy(model), rows, options, eval_dataset=data
        )
        theirs.append(trainer.evaluate()["eval_loss"])
        loaders = prepare_dataloaders({"validation": data}, TOKENIZER, model=model, batch_size=size)
        ours.append(evaluate_loop(model, loaders["validation"], loss_fn=lm_loss)["loss"])
    return [f"{min(found):.4f} to {max(found):.4f}" for found in (theirs, ours)]


def stops():
    """Rows of a chat that end with a stop token, after truncation to 16 tokens."""
    from trl import SFTConfig, SFTTrainer

    draw = torch.Generator().manual_seed(0)
    chats = []
    for number in range(84):
        turns = []
        for turn in range(2 + number % 3):
            turns.append({"role": "user", "content": words(1 + (number + turn) % 3, draw)})
            turns.append({"role": "assistant", "content": words(1 + (number * turn) % 5, draw)})
        chats.append({"messages": turns})
    options = {"max_length": 16, "packing": False}
    trainer = trl_trainer(SFTTrainer, SFTConfig, llama(), chats, options)
    theirs = trainer.train_dataset["labels"][:]
    made = chat(TOKENIZER, max_length=16)({"messages": [row["messages"] for row in chats]})
    counted = []
    for labels in (theirs, made["labels"]):
        trained = [[label for label in row if label != -100] for row in labels]
        whole = sum(bool(row) and row[-1] == TOKENIZER.eos_token_id for row in trained)
        counted.append(f"{whole} of {len(chats)}")
    return counted


def packs():
    """Whether a run in packs that was ended inside an epoch ends as one that was not."""
    return [
        "equal to the bit" if all(map(torch.equal, whole, resumed)) else "another"
        for whole, resumed in (packs_by_trl(), packs_by_manualloop())
    ]


def packs_by_trl():
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_save = control.should_training_stop = state.global_step == 2

    rows, ends = rows_of_tokens(completions(24)), []
    options = {"packing": True, "max_length": 32, "num_train_epochs": 2, "save_strategy": "steps"}
    options |= {"save_steps": 1000, "train_sampling_strategy": "random", "optim": "adamw_torch"}
    for stops in (False, True):
        trainer = trl_trainer(SFTTrainer, SFTConfig, llama(), rows, options)
        if stops:
            trainer.add_callback(Stop())
            trainer.train()
            folder = trainer.args.output_dir
            again = options | {"output_dir": folder}
            trainer = trl_trainer(SFTTrainer, SFTConfig, llama(), rows, again)
        trainer.train(resume_from_checkpoint=stops)
        ends.append([weight.detach() for weight in trainer.model.parameters()])
    return ends


def packs_by_manualloop():
    rows, ends = Dataset.from_list(rows_of_tokens(completions(24))), []

    def train(folder, on_step=None):
        model = llama()
        packed = {"max_tokens": 32, "pack": True}
        loaders = prepare_dataloaders({"train": rows}, TOKENIZER, model=model, **packed)
        options = {"num_epochs": 2, "checkpoint_dir": folder, "checkpoint_every": 1}
        options |= {"gradient_accumulation_steps": 2, "loss_fn": lm_loss, "progress_bar": False}
        train_loop(model, loaders["train"], on_step=on_step, **options)
        return [weight.detach() for weight in model.parameters()]

    def stop(step):
        if step.index == 3:
            raise InterruptedError

    ends.append(train(tempfile.mkdtemp()))
    folder = tempfile.mkdtemp()
    with contextlib.suppress(InterruptedError):
        train(folder, stop)
    return [*ends, train(folder)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    disable_progress_bars()
    hf_logging.set_verbosity_error()
    logging.getLogger("manualloop").setLevel("WARNING")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = ["| | TRL 1.16.0 | manualloop |", "|---|---|---|"]
    for name, theirs, ours in losses():
        lines.append(f"| {name}: weights off by | {theirs:.1e} | {ours:.1e} |")
        print(lines[-1], flush=True)
    for name, (theirs, ours) in (
        ("evaluation loss over batch sizes 1 to 8", evaluation()),
        ("chats whose last trained token is the stop token, cut at 16 tokens", stops()),
        ("resumed inside an epoch of packs", packs()),
    ):
        lines.append(f"| {name} | {theirs} | {ours} |")
        print(lines[-1], flush=True)
    if args.write:
        text = DOCS.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCS.write_text(text[:begin] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
