"""Train with the ranks that there are; leave losses, learning rates and weights in a file.

Two ranks with a batch size of 2 have the same global batches as one rank with 4.
"""

import math

import torch
from helpers import VOCAB_SIZE, bert_config, tiny_bert
from transformers import (
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)

from manualloop import (
    TrainState,
    prepare_scheduler,
    prepare_strategy,
    train_steps,
)
from manualloop.data.sampler import ordered_loader

NUM_ROWS, GLOBAL_BATCH = 21, 4
CASES = [
    (head, dtype, accumulation)
    for head in ("sequence", "token", "causal")
    for dtype in (torch.float32, torch.float64)
    for accumulation in (1, 3)
]


def make_model(head):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if head == "sequence":
        return tiny_bert(**options)
    if head == "token":
        return tiny_bert(num_labels=3, kind=BertForTokenClassification, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=bert_config().max_position_embeddings,
            )
        )


def make_rows(head):
    draw = torch.Generator().manual_seed(5)
    rows = []
    for number in range(NUM_ROWS):
        length = 2 + (number * 5) % 9
        ids = torch.randint(4, VOCAB_SIZE, (10,), generator=draw)
        mask = (torch.arange(10) < length).long()
        row = {"input_ids": ids * mask, "attention_mask": mask}
        if head == "sequence":
            row["labels"] = torch.tensor(number % 2)
        elif head == "token":
            row["labels"] = torch.where(mask == 1, ids % 3, -100)
        else:
            row["labels"] = torch.where(mask == 1, ids, -100)
        rows.append(row)
    return rows


def train(head, dtype, accumulation, strategy):
    model = make_model(head).to(dtype)
    batch_size = GLOBAL_BATCH // strategy.world_size
    loader = ordered_loader(
        make_rows(head),
        "train",
        batch_size,
        shuffle=True,
        seed=1,
        drop_last=False,
        collate_fn=default_data_collator,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    steps_per_epoch = math.ceil(math.ceil(NUM_ROWS / GLOBAL_BATCH) / accumulation)
    schedule = prepare_scheduler(
        optimizer, "linear", num_training_steps=2 * steps_per_epoch, num_warmup_steps=2
    )
    state = TrainState(model, optimizer, schedule)
    trace = [
        {
            "loss": float(step.loss),
            "lr": step.lr,
            "items": step.num_items,
            "norm": float(step.grad_norm),
            "rows": state.progress.num_samples,
            "ends": step.ends_epoch,
            "num_steps": step.num_steps,
        }
        for step in train_steps(
            state,
            loader,
            num_epochs=2,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.5,
            strategy=strategy,
        )
    ]
    return trace, torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def main(folder):
    strategy = prepare_strategy()
    results = [train(*case, strategy) for case in CASES]
    folder.mkdir(exist_ok=True)
    torch.save(results, folder / f"{strategy.world_size}-{strategy.rank}.pt")
