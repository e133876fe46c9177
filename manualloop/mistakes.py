"""The messages about mistakes in data and models, each with the line that fixes the mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from manualloop.batches import columns_of
from manualloop.models import forward_columns, model_name, unwrap_model
from manualloop.types import Batch, Place


def text_message(
    column: str, example: Any, *, split: str | None = None, is_tokenized: bool = False
) -> str:
    """Return the message about a column of text, or of lists of text, where numbers are wanted."""
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
    """Return the message about labels that are text, of rows of which no more is known."""
    of = "" if split is None else f" of {split}"
    if isinstance(example, str):
        fix = f'dataset.class_encode_column("{column}")'
    else:
        names = f'sorted({{name for row in dataset for name in row["{column}"]}})'
        fix = class_lists_call(column, names, "dataset.")
    return (
        f"{column!r}{of} holds strings, e.g. {example!r} (row 0). Turn them into class numbers: "
        f"{fix}."
    )


def class_lists_call(column: str, names: str, of: str = "") -> str:
    """Return the call that turns lists of names into lists of class numbers."""
    classes = f"datasets.Sequence(datasets.ClassLabel(names={names}))"
    return f'{of}cast_column("{column}", {classes})'


def filter_missing(
    column: str, *, is_float: bool = False, in_lists: bool = False, of: str = "dataset."
) -> str:
    """Return the code that filters out rows without a value: None or, among floats, NaN."""
    value = f'row["{column}"]'
    if in_lists:
        inside = f"all(x is not None and x == x for x in {value})"
        return f"{of}filter(lambda row: {value} is not None and {inside})"
    is_number = f" and {value} == {value}" if is_float else ""  # NaN does not equal itself
    return f"{of}filter(lambda row: {value} is not None{is_number})"


def fill_argument(columns: Sequence[str], value: str) -> str:
    """Return the argument of ``prepare_dataloaders`` that fills empty cells of some columns."""
    return "fill={" + ", ".join(f'"{name}": {value}' for name in columns) + "}"


def no_tokens_fix(texts: Sequence[str], cells: Mapping[str, Any], tokenizer: Any, line: str) -> str:
    """Return the sentence that fixes a row of which the tokenizer makes no token.

    Args:
        texts: The columns of text.
        cells: The row.
        tokenizer: The tokenizer.
        line: The line that filters such rows out, for a text that is not empty.
    """
    names = ("eos_token", "unk_token", "pad_token")
    token = next((name for name in names if getattr(tokenizer, name, None)), None)
    empty = [name for name in texts if not cells.get(name)]
    if token is not None and empty:
        return f"Pass a text for empty cells: {fill_argument(empty, f'tokenizer.{token}')}."
    return f"Filter such rows out: {line}."


def pad_token_fix(tokenizer: Any) -> str:
    """Return the line that gives a tokenizer a pad token other than EOS.

    With EOS as the pad token, collators that recognise padding by the token would leave EOS out of
    the labels.
    """
    unknown = getattr(tokenizer, "unk_token", None)
    pad = "model.config.pad_token_id = tokenizer.pad_token_id"
    if unknown is not None and unknown != getattr(tokenizer, "eos_token", None):
        return f"tokenizer.pad_token = tokenizer.unk_token; {pad}"
    return (
        'tokenizer.add_special_tokens({"pad_token": "<pad>"}); model.resize_token_embeddings('
        f"max(len(tokenizer), model.config.vocab_size)); {pad}"
    )


def scalar_floats_message(
    found: str, column: str, num_labels: int | None, *, are_whole: bool = True, line: str = ""
) -> str:
    """Return the message about one float per row, neither a class nor a multi-label row.

    Args:
        found: Where they are.
        column: Their column.
        num_labels: Outputs of the model; None if they are unknown.
        are_whole: Whether all are whole numbers, which may be classes.
        line: The line that makes them integers; empty for the usual one.
    """
    wanted = "one for each class" if num_labels is None else f"{num_labels} of them a row"
    message = (
        f"Float labels {found} are read as multi-label, which wants {wanted}. For a regression "
        "load the model with num_labels=1"
    )
    if not are_whole:
        return f"{message}."
    line = line or f"dataset.{integers_call(column)}"
    return f"{message}; for one class a row make them integers: {line}."


def targets_message(target: float, place: str) -> str:
    """Return the first sentence about a multi-label target that is beyond 0 and 1."""
    return (
        f"Target {target:g} in {place}, but multi-label targets are 0 to 1 for each class, or -100 "
        "to leave a class out"
    )


def integers_call(column: str) -> str:
    """Return the call that makes a column of whole numbers one of integers."""
    return f'cast_column("{column}", datasets.Value("int64"))'


def renumber_call(column: str, values: Sequence[int]) -> str:
    """Return the call that numbers classes from 0 in the order of their numbers.

    >>> renumber_call("label", [-1, 1])
    'map(lambda row: {"label": (row["label"] + 1) // 2})'
    """
    value = f'row["{column}"]'
    smallest, step = values[0], (values[1] - values[0]) if len(values) > 1 else 1
    if list(values) == [smallest + step * n for n in range(len(values))]:
        sign, size = ("-", smallest) if smallest >= 0 else ("+", -smallest)
        shifted = f"{value} {sign} {size}" if size else value
        number = (
            shifted if step == 1 else f"({shifted}) // {step}" if size else f"{value} // {step}"
        )
    else:
        number = f"{[int(value) for value in values]}.index({value})"
    return as_map(column, number)


def as_map(column: str, value: str) -> str:
    """Return the call that computes a column anew, from the code of its value."""
    return f'map(lambda row: {{"{column}": {value}}})'


def arrays_message(batch: Any, columns: Mapping[str, Any], where: str) -> str | None:
    """Return the message about columns that are arrays or lists of numbers; None if none is.

    Args:
        batch: The batch.
        columns: Its columns by name; those of a list or tuple by their number.
        where: Name of the batch.
    """
    is_mapping = isinstance(batch, Mapping)
    keys = list(columns) if is_mapping else range(len(columns))
    calls, found = {}, []
    for key, column in zip(keys, columns.values(), strict=True):
        if (kind := _kind_of_numbers(column)) is not None:
            dtype = {"f": ", dtype=torch.float32", "i": ", dtype=torch.int64"}.get(kind, "")
            calls[key] = f"torch.as_tensor(batch[{_quoted(key)}]{dtype})"
            found.append(f"{key!r} is a {type(column).__name__}")
    if not calls or not isinstance(batch, Mapping | list | tuple):
        return None
    if is_mapping:
        line = ", ".join(f"{_quoted(key)}: {call}" for key, call in calls.items())
        line = f"{{**batch, {line}}}"
    else:
        line = f"[{', '.join(calls.get(key, f'batch[{key}]') for key in keys)}]"
    return f"In {where} {', '.join(found)}, not a tensor. Let collate_fn make tensors: {line}."


def _quoted(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else str(key)


def _kind_of_numbers(column: Any) -> str | None:
    """Return "f", "i" or "b" for an array or a list of numbers; None for anything else."""
    if not isinstance(column, np.ndarray | np.generic | list | tuple):
        return None
    try:
        kind = np.asarray(column).dtype.kind
    except (TypeError, ValueError):  # lists of different lengths
        return None
    return {"f": "f", "i": "i", "u": "i", "b": "b"}.get(kind)


def dtypes_message(model: nn.Module, batch: Any, where: str, error: str) -> str | None:
    """Return the message about numbers of another kind than a model or its loss computes with.

    It is also that of a lone row, which batch normalisation does not take, and of a graph that was
    used before.

    Args:
        model: The model.
        batch: A batch.
        where: Its name.
        error: What torch has raised.

    Returns:
        None if the error is another one, or no column explains it.
    """
    if "more than 1 value per channel" in error:
        return (
            f"{where[0].upper()}{where[1:]} has one row, and in training batch normalisation needs "
            "two. Leave out a last batch that is so small: DataLoader(..., drop_last=True), or "
            "choose another batch_size."
        )
    if "backward through the graph a second time" in error:
        return (
            "The loss comes from a graph that backward() has used already. If loss_fn calls "
            "loss.backward(), leave that to the loop. If the model or loss_fn keeps a tensor of an "
            "earlier batch, such as a hidden state, keep it without its graph: hidden.detach()."
        )
    weight = next((w for w in model.parameters() if w.is_floating_point()), None)
    wants_floats = _NO_FLOATS.search(error) is not None
    is_mapping = isinstance(batch, Mapping)
    if weight is None or not (wants_floats or _OTHER_KIND.search(error)):
        return None
    if not is_mapping and not isinstance(batch, list | tuple):
        return None
    columns = columns_of(batch)
    tensors = {n: column for n, column in columns.items() if isinstance(column, Tensor)}
    if wants_floats:
        found = {n: c for n, c in tensors.items() if not c.is_floating_point()}
        found = {n: c for n, c in found.items() if _TARGETS.search(str(n))} or found
    else:
        floats = {n: c for n, c in tensors.items() if c.is_floating_point()}
        found = {n: c for n, c in floats.items() if c.dtype != weight.dtype}
    if not found:
        return None
    kind = str(weight.dtype).removeprefix("torch.")
    own = ", ".join(f"{n!r} is {str(c.dtype).removeprefix('torch.')}" for n, c in found.items())
    made = {
        n: f"batch[{_quoted(n) if is_mapping else n}].to(torch.{kind})" if n in found else None
        for n in columns
    }
    if is_mapping:
        line = ", ".join(f"{_quoted(n)}: {call}" for n, call in made.items() if call)
        line = f"{{**batch, {line}}}"
    else:
        line = f"[{', '.join(call or f'batch[{n}]' for n, call in made.items())}]"
    whose = "the loss takes floats" if wants_floats else f"the weights are {kind}"
    return f"In {where} {own}, and {whose}. Let collate_fn convert it: {line}."


_OTHER_KIND = re.compile("same dtype|type.* should be the same|expected scalar type|Found dtype")
_NO_FLOATS = re.compile(
    "can't be cast to the desired output type (Long|Int|Short|Char|Byte|Bool)|with two bool tensors"
)
_TARGETS = re.compile("label|target|class|^y$|^1$", re.IGNORECASE)


def no_columns_message(model: nn.Module, batch: Any, *, takes_loss: bool = True) -> str:
    """Return the message about a batch that is no mapping, for a model that is called with one."""
    first = next(iter(forward_columns(model)), "x")
    more = ", or pass loss_fn=lambda model, batch: ..." if takes_loss else f': {{"{first}": ...}}'
    return (
        f"The loader gives a {type(batch).__name__}, and {type(unwrap_model(model)).__name__} is "
        f"called as model(**batch). Let collate_fn return a dict{more}."
    )


def no_loss_message(model: nn.Module, batch: Batch, outputs: Any) -> str:
    """Return the message about outputs that have no place for a loss."""
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
    if isinstance(outputs, tuple):  # transformers with return_dict=False, the loss first
        return "loss_fn=lambda model, batch: model(**batch)[0]"
    inputs = next((c for c in batch if c in forward_columns(model) and c != "labels"), "input_ids")
    return (
        "loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(model("
        f'{inputs}=batch["{inputs}"]), batch["labels"])'
    )


def no_labels_message(batch: Batch) -> str:
    """Return the message about a batch without labels, which names the column that might be one."""
    columns = ", ".join(map(str, batch))
    suspects = [name for name in batch if str(name).lower() in LABEL_LIKE]
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


def no_items_message(batches: Sequence[Mapping[str, Any]], place: str) -> str:
    """Return the message about a window without a label to learn from."""
    more = f" and {len(batches) - 1} more" if len(batches) > 1 else ""
    labels = [batch["labels"] for batch in batches if "labels" in batch]
    if labels:
        found = f"all {sum(map(Tensor.numel, labels))} are -100. Check the masking, and"
        has_item = 'row["labels"] != -100'
        if labels[0].ndim > 1:
            has_item = 'set(row["labels"]) != {-100}'
    else:
        found = "all start and end positions are beyond the tokens. Check"
        has_item = 'row["start_positions"] < len(row["input_ids"])'
    return (
        f"No label to learn from in {place}{more}: {found} that truncation leaves some; to "
        f"remove rows without one: dataset.filter(lambda row: {has_item})."
    )


def no_pad_message(model: nn.Module) -> str:
    """Return the message about a classifier that predicts from the last token of a row."""
    return (
        f"{type(unwrap_model(model)).__name__} predicts from the last token of a row before the "
        "padding, and its config names no pad token, so it takes no batch of several rows. Name "
        "that of the tokenizer: model.config.pad_token_id = tokenizer.pad_token_id."
    )


def no_head_message(model: nn.Module) -> str:
    """Return the message about a model whose forward pass ignores labels."""
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


def unclear_rows_message(batch: Any) -> str:
    """Return the message about a batch whose rows nothing tells, in a run that weighs by rows."""
    return (
        f"Nothing tells how many rows a micro-batch has: a {type(batch).__name__}, in whose "
        "tensors and lists axis 0 has different lengths, or one on another rank. Those before it "
        "were weighed by rows. Let loss_fn return (mean_loss, num_items)."
    )


def misaligned_message(num_labels: int, num_tokens: int, where: str) -> str:
    """Return the message about a row whose labels are more or fewer than its tokens."""
    return (
        f"labels have length {num_labels}, input_ids {num_tokens} ({where}). Align the labels to "
        "the tokens, with -100 for special tokens: for words and tags preprocess="
        "manualloop.tasks.tag_words(tokenizer, words, tags) does. Let the collator pad both: "
        "transformers' DataCollatorForTokenClassification(tokenizer)."
    )


def no_class_message(label: int, row: str, column: str) -> str:
    """Return the message about a label that is no class of a loss of the user's own."""
    fix = f"build the model with more outputs (at least {label + 1})"
    if label < 0:
        fix = f"leave such labels out of the loss: cross_entropy(..., ignore_index={label})"
    return (
        f"Label {label} in {row}, column {column!r}, is not a class of the loss: classes are 0 to "
        f"the number of outputs - 1. Correct the label, or {fix}."
    )


