"""The spans that answer questions best, over all windows of each, and SQuAD's metric of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop.errors import DataError, MetricError, ModelError
from manualloop.tasks import answers as formulae
from manualloop.tasks.answers import answers_of
from manualloop.types import Batch

Floats = NDArray[Any]

_FORMULAE = {"squad": formulae.squad, "squad_v2": formulae.squad_v2}
_KEPT = 'keep=("id", "context", "offset_mapping")'


def span_logits(outputs: Any, batch: Batch) -> list[tuple[Floats, Floats]]:
    """Return the logits of starts and ends for each row, without padding: a ``decode``.

    Args:
        outputs: What the model returned, with ``start_logits`` and ``end_logits``.
        batch: The batch, whose ``attention_mask`` tells the padding. A row whose kept
            ``offset_mapping`` tells of padding, too, gets a logit for each of its entries.

    Raises:
        MetricError: The entries of ``offset_mapping`` cannot be put beside the tokens.
        ModelError: The model returns no such logits.
    """
    logits = []
    for name in ("start_logits", "end_logits"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise ModelError(
                f"The model's {type(outputs).__name__} has no {name} of shape (rows, tokens). Load "
                "a model with such a head: AutoModelForQuestionAnswering.from_pretrained(name)."
            )
        logits.append(found)
    both = torch.stack(logits, dim=1)
    # NumPy has no bfloat16; float32 holds its values.
    rows = (both if both.dtype == torch.float64 else both.float()).cpu().numpy()
    mask = batch.get("attention_mask")
    if mask is None:
        return [(row[0], row[1]) for row in rows]
    kept = mask.bool().cpu().numpy()
    rows = np.where(kept[:, None], rows, -np.inf)  # padding takes none of the best places
    offsets = batch.get("offset_mapping") or [None] * len(rows)
    owned = [_own_tokens(*of_row) for of_row in zip(kept, offsets, strict=True)]
    return [(row[0, own], row[1, own]) for row, own in zip(rows, owned, strict=True)]


def _own_tokens(is_token: NDArray[np.bool_], offsets: Any) -> Any:
    """Return which places of a batch belong to a row: its tokens, and the padding that it had."""
    width, number = len(is_token), int(is_token.sum())
    length = number if offsets is None else len(offsets)
    if length == number or length > width:
        return is_token
    if length < width and not (is_token[0] or is_token[-1]):
        raise MetricError(
            f"A row has an offset_mapping of {length} entries and {number} tokens, and the batch "
            "has padding on both sides of them, so nothing tells which entry belongs to which "
            "token. Leave the padding to prepare_dataloaders: tokenize without padding=."
        )
    return slice(0, length) if is_token[0] or length == width else slice(width - length, width)


class _Spans(NamedTuple):
    """Spans of one window: characters in the context, and logits."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    start_logits: Floats
    end_logits: Floats


def best_spans(
    predictions: Sequence[tuple[Floats, Floats]],
    kept: Mapping[str, Sequence[Any]],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
    id: str = "id",
    context: str = "context",
) -> dict[Any, list[dict[str, Any]]]:
    """Return the best answers to each question, over all of its windows; the first is the answer.

    It takes what ``predict_loop`` returns: ``best_spans(found.predictions, found.kept)``. The rules
    are those of the example scripts of transformers: of each window the ``n_best`` likeliest starts
    and ends are paired, and the score of a pair is the sum of its logits.

    Args:
        predictions: Logits of starts and ends of each window, as ``span_logits`` returns them.
        kept: Columns of the windows: ids, contexts and ``offset_mapping``.
        n_best: Number of answers, and of starts and ends that are tried in each window.
        max_answer_length: Largest number of tokens in an answer.
        null_threshold: Difference of the scores of no answer and of the best one above which there
            is none; None: every question has an answer.
        id: Name of the column of ids.
        context: Name of the column of contexts.

    Returns:
        By id, in the order of the windows, dicts with ``text``, ``score``, and ``start``, the first
        character in the context. They are sorted by score, except that the answer comes first. No
        answer has the text "" and the start -1; of a question without any span it is the only one.

    Raises:
        MetricError: A column is missing, the logits do not fit the tokens, or two rows have the
            same id.
    """
    if missing := [name for name in (id, context, "offset_mapping") if name not in kept]:
        raise MetricError(
            f"The best spans need the column {missing[0]!r} of each window, and the kept ones are "
            f"{', '.join(kept) or 'none'}. Keep it: prepare_dataloaders(..., {_KEPT})."
        )
    if any(all(o is not None and len(o) == 2 for o in own) for own in kept["offset_mapping"]):
        raise MetricError(
            "The offset_mapping of a window has characters for each token, also for those of the "
            "question, which would be taken for those of the context. Let preprocess= put None for "
            "tokens outside of the context, as manualloop.tasks.answer_windows(tokenizer) does."
        )
    windows: dict[Any, list[int]] = {}
    for number, name in enumerate(kept[id]):
        windows.setdefault(name, []).append(number)
    found = {}
    for name, numbers in windows.items():
        _require_one_row(name, numbers, kept[context], kept["offset_mapping"], id)
        of_question = [
            _spans_of(
                *predictions[number], kept["offset_mapping"][number], n_best, max_answer_length
            )
            for number in numbers
        ]
        text = kept[context][numbers[0]]
        found[name] = _ranked(of_question, text, n_best, null_threshold)
    return found


