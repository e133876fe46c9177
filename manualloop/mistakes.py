"""What is said of mistakes in data and models, and the line that fixes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manualloop.models import forward_columns, unwrap_model
from manualloop.types import Batch


def text_message(
    column: str, example: Any, *, split: str | None = None, is_tokenized: bool = False
) -> str:
    """Say that a column is text, or lists of text, where numbers are wanted."""
    if column in ("label", "labels"):
        return text_label_message(column, example, split=split)
    of = "" if split is None else f" of {split}"
    if is_tokenized:
        return (
            f"Column {column!r}{of} is text, e.g. {example!r} (row 0), beside the tokens made of "
            f'it. Leave it out: dataset.remove_columns("{column}").'
        )
    return (
        f"Column {column!r}{of} is still text. Tokenise it: prepare_dataloaders(dataset, "
        f'tokenizer), or dataset.map(lambda rows: tokenizer(rows["{column}"], truncation=True), '
        "batched=True)."
    )


def text_label_message(column: str, example: Any, *, split: str | None = None) -> str:
    """Say that a column of labels is text, or lists of text."""
    of = "" if split is None else f" of {split}"
    mended = f'dataset.class_encode_column("{column}")'
    if not isinstance(example, str):
        names = f'sorted({{name for names in dataset["{column}"] for name in names}})'
        mended = (
            f'dataset.cast_column("{column}", datasets.Sequence(datasets.ClassLabel('
            f"names={names})))"
        )
    return (
        f"{column!r}{of} holds strings, e.g. {example!r} (row 0). Turn them into class numbers: "
        f"{mended}."
    )


def filter_missing(column: str, *, is_float: bool = False, in_lists: bool = False) -> str:
    """Return the code that filters out rows without a value: None or, among floats, NaN."""
    value = f'row["{column}"]'
    if in_lists:
        return f"dataset.filter(lambda row: all(x is not None and x == x for x in {value}))"
    is_number = f" and {value} == {value}" if is_float else ""  # NaN does not equal itself
    return f"dataset.filter(lambda row: {value} is not None{is_number})"


def scalar_floats_message(found: str, column: str, num_labels: int | None) -> str:
    """Say that one float a row is neither a class nor a row of a multi-label problem."""
    wanted = "one for each class" if num_labels is None else f"{num_labels} of them a row"
    return (
        f"Float labels {found} are read as multi-label, which wants {wanted}. For a regression "
        "load the model with num_labels=1; for one class a row make them integers: "
        f'dataset.cast_column("{column}", datasets.Value("int64")).'
    )


def no_loss_message(model: nn.Module, batch: Batch, outputs: Any) -> str:
    """Say that a model returned something that has no place for a loss."""
    name = type(unwrap_model(model)).__name__
    if isinstance(outputs, Tensor) and outputs.ndim == 0:
        return (
            f"{name}.forward returned a 0-d Tensor, not an output with a loss. If that is the "
            "loss: loss_fn=lambda model, batch: model(**batch)."
        )
    shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
    return (
        f"{name}.forward returned a {type(outputs).__name__}{shape}, not an output with a "
        f"loss. Pass the loss as a function: {_example_loss(model, batch, outputs)}."
    )


def _example_loss(model: nn.Module, batch: Batch, outputs: Any) -> str:
    """Return the line that passes the loss of such outputs as a function."""
    if isinstance(outputs, tuple):  # of transformers with return_dict=False, the loss first
        return "loss_fn=lambda model, batch: model(**batch)[0]"
    inputs = next((c for c in batch if c in forward_columns(model) and c != "labels"), "input_ids")
    return (
        "loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(model("
        f'{inputs}=batch["{inputs}"]), batch["labels"])'
    )


def no_labels_message(batch: Batch) -> str:
    """Say what a batch without labels holds, and which column might be the label."""
    columns = ", ".join(map(str, batch))
    suspects = [name for name in batch if name in LABEL_LIKE]
    if suspects:
        return (
            f"No 'labels' in the batch. Columns: {columns}. Did you mean {suspects[0]!r}? Use "
            f'prepare_dataloaders(..., label_column="{suspects[0]}") or '
            f'dataset.rename_column("{suspects[0]}", "labels").'
        )
    return (
        f"Training needs labels: the batch has only {columns}. For inference use predict_loop; "
        "for a loss of your own pass loss_fn=."
    )


def no_head_message(model: nn.Module) -> str:
    """Say that a model's forward pass ignores labels."""
    model = unwrap_model(model)
    name = type(model).__name__
    if "For" in name or not hasattr(model, "config"):
        accepted = ", ".join(forward_columns(model))
        return (
            f"{name}'s output has loss=None: its forward did not use the labels (it accepts: "
            f"{accepted}). Pass the loss as a function: loss_fn=lambda model, batch: ...."
        )
    return (
        f"{name} has no task head, so it returns no loss. Load one with a head, "
        "AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), or pass loss_fn=."
    )


def misaligned_message(num_labels: int, num_tokens: int, where: str) -> str:
    """Say that a row has another number of labels than of tokens."""
    return (
        f"labels have length {num_labels}, input_ids {num_tokens} ({where}). Align the labels to "
        "the tokens, with -100 for special tokens, and let the collator pad both: "
        "transformers' DataCollatorForTokenClassification(tokenizer)."
    )


LABEL_LIKE = ("label", "label_ids", "target", "targets", "class", "category", "y", "score")
"""Names under which a label column is looked for when a message suggests one."""