def type_message(labels: Tensor, place: Place, column: str) -> str:
    """Return the message about labels of a type that the loss does not take."""
    return (
        f"{column!r} of {place.batch} are {str(labels.dtype).removeprefix('torch.')}, and the loss "
        f'takes int64. Convert them: {{**batch, "{column}": batch["{column}"].long()}}.'
    )


def device_message(model: nn.Module, column: object, tensor: Tensor, place: Place) -> str:
    """Return the message about a tensor on an accelerator beside a model on the CPU."""
    return (
        f"Column {column!r} of {place.batch} is on {tensor.device}, and {model_name(model)} is on "
        "cpu. Leave it to the loop to move batches to the model, and make tensors where they are "
        'loaded: device="cpu".'
    )


def devices_message(model: nn.Module, places: Mapping[Any, str]) -> str:
    """Return the message about a model whose parts are on several devices.

    Args:
        model: The model.
        places: Name of the first tensor on each device.
    """
    found = " and ".join(f"{name} on {device}" for device, name in places.items())
    last = [*places.values()][-1].rpartition(".")[2]
    return (
        f"The tensors of {model_name(model)} are on different devices: {found}. Put all of it on "
        "one: model.to(device). That moves parameters and buffers alone: if it is a plain "
        f'attribute, make it a buffer, self.register_buffer("{last}", tensor, persistent=False).'
    )


LABEL_LIKE = (
    "label", "labels", "label_ids", "target", "targets", "class", "classes", "category", "y",
    "score", "sentiment", "intent", "emotion", "stars", "rating", "polarity", "topic", "gold",
    "gold_label", "similarity", "relevance", "toxic", "is_duplicate",
)  # fmt: skip
"""Names under which a label column is looked for when a message suggests one, in lower case."""