def _require_one_row(
    name: Any, numbers: Sequence[int], contexts: Sequence[Any], offsets: Sequence[Any], id: str
) -> None:
    """Refuse windows of two rows under one id, whose answers would be taken for one."""
    if len(numbers) < 2:
        return
    starts = [
        next((found[0] for found in offsets[number] if found is not None and len(found) == 2), None)
        for number in numbers
    ]
    if len({*starts}) == len(starts) and len({contexts[number] for number in numbers}) == 1:
        return
    is_one = len({contexts[number] for number in numbers}) == 1
    found = "begin at one place twice, as of a row that is there twice" if is_one else "are of "
    found += "" if is_one else "several contexts. Parts of one document belong into one row"
    raise MetricError(
        f"Two rows have the {id} {name!r}, by which windows belong to questions: {len(numbers)} "
        f"windows have it, which {found}. Number the rows anew, before the loaders are prepared: "
        f'dataset.map(lambda row, number: {{"{id}": str(number)}}, with_indices=True).'
    )


def _spans_of(
    start: Floats, end: Floats, offsets: Sequence[Any], n_best: int, max_answer_length: int
) -> tuple[_Spans, tuple[Any, Any]]:
    """Return the spans of a window in the order in which they are tried, and the logits of none."""
    if not len(start) == len(end) == len(offsets):
        raise MetricError(
            f"A window has {len(offsets)} tokens and logits for {len(start)}. Pass "
            "decode=span_logits, which leaves padding out."
        )
    # The first token, as the scripts of transformers have it, where no other is marked.
    marked = (place for place, found in enumerate(offsets) if found is not None and not found)
    nothing = next(marked, int(np.isfinite(start).argmax()))
    is_inside = np.array([found is not None and len(found) == 2 for found in offsets])
    firsts = np.argsort(start)[-1 : -n_best - 1 : -1]
    lasts = np.argsort(end)[-1 : -n_best - 1 : -1]
    first, last = (side.ravel() for side in np.meshgrid(firsts, lasts, indexing="ij"))
    is_span = is_inside[first] & is_inside[last] & (first <= last)
    is_span &= last - first < max_answer_length
    first, last = first[is_span], last[is_span]
    spans = _Spans(
        np.array([offsets[place][0] for place in first], np.int64),
        np.array([offsets[place][1] for place in last], np.int64),
        start[first],
        end[last],
    )
    return spans, (start[nothing], end[nothing])


def _ranked(
    windows: Sequence[tuple[_Spans, tuple[Any, Any]]],
    context: str,
    n_best: int,
    null_threshold: float | None,
) -> list[dict[str, Any]]:
    """Return the best spans of all windows of a question, the answer first."""
    spans = _Spans(*(np.concatenate(side) for side in zip(*(w[0] for w in windows), strict=True)))
    scores = spans.start_logits + spans.end_logits
    # What comes first wins where scores are equal, as in Python's sorted().
    order = np.argsort(-scores, kind="stable")[:n_best].tolist()
    entries: list[dict[str, Any]] = [
        {
            "text": context[spans.starts[place] : spans.ends[place]],
            "score": float(scores[place]),
            "start": int(spans.starts[place]),
        }
        for place in order
    ]
    none = min(start + end for _, (start, end) in windows)
    nothing = {"text": "", "score": float(none), "start": -1}
    best = next((place for place, entry in zip(order, entries, strict=True) if entry["text"]), None)
    if null_threshold is None:
        return entries or [nothing]
    if best is None:
        return [nothing]
    difference = none - spans.start_logits[best] - spans.end_logits[best]
    answer = entries[order.index(best)]
    if difference > null_threshold:
        return [nothing, *entries]
    entries.remove(answer)
    place = sum(entry["score"] >= nothing["score"] for entry in entries)
    return [answer, *entries[:place], nothing, *entries[place:]]


