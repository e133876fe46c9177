"""The log-probabilities of pairs under a reference, computed once and kept as a column.

Each is kept with a check sum of the tokens that it was computed of, so that a column of other
tokens, another template or another order of the rows is noticed when it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from manualloop.arguments import is_count
from manualloop.errors import ConfigError, DataError
from manualloop.models import digest_of_weights, evaluation_mode, model_name, own_part
from manualloop.notices import say
from manualloop.tasks.heads import row_logps, token_losses
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.tokens import check_tokens
from manualloop.types import Origin, Place

_PRIME = 16_777_213  # below 2**24, up to which float32 has every whole number
_STEP = 2_654_435_761


def reference_logps(
    model: nn.Module,
    rows: Any,
    *,
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
) -> list[list[float]]:
    """Return the log-probabilities of both answers of each pair under a model, as a column.

    They are sums over the labelled tokens, in float64 from the logits on. The model runs in
    evaluation mode and is left as it was. A third number of each row is a check sum of its tokens:
    ``dpo`` refuses the column beside others.

    Args:
        model: The reference, on the device on which it is to run.
        rows: Rows that ``preference_pairs`` made: a dataset, or a list of dicts with ``input_ids``
            and ``labels``, lists of two lists.
        batch_size: Number of pairs at once.
        path: File in which they are kept. If it holds those of the same weights and the same rows,
            they are read instead of computed, unless the model gives other ones for the longest
            pairs, as with other adapters. None keeps none.

    Raises:
        ConfigError: ``batch_size`` is no number of pairs.
        DataError: The rows are no pairs.

    ::

        rows = data.map(preference_pairs(tokenizer), batched=True, remove_columns=data.column_names)
        rows = rows.add_column("reference", reference_logps(model, rows, path="reference.json"))
        loaders = prepare_dataloaders({"train": rows}, tokenizer, model=model, keep=("reference",))
        train_loop(model, loaders["train"], loss_fn=dpo(beta=0.1))
    """
    if not is_count(batch_size):
        raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
    pairs = [_pair_of(row, number) for number, row in enumerate(_each(rows))]
    sums = [_sum_of(pair) for pair in pairs]
    digest = _digest_of_all(model) if path is not None else digest_of_weights(model)
    name = f"{model_name(model)} (weights {digest[:8]})"
    known = None if path is None else _read(Path(path), digest, sums)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    found: list[list[float]] = [[] for _ in pairs]
    order = sorted(range(len(pairs)), key=lambda number: -max(map(len, pairs[number][0])))
    with evaluation_mode(model, device):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            logps = _of_batch(model, [pairs[number] for number in numbers], device)
            for number, values in zip(numbers, logps, strict=True):
                found[number] = [*values, sums[number]]
            if known is not None:
                if _are_alike(model, known, found, numbers):
                    say(f"reference log-probabilities of {len(pairs)} pairs: read from {path}.")
                    return known
                say(
                    f"the reference log-probabilities in {path} are of the same weights, and the "
                    "model gives other ones now, as with other adapters: computed again."
                )
                known = None
    say(f"reference log-probabilities of {len(pairs)} pairs under {name}: computed.")
    if path is not None and os.environ.get("RANK", "0") == "0":
        _write(Path(path), digest, found)
    return found


def _digest_of_all(model: nn.Module) -> str:
    """Return a digest of every number of every weight, in which other weights have another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor):
            flat = own_part(weight.detach()).cpu().contiguous().reshape(-1)
            digest.update(f"{name} {weight.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _are_alike(
    model: nn.Module,
    known: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    numbers: Sequence[int],
) -> bool:
    """Tell whether a file has what a model gives for some pairs, up to rounding."""
    kinds = {w.dtype for w in model.parameters() if w.is_floating_point()} or {torch.float32}
    rounding = max(1e-3, *(8 * torch.finfo(kind).eps for kind in kinds))
    pairs = [(a, b) for n in numbers for a, b in zip(known[n][:2], found[n][:2], strict=True)]
    return all(abs(a - b) <= rounding * max(abs(b), 1) for a, b in pairs)


_Pair = tuple[list[list[int]], list[list[int]]]


def _each(rows: Any) -> Any:
    if (
        isinstance(rows, Mapping)
        or not hasattr(rows, "__getitem__")
        or not hasattr(rows, "__len__")
    ):
        raise DataError(
            f"reference_logps takes rows, a dataset or a list of dicts, not a "
            f"{type(rows).__name__}. Make them by dataset.map(preference_pairs(tokenizer), "
            "batched=True, remove_columns=dataset.column_names)."
        )
    return (rows[number] for number in range(len(rows)))


