"""Every option of a built-in metric changes its results in each of its branches, or is refused."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from manualloop import load_metric
from manualloop.errors import ConfigError, ManualLoopError
from manualloop.evaluation.collected import COLLECTED
from manualloop.evaluation.metrics import _AVERAGED, _AVERAGES, _KEYS, _OPTIONS

RNG = np.random.default_rng(0)
TWO, MANY = (RNG.integers(0, classes, (2, 30)) for classes in (2, 4))
LABELS = RNG.integers(0, 2, (2, 30, 3))
OF_CLASSES: list[tuple[Any, Any]] = [
    *((one[0], one[1]) for one in (TWO, MANY, LABELS)),
    ([0, 0, 0], [0, 0, 0]),
    ([0, 1, 1], [0, 1, 2]),
    ([0, 1, 2], [0, 1, 1]),
    ([[0, 1], [0, 0]], [[0, 1], [0, 0]]),
]
VALUES = (RNG.normal(size=(9, 2)), RNG.normal(size=(9, 2)))
PROBABILITIES = RNG.dirichlet(np.ones(4), 30)
OF_SCORES = [
    (np.stack([1 - (p := RNG.random(30).round(1)), p], 1), TWO[1]),
    (PROBABILITIES, MANY[1]),
    (RNG.random((30, 3)), LABELS[1]),
]
TEXTS = [
    (
        ["The cats ran, 12 times.", "dogs  sleep\nA cat"],
        ["the Cat runs 13 times", "dogs sleep\na Cat"],
    ),
    (["a b", "c d e f"], ["a c", "c x e f"]),
    (["你好 世界 你好 世界 人"], ["你好 世界 你好 世界 大"]),
    (["B b"], ["b B c"]),
    *(([one], [other]) for one, other in [("a 1", "a 2"), ("A", "a"), ("a.", "a")]),
]
TAGS = [
    ([["B-A", "I-A", "O"], ["I-B", "O", "O"]], [["B-A", "I-A", "O"], ["O", "O", "B-B"]]),
    ([["O", "O"]], [["O", "O"]]),
    ([["A-B", "A-I"], ["B-B", "O"]], [["A-B", "A-I"], ["O", "B-B"]]),
    ([[1, 0]], [[1, 0]]),
]
MAPS = [(np.array([[[0, 1], [2, 1]]]), np.array([[[0, 1], [1, 255]]]))]
WANTED = [[0, 0, 40, 30], [20, 10, 50, 40], [5, 5, 9, 9], [60, 60, 99, 99]]
FOUND = [[0, 0, 40, 40], [1, 2, 3, 4], [20, 10, 50, 33], [5, 5, 9, 8], [61, 61, 99, 99]]
BOXES = [
    (
        [{"boxes": FOUND, "scores": [0.9, 0.8, 0.7, 0.6, 0.5], "labels": [0, 0, 1, 0, 0]}],
        [{"boxes": WANTED, "labels": [0, 0, 0, 0]}],
    )
]
ANSWERS = [
    (
        [{"prediction_text": "dog", "no_answer_probability": 0.6}, {"prediction_text": "cat"}],
        [{"text": []}, {"text": ["cat"]}],
    )
]
TRIED: dict[str, list[Any]] = {
    "average": [None, "micro", "weighted", "samples"],
    "beta": [1],
    "box_format": ["xywh"],
    "char_order": [2],
    "class_metrics": [True],
    "effective_order": [True],
    "eps_smoothing": [True],
    "force": [True],
    "ignore_case": [True],
    "ignore_index": [0],
    "ignore_numbers": [True],
    "ignore_punctuation": [True],
    "iou_thresholds": [[0.3]],
    "labels": [[0, 1], [0, 9]],
    "lowercase": [True],
    "max_detection_thresholds": [[1, 1, 2]],
    "max_fpr": [0.4],
    "max_ngram_order": [2],
    "mode": ["strict"],
    "multi_class": ["ovo"],
    "multioutput": ["raw_values"],
    "names": [["cat", "B-A", "dog", "fox", "owl"], ["O", "B-A"]],
    "no_answer_threshold": [0.5],
    "normalize": [False, "true"],
    "pos_label": [0],
    "rec_thresholds": [[0.0, 0.9]],
    "regexes_to_ignore": [["[0-9]+|[,.]|T|C|c"]],
    "rouge_types": [["rouge1"]],
    "scheme": ["IOB2"],
    "smooth_method": ["floor"],
    "smooth_value": [0.5],
    "split_summaries": [True],
    "suffix": [True],
    "tokenize": ["char"],
    "tokenizer": [str.split],
    "trg_lang": ["zh"],
    "use_stemmer": [True],
    "whitespace": [True],
    "word_order": [2],
    "zero_division": [1.0],
}
BRANCHES: dict[str, list[dict[str, Any]]] = {
    "roc_auc": [{}, *({"average": a} for a in (None, "weighted", "micro")), {"multi_class": "ovo"}],
    "average_precision": [{}, *({"average": a} for a in (None, "weighted", "micro", "samples"))],
    "seqeval": [{}, {"mode": "strict", "scheme": "IOB2"}],
    "map": [{}, {"class_metrics": True}, {"average": "micro"}],
    "bleu": [{}, {"smooth_method": "floor"}],
    "rouge": [{}, {"tokenizer": str.split}],
}
WITHOUT_EFFECT = {
    "force",  # of bleu: it only keeps a warning away
    "split_summaries",  # of rouge: needs data of nltk
}


def options_of(name: str) -> list[str]:
    """The options that a metric accepts."""
    if name in COLLECTED:
        return list(inspect.signature(COLLECTED[name].function).parameters)[2:]
    return list(_OPTIONS.get(name, ()))


def rows_for(name: str) -> list[tuple[Any, Any]]:
    if name in ("rouge", "bleu", "chrf"):
        return TEXTS
    if name == "exact_match":
        return [*TEXTS, *(([list(p)], [list(r)]) for p, r in TEXTS)]
    of_name = {"seqeval": TAGS, "map": BOXES, "squad": ANSWERS[:0], "squad_v2": ANSWERS}
    of_name |= {"mean_iou": MAPS, "mse": [VALUES], "mae": [VALUES]}
    scores = ("roc_auc", "average_precision", "log_loss")
    return of_name.get(name, OF_SCORES if name in scores else OF_CLASSES)


def outcome(name: str, rows: tuple[Any, Any], options: dict[str, Any]) -> str | None:
    """All that a metric returns; None if it refuses."""
    try:
        found = load_metric(name, **options).compute(predictions=rows[0], references=rows[1])
    except ManualLoopError:
        return None
    shown = {key: (m.values.tolist(), m.rows, m.columns) for key, m in found.matrices.items()}
    return repr((dict(found), shown))


def has_an_effect(name: str, base: dict[str, Any], option: str) -> bool:
    """Whether an option changes a result or is refused, for some rows."""
    has_labels = option == "zero_division" and "labels" in options_of(name)
    for options in [base, {**base, "labels": [9]}] if has_labels else [base]:
        for value in TRIED[option]:
            for rows in rows_for(name):
                before = outcome(name, rows, options)
                if outcome(name, rows, {**options, option: value}) != before:
                    return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*_OPTIONS, *COLLECTED])
def test_no_branch_of_a_metric_forgets_an_option(name: str) -> None:
    names_classes = {"classification_report", "confusion_matrix", "mean_iou", "seqeval"}
    for base in BRANCHES.get(name, [{}]):
        for option in options_of(name):
            by_class = name in names_classes or name.endswith("/none")
            by_class |= base.get("average", "") is None or base.get("class_metrics", False)
            if option in base or option in WITHOUT_EFFECT or (option == "names" and not by_class):
                continue
            assert has_an_effect(name, base, option), (name, base, option)


def test_what_is_tried_are_all_options() -> None:
    assert {o for name in (*_KEYS, *COLLECTED) for o in options_of(name)} == set(TRIED)
    assert {name for name in _OPTIONS if "/" in name} == {
        f"{name}/{average}" for name in _AVERAGED for average in _AVERAGES
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("f1", {"labels": [0]}, r"does not take labels"),
        ("f1/macro", {"pos_label": 0}, r"does not take pos_label"),
        ("rouge", {"use_stemmer": True, "tokenizer": str.split}, "not both"),
        ("bleu", {"smooth_value": 0.1}, "smooth_method='floor'"),
    ],
)
def test_options_that_libraries_leave_out_of_account_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_metric(name, **options)


def test_the_area_of_each_class_is_none_of_pairs_of_classes() -> None:
    metric = load_metric("roc_auc", average=None, multi_class="ovo")
    with pytest.raises(ConfigError, match="pairs of classes"):
        metric.compute(predictions=PROBABILITIES, references=MANY[1])


def test_a_report_has_zero_division_for_classes_that_do_not_occur() -> None:
    metric = load_metric("classification_report", names=["no", "yes", "never"], zero_division=1.0)
    scores = metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert [scores[f"never_{key}"] for key in ("precision", "recall", "f1-score")] == [1.0] * 3
    assert scores["never_support"] == 0
    assert scores["macro avg_recall"] == pytest.approx(0.75)  # of the two that occur


def test_mean_iou_leaves_out_what_the_evaluation_marks_whatever_it_ignores() -> None:
    maps = np.array([[[0, 1], [2, 1]]]), np.array([[[0, 1], [-100, 2]]])
    found = load_metric("mean_iou", ignore_index=255).compute(
        predictions=maps[0], references=maps[1]
    )
    expected = load_metric("mean_iou").compute(predictions=maps[0], references=maps[1])
    assert dict(found) == dict(expected)