def squad(
    dataset: Any,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
    id: str = "id",
    context: str = "context",
    answers: str = "answers",
) -> Callable[[Any, Any, Mapping[str, Sequence[Any]]], dict[str, float]]:
    """Return SQuAD's metric of the best spans of each question, for ``evaluate_loop``.

    ::

        evaluate = partial(
            evaluate_loop,
            model,
            loaders["validation"],
            squad(data["validation"]),
            decode=span_logits,
        )

    Args:
        dataset: The split that the loader was made of, with the right answers.
        n_best: As in ``best_spans``.
        max_answer_length: As in ``best_spans``.
        null_threshold: As in ``best_spans``. A number scores as SQuAD 2.0 does, None as SQuAD 1.1.
        id: Column of ids in the dataset and among the kept columns.
        context: Name of the kept column of contexts.
        answers: Column of the right answers in the dataset.

    Returns:
        ``metric(predictions, references, kept)``, whose result is that of the metric "squad" or
        "squad_v2" over the questions in the order of the dataset.

    Raises:
        DataError: The dataset lacks a column, two rows have the same id, or rows have no answer and
            there is no ``null_threshold``.
    """
    if hasattr(dataset, "with_format"):
        if not hasattr(dataset, "__len__"):
            raise DataError(
                "squad() needs all right answers at once, and the dataset is a stream. Read it: "
                "squad(datasets.Dataset.from_list(list(dataset)))."
            )
        dataset = dataset.with_format(None)
    names = getattr(dataset, "column_names", None) or list(dataset)
    if isinstance(names, Mapping):
        raise DataError(
            f"squad() needs one split, and got {', '.join(names)}. Pass the one that the loader "
            f'was made of: squad(dataset["{next(iter(names))}"]).'
        )
    if missing := [name for name in (id, answers) if name not in names]:
        raise DataError(
            f"squad() needs the column {missing[0]!r}, and the dataset has {', '.join(names)}. "
            f'Name its columns: squad(dataset, id="{id}", answers="{answers}").'
        )
    if len({*dataset[id]}) < len(dataset[id]):
        raise DataError(_doubled_message(dataset, names, id, context))
    is_empty = []
    for row, cell in enumerate(dataset[answers]):
        if (found := answers_of(cell)) is None:
            raise DataError(
                f"Row {row} of the dataset has {answers}={cell!r:.120}. Answers are {{'text': "
                "[...], 'answer_start': [...]}. Make them so with dataset.map."
            )
        is_empty.append(not found[0])
    if null_threshold is None and any(is_empty):
        raise DataError(
            f"Row {is_empty.index(True)} of the dataset has no right answer, as have "
            f"{sum(is_empty)} of {len(is_empty)}. To predict that there is none where it scores at "
            "least as high, as for SQuAD 2.0: squad(dataset, null_threshold=0.0)."
        )
    if hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns([id, answers])
    return Squad(dataset, n_best, max_answer_length, null_threshold, id, context, answers)


def _doubled_message(dataset: Any, names: Sequence[str], id: str, context: str) -> str:
    """Return the message about rows that have one id, by what else they have in common."""
    places: dict[Any, int] = {}
    ids = list(dataset[id])
    number = next(n for n, name in enumerate(ids) if places.setdefault(name, n) != n)
    first = places[ids[number]]
    columns = {name: dataset[name] for name in names}
    same = {name for name, cells in columns.items() if repr(cells[first]) == repr(cells[number])}
    head = (
        f"Two rows of the dataset have the same {id!r}, by which windows belong to questions: rows "
        f"{first} and {number} have {ids[number]!r}"
    )
    if same == {*names}:
        kept = f'[*{{name: row for row, name in enumerate(dataset["{id}"])}}.values()]'
        return (
            f"{head}, and are the same row. Keep one of each: dataset.select({kept}), before the "
            "loaders are prepared too."
        )
    if context in names and context not in same and ("question" in same or "question" not in names):
        head += (
            ", and other contexts. If these are parts of one document, leave it whole: "
            "answer_windows cuts it, and the best answer of all its windows counts"
        )
    return (
        f'{head}. Number them anew: dataset.map(lambda row, number: {{"{id}": str(number)}}, '
        "with_indices=True), before the loaders are prepared too."
    )


@dataclass(frozen=True, eq=False)
class Squad:
    """The metric that ``squad`` returns; its arguments are the attributes."""

    dataset: Any = field(repr=False)
    n_best: int
    max_answer_length: int
    null_threshold: float | None
    id: str
    context: str
    answers: str

    def __call__(
        self, predictions: Any, references: Any, kept: Mapping[str, Sequence[Any]]
    ) -> dict[str, float]:
        """Return the scores of all questions."""
        name, answered, wanted = self.by_unit(predictions, kept)
        return _FORMULAE[name](answered, wanted)

    def by_unit(
        self, predictions: Any, kept: Mapping[str, Sequence[Any]]
    ) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the name of the metric, the answer to each question, and the right ones.

        Raises:
            MetricError: There are windows of questions that the dataset does not have, or none of
                one that it has.
        """
        found = best_spans(
            predictions,
            kept,
            n_best=self.n_best,
            max_answer_length=self.max_answer_length,
            null_threshold=self.null_threshold,
            id=self.id,
            context=self.context,
        )
        cells = map(answers_of, self.dataset[self.answers])
        right = dict(zip(self.dataset[self.id], cells, strict=True))
        if others := [name for name in found if name not in right]:
            raise MetricError(
                f"The loader has the question {others[0]!r}, which the dataset of squad() lacks. "
                "Pass the split that the loader was made of."
            )
        if left := [name for name in right if name not in found]:
            raise MetricError(
                f"The dataset of squad() has {len(left)} questions without a window in the loader, "
                f"such as {left[0]!r}. Pass the split that the loader was made of."
            )
        answered = [{"id": name, "prediction_text": found[name][0]["text"]} for name in right]
        wanted = [
            {"id": name, "answers": {"text": found[0] if found else []}}
            for name, found in right.items()
        ]
        return "squad" if self.null_threshold is None else "squad_v2", answered, wanted
