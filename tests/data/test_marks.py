"""What is trained is marked in a report of a batch: in a notebook, and in a terminal."""

from __future__ import annotations

import re
import sys
from html import unescape
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import TAGS, piece_tokenizer, questions, tagged_words, tiny_bert, tiny_tokenizer
from transformers import BertForMultipleChoice

from manualloop import inspect_batch, prepare_dataloaders
from manualloop.tasks import answer_windows, flatten_choices, tag_words


def marked(report: Any, row: int = 0) -> list[tuple[str, str]]:
    """The marked texts of a row in HTML, with what is trained there."""
    (cell,) = re.findall(rf"<th>row {row}</th><td[^>]*>(.*?)</td>", report._repr_html_(), re.S)
    found = re.findall(r'<mark style="[^"]*" title="([^"]*)">(.*?)</mark>', cell, re.S)
    return [(unescape(text), unescape(name)) for name, text in found]


def unmarked_text(report: Any, row: int = 0) -> str:
    (cell,) = re.findall(rf"<th>row {row}</th><td[^>]*>(.*?)</td>", report._repr_html_(), re.S)
    return unescape(re.sub(r"<[^>]*>", "", cell))


def test_labels_of_tokens_have_the_color_of_their_class():
    tokenizer = piece_tokenizer()
    words = {"tokens": [["cafe", "<b>", "abcdef"]], "ner_tags": [["B-PER", "O", "B-LOC"]]}
    loader = prepare_dataloaders(
        {"dev": Dataset.from_dict(words)}, tokenizer, preprocess=tag_words(tokenizer, names=TAGS)
    )["dev"]
    report = inspect_batch(loader, tokenizer)
    assert [name for _, name in marked(report)] == ["B-PER", "O", "B-LOC"]
    assert marked(report)[0][0] == "cafe"
    assert marked(report)[2][0] == "ab"  # of ab, ##cd, ##ef
    text = tokenizer.decode(next(iter(loader))["input_ids"][0])
    assert unmarked_text(report) == text
    classes = re.findall(r"<mark[^>]*>[^<]*</mark>", report._repr_html_().split("row 0")[0])
    assert len(classes) == len(TAGS)  # the legend


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_marked(side):
    tokenizer = piece_tokenizer(padding_side=side)
    rows = questions(8, 3)
    loader = prepare_dataloaders(
        {"dev": Dataset.from_dict(rows)}, tokenizer, preprocess=answer_windows(tokenizer, 40, 6)
    )["dev"]
    report, batch = inspect_batch(loader, tokenizer), next(iter(loader))
    assert len(report.rows) == 3
    for row in range(3):
        start, end = (int(batch[name][row]) for name in ("start_positions", "end_positions"))
        answer = tokenizer.decode(batch["input_ids"][row][start : end + 1])
        (found,) = marked(report, row)
        assert found == (answer, "answer")
        assert f"  ->  {answer}" in str(report)


def test_tokens_of_a_language_model():
    tokenizer = tiny_tokenizer(mask_token="[UNK]")
    ids = torch.tensor([[2, 4, 5, 6, 3]])
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    report = inspect_batch([{"input_ids": ids, "labels": labels}], tokenizer)
    assert marked(report) == [("bad movie", "")]
    masked = torch.tensor([[2, 4, 1, 6, 3]])
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    report = inspect_batch([{"input_ids": masked, "labels": labels}], tokenizer)
    assert marked(report) == [("[UNK]=bad", "bad"), ("movie", "")]
    report = inspect_batch([{"input_ids": masked, "labels": labels}])  # numbers
    assert [text for text, _ in marked(report)] == ["1=5", "6"]


def test_right_choices_and_targets():
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_dict({"q": ["good"], "x": ["bad"], "y": ["movie plot"], "label": [1]})
    loader = prepare_dataloaders(
        {"dev": rows},
        tokenizer,
        model=tiny_bert(kind=BertForMultipleChoice),
        preprocess=flatten_choices(tokenizer, "q", ["x", "y"]),
    )["dev"]
    report = inspect_batch(loader, tokenizer)
    assert marked(report) == [("[CLS] good [SEP] movie plot [SEP]", "right")]
    batch = {"input_ids": torch.tensor([[4, 3]]), "labels": torch.tensor([[5, 6, 7, -100]])}
    report = inspect_batch([batch], tokenizer)
    assert marked(report) == [("bad movie plot", "")]
    ids = torch.tensor([[[4, 5], [4, 6]]])
    pairs = {"input_ids": ids, "labels": torch.where(ids == 4, -100, ids)}
    assert marked(inspect_batch([pairs], tokenizer)) == [("bad", ""), ("movie", "")]


def test_colors_only_in_a_terminal(monkeypatch):
    tokenizer = piece_tokenizer()
    rows = Dataset.from_dict(tagged_words(6, 1))
    loader = prepare_dataloaders({"dev": rows}, tokenizer, preprocess=tag_words(tokenizer))["dev"]
    report = inspect_batch(loader, tokenizer)
    plain = str(report)
    assert "\x1b" not in plain
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    colored = str(report)
    assert "\x1b[30;48;5;" in colored
    assert colored.count("\x1b[30;48;5;") == colored.count("\x1b[0m")
    without = re.sub(r"\x1b\[[\d;]*m", "", colored)
    head = plain.split("\nrow 0")[0]
    assert without.startswith(head)
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(report) == plain
