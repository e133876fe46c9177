"""How a script makes batches: padding, and the order of the rows in each epoch."""

from __future__ import annotations

from typing import Any

from manualloop.data.collate import padding_collator
from manualloop.data.preparation import Preparation
from manualloop.models import accepts
from manualloop.script.job import Job
from manualloop.script.text import Call, Line, Note, Part, code, literal, when
from manualloop.script.trial import grouped_columns, needs_floats


def batches(job: Job) -> Part:
    """The collator, and the function that reads an epoch."""
    made = job.preparation
    if made is None:
        return Part([])
    collate, imports = _collate(job, made)
    evaluated = _eval_dataloader(job)
    apart = when(len(collate) > 1 and evaluated, "", "")
    lines: list[Line] = [*collate, *apart, *evaluated, "", ""]
    if _is_grouped(job):
        lines += [*_grouped_order(job, made), "", ""]
        imports.append("import numpy as np")
    if job.is_distributed:
        lines += _epoch_of_a_rank(job)
        imports += ["import math"]
    else:
        lines += _epoch(job)
    return Part(lines, (*imports, "from torch.utils.data import DataLoader"))


def _collate(job: Job, made: Preparation) -> tuple[list[Line], list[str]]:
    if made.collate_fn is not None:
        return [f"collate = {made.collate_fn.__name__}"], []
    tokenizer = getattr(job.loader, "tokenizer", None)
    if tokenizer is None:
        return ["collate = default_data_collator"], [
            "from transformers import default_data_collator"
        ]
    kind = type(padding_collator(tokenizer, made.task, None)).__name__
    multiple = made.pad_to_multiple_of
    options = f", pad_to_multiple_of={multiple}" if multiple else ""
    imports = [f"from transformers import {kind}"]
    changes = [
        *when(
            needs_floats(job),
            'batch["labels"] = batch["labels"].float()  # this loss compares numbers',
        ),
        *when(
            not accepts(job.model, "attention_mask"),
            'del batch["attention_mask"]  # this model takes none',
        ),
    ]
    if not changes:
        return [f"collate = {kind}(tokenizer{options})"], imports
    body = [f"batch = {kind}(tokenizer{options})(rows)", *changes, "return batch"]
    return ["def collate(rows):", body], imports


def _options(loader: Any) -> list[str]:
    return [
        *when(loader.num_workers, f"num_workers={loader.num_workers}"),  # type: ignore[list-item]
        *when(loader.pin_memory, "pin_memory=True"),  # type: ignore[list-item]
    ]


def _is_grouped(job: Job) -> bool:
    sampler = job.loader.batch_sampler
    return sampler.shuffle and sampler.lengths is not None


def _order(job: Job) -> list[Line]:
    if not job.loader.batch_sampler.shuffle:
        return [
            "rng = torch.Generator().manual_seed(SEED + epoch)",
            *when(job.is_distributed, "order = list(range(len(train_dataset)))"),
        ]
    if _is_grouped(job):
        return [
            "rng = torch.Generator().manual_seed(SEED + epoch)",
            "order = grouped_order(rng)",
        ]
    return [
        "rng = torch.Generator().manual_seed(SEED + epoch)",
        "order = torch.randperm(len(train_dataset), generator=rng).tolist()",
    ]


def _epoch(job: Job) -> list[Line]:
    drops, shuffles = job.loader.batch_sampler.drop_last, job.loader.batch_sampler.shuffle
    return [
        "def training_batches(epoch):",
        [
            *when(
                shuffles,
                Note(
                    "The order is a function of seed and epoch alone. shuffle=True would draw from "
                    "the generator of dropout, so that an evaluation could change the order."
                ),
            ),
            *_order(job),
            Call(
                "return DataLoader(",
                [
                    "train_dataset",
                    "BATCH_SIZE",
                    *(["sampler=order"] if shuffles else []),
                    "collate_fn=collate",
                    *(["drop_last=True"] if drops else []),
                    *_options(job.loader),
                    "generator=rng",
                ],
            ),
        ],
    ]


