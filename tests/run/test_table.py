"""The table of evaluations: its columns, what it leaves out, and its text and HTML."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from manualloop.run.evaluations import Evaluations
from manualloop.run.table import Table, choose_metrics
from manualloop.types import num_cells


def table_of(*evaluations: dict[str, Any], best_metric: str | None = None, **given: Any) -> Table:
    table = Table(best_metric)
    values = {"loss": 0.5, "lr": 1e-5, "seconds": 65.0, **given}
    for number, metrics in enumerate(evaluations, start=1):
        table.add(100 * number, number / 2, metrics, **values)
    return table


def lines(table: Table, width: float = 200, **options: Any) -> list[str]:
    return table.lines(table.rows, width, **{"colours": False, **options})


def names(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


SCORES = {"loss": 0.4, "accuracy": 0.8, "f1": 0.75}


# Text ---------------------------------------------------------------------------------------------


def test_a_table_in_a_terminal() -> None:
    worse = {"loss": math.nan, "accuracy": 0.9, "f1": 0.7}
    assert lines(table_of(SCORES, worse, best_metric="f1")) == [
        " step  epoch  train loss  eval loss  accuracy      f1        lr     time",
        "  100   0.50      0.5000     0.4000    0.8000  0.7500  1.00e-05    01:05 *",
        "  200   1.00      0.5000        nan    0.9000  0.7000  1.00e-05    01:05",
    ]


def test_what_nobody_knows_is_blank() -> None:
    table = table_of(
        {"f1": 0.5, "note": "ok", "rows": [1, 2]}, loss=None, lr=math.nan, seconds=None
    )
    assert lines(table) == [
        " step  epoch  train loss      f1    note        lr     time",
        "  100   0.50              0.5000      ok                   ",
    ]


def test_a_metric_that_comes_later_has_a_new_header() -> None:
    table, shown = Table(None), []
    for number in range(1, 4):
        metrics = SCORES if number < 3 else {**SCORES, "exact": 0.25}
        row = table.add(number, 0.0, metrics, loss=0.5, lr=0.1, seconds=1.0)
        shown.append(table.lines([row], 100, colours=False))
    assert [len(found) for found in shown] == [2, 1, 2]
    assert names(shown[2][0])[-3:] == ["exact", "lr", "time"]
    (head, *body), _ = read_html(table.above().html)
    assert [row[head.index("exact")] for row in body] == ["", "", "0.2500"]


def test_a_header_is_repeated_where_it_has_left_the_screen() -> None:
    table = table_of(*[SCORES] * 60)  # the newest fifty are kept
    assert [at for at, line in enumerate(lines(table)) if "epoch" in line] == [0, 26]
    table.forget_header()
    assert len(table.lines(table.rows[-1:], 200, colours=False)) == 2


def test_random_tables_are_aligned_and_fit() -> None:
    draw = random.Random(0)
    values = [0.5, 1e-7, -3.25, 123456.789, math.nan, math.inf, 7, True, "exact", None, [1], 0.0]
    for _ in range(300):
        known = [f"m{n}" + "x" * draw.randrange(8) for n in range(draw.randrange(12))]
        known += draw.sample(["loss", "lr", "step", "f1", "f1_low", "f1_high", "Größe", "精度"], 4)
        found = [
            {name: draw.choice(values) for name in draw.sample(known, draw.randrange(len(known)))}
            for _ in range(draw.randrange(1, 6))
        ]
        table = table_of(*found, best_metric=draw.choice([None, "f1", "-m0"]))
        width = draw.choice([60, 70, 80, 100, 140, 250])
        shown = lines(table, width)
        assert max(map(num_cells, shown)) <= width, shown
        head = re.sub(r"  \(\+.*\)$", "", shown[0])
        assert {num_cells(line.removesuffix(" *")) for line in shown[1:]} == {num_cells(head)}
        assert len(shown) == len(found) + 1
        assert names(head)[0] == "step"
        for row in table.rows:
            assert table.log_line(row).startswith(f"step {row.step}  epoch ")
            assert "\n" not in table.log_line(row)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (200, "step epoch train eval accuracy f1 mcc lr time"),
        (72, "step epoch train eval accuracy f1 mcc time"),
        (65, "step epoch train eval accuracy f1 mcc"),
        (50, "step epoch train eval f1"),
        (20, "step eval f1"),
    ],
)
def test_a_narrow_terminal_keeps_what_decides(width: int, expected: str) -> None:
    table = table_of({**SCORES, "mcc": 0.6}, best_metric="f1")
    head = re.sub(r"  \(\+.*\)$", "", lines(table, width)[0])
    assert [name.split()[0] for name in names(head)] == expected.split()


def test_intervals_stand_beside_their_scores_as_far_as_there_is_room() -> None:
    ends = {"loss_low": 0.3, "loss_high": 0.5, "f1_low": 0.7, "f1_high": 0.8, "count_low": 3}
    ends |= {"accuracy_low": 0.75, "accuracy_high": 0.85}
    table = table_of({**SCORES, **ends}, best_metric="f1")
    for width, expected in ((200, ["accuracy", "f1"]), (95, ["f1"]), (60, [])):
        row = lines(table, width)[1]
        shown = [name for name in ("accuracy", "f1") if f"{SCORES[name]:.4f} (" in row]
        assert shown == expected, row
    assert "f1 0.7500 (0.7000 to 0.8000)" in table.log_line(table.rows[0])
    assert "f1_low" not in table.log_line(table.rows[0])
    assert "count_low 3" in table.log_line(table.rows[0])
    _, cells = read_html(table.above().html)
    assert "0.75000.7000 to 0.8000" in cells
    assert "0.40000.3000 to 0.5000" in cells


def test_a_metric_with_the_name_of_a_column() -> None:
    table = table_of({"step": 0.25, "lr": 0.75, "time": 3.0}, best_metric="step")
    head, row = lines(table)
    assert names(head) == [
        *("step", "epoch", "train loss", "eval_step", "eval_lr", "eval_time", "lr", "time")
    ]
    assert row.endswith("*")


# The best -----------------------------------------------------------------------------------------


def test_the_best_row_is_that_of_the_run() -> None:
    draw = random.Random(1)
    values = [0.1, 0.2, 0.2, 0.9, math.nan, math.inf, -1]
    for best_metric in ("f1", "-f1", "loss", "+loss"):
        for _ in range(50):
            table, evaluations = Table(best_metric), Evaluations(best_metric)
            for step in range(1, 8):
                metrics = {"f1": draw.choice(values), "loss": draw.choice(values)}
                row = table.add(step, 0.0, metrics, loss=None, lr=None, seconds=None)
                evaluations.add(metrics, step)
                assert table.best is not None
                assert table.best.step == evaluations.best_step
                assert row.is_best == (evaluations.best_step == step)


def test_no_row_is_the_best_without_a_metric_that_decides() -> None:
    for table in (
        table_of(SCORES),
        table_of(SCORES, best_metric="bleu"),
        table_of({"f1": "high"}, best_metric="f1"),
    ):
        assert table.best is None
        assert "*" not in "".join(lines(table))
        assert "best" not in table.above().html


# Many metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({f"{name}_f1": 0.5 for name in "abcdefghijkl"} | {"macro_f1": 0.5}, ["macro_f1"]),
        ({f"f1_{name}": 0.5 for name in "abcdefghijkl"} | {"f1_macro": 0.5}, ["f1_macro"]),
        ({f"iou_{n}": 0.5 for n in range(150)} | {"mean_iou": 0.5, "ovl": 1}, ["mean_iou", "ovl"]),
        ({f"B-{n}_{k}": 0.5 for n in range(9) for k in ("f1", "p")} | {"acc": 1}, ["acc"]),
        (
            {f"{n}_{k}": 1 for n in ("overall", *"abcde") for k in ("f1", "precision", "recall")},
            ["overall_f1", "overall_precision", "overall_recall"],
        ),
        (
            {f"map{end}": 0.5 for end in ("", "_50", "_75", "_small", "_medium", "_large")}
            | {f"mar_{end}": 0.5 for end in (1, 10, 100, "small")},
            ["map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10"],
        ),
        ({f"m{n}": 0.5 for n in range(12)}, [f"m{n}" for n in range(8)]),
        ({f"{name}_f1": 0.5 for name in "abcdefghijkl"}, [f"{name}_f1" for name in "abcdefgh"]),
        ({f"{name}_f1": 0.5 for name in "abcd"}, [f"{name}_f1" for name in "abcd"]),
    ],
)
def test_metrics_of_single_classes_are_left_out_where_there_are_many(
    found: dict[str, Any], chosen: list[str]
) -> None:
    assert choose_metrics([found], None) == (chosen, len(found) - len(chosen))
    table = table_of(found)
    if left_out := len(found) - len(chosen):
        assert lines(table)[0].endswith(f"  (+ {left_out} metrics)")
        assert table.log_line(table.rows[0]).endswith(f"  (+ {left_out} metrics)")
        assert f"{left_out} more metrics are in result.metrics." in table.above().html


def test_the_metric_that_decides_always_has_a_column() -> None:
    found = {f"{name}_f1": 0.5 for name in "abcdefghijkl"} | {"f1": 0.5}
    assert choose_metrics([found], "k_f1")[0] == ["k_f1", "f1"]
    assert choose_metrics([{f"m{n}": 0.5 for n in range(12)}], "m11")[0][0] == "m11"


# HTML ---------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


def read_html(html: str) -> tuple[list[list[str]], list[str]]:
    """The rows of a table, and all cells."""
    reader = Cells()
    reader.feed(html.partition("</table>")[0])
    return reader.rows, [cell for row in reader.rows for cell in row]


def test_a_table_in_a_notebook() -> None:
    table = table_of(SCORES, {**SCORES, "f1": 0.7}, best_metric="f1")
    (head, *body), _ = read_html(table.above().html)
    assert head == [
        *("Step", "Epoch", "Training loss", "Evaluation loss", "accuracy", "f1"),
        *("Learning rate", "Time", ""),
    ]
    assert " ".join(body[0]) == "100 0.50 0.5000 0.4000 0.8000 0.7500 1.00e-05 01:05 best"
    assert body[1][-1] == ""
    assert table.above().text.splitlines()[1:] == lines(table)[1:]


def test_names_are_escaped() -> None:
    html = table_of({"<b>&": 0.5, "note": "<i>"}).above().html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;b&gt;&amp;" in html


def test_a_long_run_shows_its_newest_rows_and_the_best() -> None:
    table = table_of({"f1": 0.9}, *[{"f1": 0.5}] * 80, best_metric="f1")
    (_, *body), _ = read_html(table.above().html)
    assert [row[0] for row in body] == ["100", *(str(100 * n) for n in range(32, 82))]
    assert body[0][-1] == "best"
    assert "30 more evaluations are in result.history." in table.above().html


def test_a_table_without_rows_is_nothing() -> None:
    assert Table(None).above() == ("", "")