def _pair_of(row: Any, number: int) -> _Pair:
    columns = row if isinstance(row, Mapping) else {}
    both = [columns.get(name) for name in ("input_ids", "labels")]
    lists = [
        [[int(value) for value in part] for part in column]
        for column in both
        if column is not None and len(column) == 2 and all(hasattr(p, "__len__") for p in column)
    ]
    if len(lists) != 2 or [*map(len, lists[0])] != [*map(len, lists[1])]:
        raise DataError(
            f"Row {number} is no pair: it has {', '.join(map(str, columns)) or 'no columns'}, and "
            "input_ids and labels must be two lists each. preference_pairs(tokenizer) makes such "
            "rows of prompt, chosen and rejected."
        )
    return lists[0], lists[1]


def _batch_of(pairs: Sequence[_Pair]) -> dict[str, Tensor]:
    """Return the rows of some pairs, padded on the right, ``(2 * pairs, tokens)``."""
    columns = {
        "input_ids": ([row for ids, _ in pairs for row in ids], 0),
        "labels": ([row for _, labels in pairs for row in labels], IGNORE_INDEX),
        "attention_mask": ([[1] * len(row) for ids, _ in pairs for row in ids], 0),
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in values], True, end)
        for name, (values, end) in columns.items()
    }


def _of_batch(model: nn.Module, pairs: Sequence[_Pair], device: torch.device) -> list[list[float]]:
    batch = _batch_of(pairs)
    check_tokens(model, batch, _PLACE)
    rows = {name: column.to(device) for name, column in batch.items()}
    found: list[list[float]] = row_logps(model, rows, _in_float64).sums.view(-1, 2).tolist()
    return found


_PLACE = Place(
    lambda: "a batch of pairs",
    lambda row: f"row {row} of a batch of pairs",
    Origin(cut="preference_pairs(tokenizer, max_length={room})"),
)


def _in_float64(logits: Tensor, labels: Tensor) -> Tensor:
    has_it = logits.device.type != "mps"
    return token_losses(logits.double() if has_it else logits, labels)


def _sum_of(pair: _Pair) -> int:
    rows = {name: column.view(1, 2, -1) for name, column in _batch_of([pair]).items()}
    return int(check_sums_of(rows))


def _read(path: Path, digest: str, sums: Sequence[int]) -> list[list[float]] | None:
    """Return the column that a file holds, if it is of this model and these rows."""
    try:
        saved = json.loads(path.read_text())
        column = [[float(value) for value in row] for row in saved["rows"]]
        of_model, of_rows = saved["weights"], [row[2] for row in column]
    except FileNotFoundError:
        return None
    except (IndexError, KeyError, OSError, TypeError, ValueError):
        say(f"{path} holds no reference log-probabilities, and is written anew.")
        return None
    if of_model != digest or of_rows != list(sums):
        what = "weights" if of_model != digest else "rows"
        say(f"the reference log-probabilities in {path} are of other {what}: computed again.")
        return None
    return column


def _write(path: Path, digest: str, rows: Sequence[Sequence[float]]) -> None:
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    aside.write_text(json.dumps({"weights": digest, "rows": rows}))
    os.replace(aside, path)


def check_sums_of(batch: Any) -> Tensor:
    """Return a number for each pair that depends on all its tokens and labels, not on padding."""
    ids, labels = batch["input_ids"].long().cpu(), batch["labels"].long().cpu()
    mask = batch.get("attention_mask")
    attended = torch.ones_like(ids) if mask is None else mask.long().cpu().clamp(max=1)
    places = attended.cumsum(-1) + torch.tensor([[0], [7_919_000]])  # the two are no set
    weights = (places * _STEP) % _PRIME
    numbers = (ids + 1) * 31 + (labels + 101) * 65_537
    sums: Tensor = ((numbers % _PRIME) * weights % _PRIME * attended).sum((-1, -2)) % _PRIME
    return sums


def check_sums(column: Any, batch: Any) -> None:
    """Refuse a column of references that was computed of other tokens.

    A column without check sums is believed.

    Raises:
        DataError: The message names the row.
    """
    values = column if isinstance(column, Tensor) else torch.tensor(column, dtype=torch.float64)
    if values.ndim != 2 or values.shape[1] != 3:
        return
    wrong = (values[:, 2].cpu().long() != check_sums_of(batch)).nonzero()[:, 0].tolist()
    if wrong:
        raise DataError(
            f"The column 'reference' does not belong to the tokens beside it: {len(wrong)} of "
            f"{len(values)} pairs of a batch were computed of others (the first is row {wrong[0]})."
            " The template, the tokenizer or the order of the rows has changed since. Compute it "
            'again: rows.add_column("reference", reference_logps(model, rows)).'
        )