def _epoch_of_a_rank(job: Job) -> list[Line]:
    drops = job.loader.batch_sampler.drop_last
    end = "len(order) - BATCH_SIZE + 1" if drops else "len(order)"
    return [
        "def training_batches(epoch):",
        [
            Note(
                "Every process draws the same order, a function of seed and epoch alone, and takes "
                "its share: batch k belongs to process k % num_processes."
            ),
            *_order(job),
            f"starts = range(0, {end}, BATCH_SIZE)",
            "batches = [order[start : start + BATCH_SIZE] for start in starts]",
            "rank, num_ranks = accelerator.process_index, accelerator.num_processes",
            "num_turns = math.ceil(len(batches) / num_ranks)",
            "own = range(rank, num_turns * num_ranks, num_ranks)",
            Note(
                "In the last turn a process may have no batch. It takes part with the last batch "
                "of all, which counts 0 there: its gradient is waited for."
            ),
            Call(
                "loader = DataLoader(",
                [
                    "train_dataset",
                    "batch_sampler=[batches[min(k, len(batches) - 1)] for k in own]",
                    "collate_fn=collate",
                    *_options(job.loader),
                    "generator=rng",
                ],
            ),
            "return zip(loader, (k >= len(batches) for k in own))",
        ],
    ]


def _grouped_order(job: Job, made: Preparation) -> list[Line]:
    multiple = made.pad_to_multiple_of
    return [
        code(
            '''
            def grouped_order(rng):
                """Return the rows in an order in which those of a batch are about equally long."""
            '''
        ),
        [
            "# It saves padding. Rows are drawn, then sorted within parts of 192 batches or a",
            "# quarter of all, then the batches are drawn; one with the longest row comes first,",
            "# so that a lack of memory shows at once.",
            f"names = {literal(grouped_columns(made))}",
            "lengths = np.max([[*map(len, train_dataset[name])] for name in names], axis=0)",
            *when(multiple, f"lengths = -(-lengths // {multiple}) * {multiple}"),
            "drawn = torch.randperm(len(lengths), generator=rng).numpy()",
            "num_batches = len(drawn) // BATCH_SIZE",
            f"unit = BATCH_SIZE{' * accelerator.num_processes' if job.is_distributed else ''}",
            "end = len(drawn) // unit * unit",
            "num_parts = max(-(-num_batches // 192), 4)",
            "size = max(-(-end // unit // num_parts), 1) * unit",
            "cuts = [*range(size, end, size), end, num_batches * BATCH_SIZE]",
            'parts = [p[np.argsort(-lengths[p], kind="stable")] for p in np.split(drawn, cuts)]',
            "rows = np.concatenate(parts)",
            "units = [rows[start : start + unit] for start in range(0, end, unit)]",
            "places = torch.randperm(len(units), generator=rng).tolist()",
            "places.sort(key=lambda k: lengths[units[k][0]] == lengths.max(), reverse=True)",
            "rows = np.concatenate([*(units[k] for k in places), rows[end:]])",
            "longest = int(lengths[rows].argmax())",
            "rows[[0, longest]] = rows[[longest, 0]]",
            "return rows.tolist()",
        ],
    ]


def _eval_dataloader(job: Job) -> list[Line]:
    if job.evaluation is None or not job.makes_eval_loader:
        return []
    loader = job.evaluation.loader
    own_generator = Note(
        "A loader draws a number at each pass: with a generator of its own, not from torch's."
    )
    if job.is_distributed:
        return [
            f"eval_batches = range(0, len(eval_dataset), {loader.batch_sampler.batch_size})",
            "own = [",
            [
                "range(k, min(k + eval_batches.step, len(eval_dataset)))",
                "for k in eval_batches[accelerator.process_index :: accelerator.num_processes]",
            ],
            "]",
            own_generator,
            Call(
                "eval_dataloader = DataLoader(",
                [
                    "eval_dataset",
                    "batch_sampler=own",
                    "collate_fn=collate",
                    "generator=torch.Generator()",
                ],
            ),
        ]
    return [
        own_generator,
        Call(
            "eval_dataloader = DataLoader(",
            [
                "eval_dataset",
                _size(job, loader),
                "collate_fn=collate",
                *_options(loader),
                "generator=torch.Generator()",
            ],
        ),
    ]


def _size(job: Job, loader: Any) -> str:
    size = loader.batch_sampler.batch_size
    return "BATCH_SIZE" if size == job.loader.batch_sampler.batch_size else f"batch_size={size}"
