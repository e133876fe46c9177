"""``write_report``: a page that is whole, safe and small for every kind of run."""

import pickle
import re
import resource
import signal
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import WORDS, bert_config, rows, tiny_bert, tiny_tokenizer
from report_cases import HOSTILE, Linear, batches, trained
from torch import nn

from manualloop import (
    ConfigError,
    Predictions,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
    write_report,
)

VOID = {"meta", "path", "circle", "rect", "br"}
ALLOWED = VOID | {
    *("html", "head", "title", "style", "body", "a", "header", "p", "h1", "h2", "h3", "bdi", "dl"),
    *("dt", "dd", "div", "span", "nav", "ul", "ol", "li", "main", "section", "table", "caption"),
    *("thead", "tbody", "tr", "th", "td", "strong", "figure", "figcaption", "svg", "desc", "g"),
    *("text", "details", "summary", "pre", "code", "footer", "time"),
}


class Page(HTMLParser):
    """Reads a page, and fails where it is not well formed."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.source = file.read_bytes().decode("utf-8")
        self.open, self.tags, self.ids, self.sections = [], [], [], {}
        self.text, self.code, self.headings = "", [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids), "an id occurs twice"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag in ALLOWED, tag
        assert not {name for name in attributes if name.startswith("on") or name == "src"}
        if "href" in attributes:
            assert attributes["href"].startswith("#")
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "colgroup")
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "section":
            self.sections[attributes["id"]] = ""
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))
        if tag == "code":
            self.code.append("")
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "section" in self.open:
            self.sections[list(self.sections)[-1]] += data
        if "code" in self.open:
            self.code[-1] += data

    def check(self):
        """Check what holds of every page."""
        wanted = [i for _, a in self.tags for i in a.get("aria-labelledby", "").split()]
        wanted += [a["href"][1:] for tag, a in self.tags if tag == "a"]
        assert set(wanted) <= set(self.ids)
        assert self.headings[0] == 1
        assert all(b <= a + 1 for a, b in zip(self.headings, self.headings[1:], strict=False))
        assert all(len(text.split()) > 3 for text in self.sections.values()), self.sections
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", self.source)
        assert "http" not in re.sub(r"http-equiv|https?://www.w3.org", "", self.source)
        captions = [n for n, (tag, _) in enumerate(self.tags) if tag == "caption"]
        for place in captions:  # no table is empty
            assert "td" in [tag for tag, _ in self.tags[place : place + 400]]
        return self


def page_of(result, predictions=None, folder=None, **options):
    file = write_report(result, folder / "report.html", predictions, **options)
    return Page(file).check()


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run over prepared loaders with a checkpoint, and its predictions."""
    features = Features(
        {
            "sentence": Value("string"),
            "id": Value("int64"),
            "label": ClassLabel(names=["no", "yes"]),
        }
    )
    texts = [f"{WORDS[n % 5]} {WORDS[n % 3]}" for n in range(24)]
    columns = {"sentence": texts, "id": list(range(24)), "label": [n % 2 for n in range(24)]}
    data = Dataset.from_dict(columns, features=features)
    model = tiny_bert(num_labels=2)
    splits = {"train": data, "validation": data.select(range(12))}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=model, keep="id")
    folder = tmp_path_factory.mktemp("run")
    evaluate = partial(
        evaluate_loop, model, loaders["validation"], ["f1", "classification_report"], confidence=0.9
    )
    result = train_loop(
        *(model, loaders["train"]),
        num_epochs=2,
        evaluate=evaluate,
        best_metric="f1",
        checkpoint_dir=folder,
        progress_bar=False,
    )
    return result, loaders, predict_loop(model, loaders["validation"]), splits


def test_a_run_with_everything_has_every_section(classified, tmp_path):
    result, _, predictions, _ = classified
    page = page_of(result, predictions, tmp_path)
    assert list(page.sections) == [
        *("run", "curves", "metrics", "confusion", "calibration", "wrong", "data", "time"),
        *("settings", "again", "versions"),
    ]
    assert "BertForSequenceClassification" in page.sections["run"]
    assert "no" in page.sections["confusion"]
    assert "yes" in page.sections["confusion"]
    total = sum(parameter.numel() for parameter in result.state.model.parameters())
    assert f"{total:,}" in page.sections["run"]
    assert "24" in page.sections["data"]
    assert "sentence" in page.sections["data"]
    assert "Guo" in page.sections["calibration"]
    assert f"update {result.best_step:,}" in page.sections["metrics"]
    for metric in ("f1", "loss", "accuracy"):
        assert f"{result.metrics[metric]:.4f}" in page.sections["metrics"]
    for text in ("f1_low", "macro avg_precision"):  # they have a place of their own
        assert text not in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_rows_that_are_most_wrong_are_those_with_the_least_probability(classified, tmp_path):
    result, _, predictions, _ = classified
    page = page_of(result, predictions, tmp_path)
    of_true = predictions.scores[np.arange(12), predictions.references]
    is_wrong = predictions.predictions != predictions.references
    wanted = [int(n) for n in np.argsort(of_true, kind="stable") if is_wrong[n]]
    found = [int(n) for n in re.findall(r"row (\d+) of validation", page.sections["wrong"])]
    assert found == wanted
    assert wanted


def test_texts_come_from_tokens_from_kept_columns_or_from_the_rows_given(classified, tmp_path):
    result, loaders, predictions, splits = classified
    place = int(np.flatnonzero(predictions.predictions != predictions.references)[0])
    text = splits["validation"]["sentence"][place]
    page = page_of(result, predictions, tmp_path)
    assert text in page.sections["wrong"]
    assert "decoded from tokens" in page.sections["wrong"]
    page = page_of(result, predictions, tmp_path, rows=splits["validation"])
    assert text in page.sections["wrong"]
    assert "decoded" not in page.sections["wrong"]
    with pytest.raises(ConfigError, match="rows has 5 rows"):
        page_of(result, predictions, tmp_path, rows=splits["validation"].select(range(5)))
    page = page_of(result, predictions, tmp_path, rows=splits["validation"].to_pandas())
    assert text in page.sections["wrong"]
    originals = [f"original {n}" for n in range(12)]
    page = page_of(result, predictions, tmp_path, rows=originals)
    assert f"original {place}" in page.sections["wrong"]

    model = result.state.model
    keeping = prepare_dataloaders(splits, tiny_tokenizer(), model=model, keep="sentence")
    kept = predict_loop(model, keeping["validation"])
    del keeping
    page = page_of(result, kept, tmp_path)
    assert text in page.sections["wrong"]
    assert "at hand" not in page.sections["wrong"]
    assert len(loaders) == 2


def test_texts_that_cannot_be_had_are_told_and_predictions_keep_no_data(classified, tmp_path):
    result, _, predictions, _ = classified
    copied = pickle.loads(pickle.dumps(predictions))
    page = page_of(result, copied, tmp_path)
    assert "rows=dataset" in page.sections["wrong"]
    assert np.array_equal(copied.scores, predictions.scores)


def test_lines_that_load_run_as_printed(classified, tmp_path):
    result, *_ = classified
    page = page_of(result, None, tmp_path)
    names = {}
    for code in page.code:
        exec(code, names)
    assert len(page.code) == 2
    best = dict(names["model"].named_parameters())
    assert best.keys() == dict(result.state.model.named_parameters()).keys()
    assert names["tokenizer"]("good")["input_ids"]
    assert str(result.best_checkpoint) in page.code[0]

    model = Linear()
    result = trained(model, batches(torch.arange(10) % 3), checkpoint_dir=tmp_path / "run")
    page = page_of(result, None, tmp_path)
    names = {"model": Linear()}
    exec(page.code[0], names)
    assert torch.equal(names["model"].layer.weight, model.layer.weight)


def variants(folder):
    """Give runs of many kinds, their predictions, and the sections that their pages have."""
    always = ["run", "curves", "time", "settings", "again", "versions"]

    def page(*others):
        order = ["run", "curves", "metrics", "confusion", "values", "calibration", "wrong", "data"]
        order += ["time", "settings", "again", "versions"]
        return [name for name in order if name in (*always, *others)]

    classes = batches(torch.arange(20) % 3)
    model = Linear()
    yield trained(model, classes), None, page()
    score = partial(evaluate_loop, model, classes, "accuracy")
    once = trained(model, classes, evaluate=score, evaluate_every=8)
    yield once, predict_loop(model, classes), page("metrics", "confusion", "calibration", "wrong")
    unlabelled = [{"x": batch["x"]} for batch in classes]
    yield once, predict_loop(model, unlabelled), page("metrics")

    values = batches(torch.arange(20) / 20)
    model = Linear(1, nn.functional.mse_loss)
    score = partial(evaluate_loop, model, values, "mse", confidence=0.9)
    result = trained(model, values, evaluate=score, best_metric="mse")
    yield result, predict_loop(model, values), page("metrics", "values", "wrong")

    several = batches((torch.arange(60).reshape(20, 3) % 4 == 0).float())
    model = Linear(3, nn.functional.binary_cross_entropy_with_logits)
    score = partial(evaluate_loop, model, several)
    result = trained(model, several, evaluate=score)
    table = predict_loop(model, several)
    yield result, table, page("metrics", "confusion", "calibration", "wrong")

    infinite = [float("nan"), 0.5, float("inf"), 0.25]
    result = trained(
        *(Linear(), classes),
        evaluate=lambda: {"x": infinite.pop(), "text": "<b>", "list": [1, 2], "none": None},
        evaluate_every=2,
        max_grad_norm=1.0,
    )
    yield result, None, page("metrics")

    for _ in range(2):  # the second one is finished already, and measures nothing
        model = Linear()
        result = trained(model, classes, checkpoint_dir=folder / "finished")
        yield result, None, page()

    def cut(step):
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(
            Linear(), classes, checkpoint_dir=folder / "resumed", checkpoint_every=1, on_step=cut
        )
    yield trained(Linear(), classes, checkpoint_dir=folder / "resumed"), None, page()

    model = nn.Linear(4, 1)
    own = train_loop(
        *(model, [torch.ones(2, 4)] * 3),
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch).square().mean(),
        progress_bar=False,
    )
    yield own, None, page()


def test_every_kind_of_run_has_the_sections_that_apply_and_nothing_empty(tmp_path):
    for number, (result, predictions, sections) in enumerate(variants(tmp_path)):
        page = page_of(result, predictions, tmp_path)
        assert list(page.sections) == sections, number


def test_tokens_and_texts(classified, tmp_path):
    result, *_ = classified
    right = np.array([[-100, 1, 2, 0], [1, 1, -100, -100]])
    found = np.array([[-100, 1, 1, 0], [1, 2, -100, -100]])
    tags = Predictions(np.arange(2), found, None, right, {}, ("O", "B-PER", "I-PER"))
    page = page_of(result, tags, tmp_path)
    assert "3 of 5 tokens are right (60.0 %)" in page.sections["confusion"].replace("\n", " ")
    assert "I-PER → B-PER (1)" in page.sections["wrong"]
    words = Predictions(np.arange(2), found, None, right)  # of a vocabulary without names
    page = page_of(result, words, tmp_path)
    assert "confusion" not in page.sections
    assert "60.0 % of all tokens are right" in page.sections["wrong"]
    answers = Predictions(np.arange(3), ["a", "b", "c"], None, ["a", "x", "c"])
    page = page_of(result, answers, tmp_path)
    assert "1 of 3 rows is wrong" in page.sections["wrong"]
    right = Predictions(np.arange(3), ["a", "b", "c"], None, ["a", "b", "c"])
    assert "All 3 rows are right" in page_of(result, right, tmp_path).sections["wrong"]


def test_classes_without_names_and_rows_are_counted(classified, tmp_path):
    scores, right = np.full((2, 25), 0.04), np.array([0, 3])
    table = Predictions(np.arange(2), right[::-1].copy(), scores, right)
    page = page_of(classified[0], table, tmp_path)
    assert "There are 25 classes" in page.sections["confusion"]


def test_pixels_that_count_in_no_score_are_left_out(classified, tmp_path):
    result, *_ = classified
    right, found = np.array([[[0, 1], [255, 255]]]), np.array([[[0, 0], [1, 0]]])
    maps = Predictions(np.arange(1), found, None, right, {}, ("sky", "sea"), ignored=255)
    page = page_of(result, maps, tmp_path)
    assert "1 of 2 tokens are right (50.0 %)" in page.sections["confusion"].replace("\n", " ")
    assert "50.0 % of all tokens are right" in page.sections["wrong"]
    assert "255" not in page.sections["wrong"]


def test_texts_that_differ_at_their_end_are_wrong(classified, tmp_path):
    texts = ["x" * 2000 + end for end in "ab"]
    table = Predictions(np.arange(2), texts, None, texts[:1] * 2)
    assert "1 of 2 rows is wrong" in page_of(classified[0], table, tmp_path).sections["wrong"]


def test_hostile_texts_stay_texts(tmp_path):
    names = tuple(HOSTILE)
    num_rows = len(HOSTILE)
    scores = np.eye(num_rows, dtype=np.float32)[::-1].copy()
    numbers = np.arange(num_rows)
    kept = {text: [*HOSTILE[1:], HOSTILE[0]] for text in HOSTILE}
    table = Predictions(numbers, numbers[::-1].copy(), scores, numbers, kept, names)
    kind = type(HOSTILE[0], (Linear,), {})
    model, data = kind(), batches(torch.arange(20) % 3)
    texts = dict.fromkeys(HOSTILE, 0.5) | {f"{text}_t": text for text in HOSTILE[:8]}
    result = trained(model, data, evaluate=lambda: dict(texts), evaluate_every=2)
    result.state.contract["settings"].update(dict.fromkeys(HOSTILE, HOSTILE[1]))
    page = page_of(result, table, tmp_path)
    assert page.headings.count(1) == 1
    for text in ("<script>alert(1)</script>", "{{ 7 * 7 }}", "שלום עולם", "nul␀ bell␇"):
        assert text in page.text
    assert "49" not in page.sections["wrong"]
    assert len(page.source) < 700_000
    assert "(100,000 characters)" in page.text


def test_a_page_of_many_rows_and_records_stays_small(classified, tmp_path):
    result, *_ = classified
    num_rows, draw = 100_000, np.random.default_rng(0)
    scores = draw.random((num_rows, 40), np.float32) / 40
    names = tuple(f"class {n}" for n in range(40))
    right = draw.integers(0, 40, num_rows)
    texts = ["a text " * 50] * num_rows
    numbers = np.arange(num_rows)
    table = Predictions(numbers, scores.argmax(1), scores, right, {"text": texts}, names)
    before, history = list(result.history), result.history
    steps = range(1, 20_000)
    history[:] = [{"step": n, "epoch": n / 9, "loss": n % 7, "lr": 1 / n} for n in steps]
    history += [{"step": n, "epoch": 1, "eval_f1": n % 5, "eval_loss": 1} for n in steps]
    try:
        page = page_of(result, table, tmp_path)
    finally:
        history[:] = before
    assert len(page.source) < 300_000
    assert sum("dir" in attributes for _, attributes in page.tags) == 20


def test_a_report_is_replaced_and_no_other_file_is(classified, tmp_path):
    result, *_ = classified
    file = tmp_path / "new" / "report.html"
    assert write_report(result, file) == file
    first = file.read_text()
    assert result.report(file) == file  # the short form
    assert Page(file).sections.keys() == dict.fromkeys(Page(file).sections, 0).keys()
    assert len(first) > 10_000
    script = tmp_path / "train.py"
    script.write_text("print(1)\n")
    with pytest.raises(ConfigError, match="exists and is no report"):
        write_report(result, script)
    assert script.read_text() == "print(1)\n"
    for path, text in (
        (tmp_path, "is a folder"),
        ("", "no path"),
        ("a\0b", "no path"),
        (3, "no path"),
        ("https://x/report.html", "is a URL"),
    ):
        with pytest.raises(ConfigError, match=text):
            write_report(result, path)
    with pytest.raises(ConfigError, match="predict_loop"):
        write_report(result, file, [1, 2])
    with pytest.raises(ConfigError, match="train_loop returned"):
        write_report({"loss": 1}, file)
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]


def test_a_disk_that_is_full_leaves_the_report_from_before(classified, tmp_path):
    result, *_ = classified
    file = write_report(result, tmp_path / "report.html")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_report(result, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_other_ranks_write_nothing(classified, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not write_report(classified[0], tmp_path / "report.html").exists()


def test_times_of_all_processes_are_added(tmp_path):
    classes, folder = batches(torch.arange(20) % 3), tmp_path / "run"

    def cut(step):
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Linear(), classes, checkpoint_dir=folder, checkpoint_every=1, on_step=cut)
    result = trained(Linear(), classes, checkpoint_dir=folder)
    page = page_of(result, None, tmp_path)
    assert "Measured in 2 of 2 processes" in page.sections["time"]
    finished = trained(Linear(), classes, checkpoint_dir=folder)
    assert finished.state.times.total == 0
    page = page_of(finished, None, tmp_path)
    assert "Measured in 2 of 3 processes of the run. One that" in page.sections["time"]


def test_predictions_of_other_weights_are_told(tmp_path):
    model, data = Linear(), batches(torch.arange(20) % 3)
    result = trained(model, data, evaluate=partial(evaluate_loop, model, data, "accuracy"))
    page = page_of(result, predict_loop(model, data), tmp_path)
    assert "of other weights" not in page.sections["confusion"]
    labels = np.arange(20) % 3
    perfect = Predictions(np.arange(20), labels, None, labels)
    assert result.metrics["accuracy"] < 1
    assert "of other weights" in page_of(result, perfect, tmp_path).sections["confusion"]


def test_a_frozen_part_is_counted(tmp_path):
    model = Linear()
    model.layer.bias.requires_grad_(False)
    page = page_of(trained(model, batches(torch.arange(10) % 3)), None, tmp_path)
    assert "12 (80.0 %)" in page.sections["run"]


def test_splits_of_every_kind_are_noted(tmp_path):
    tokenizer = tiny_tokenizer()
    streams = {"train": rows(6).to_iterable_dataset()}
    model = tiny_bert()
    loaders = prepare_dataloaders(streams, tokenizer, model=model)
    result = train_loop(model, loaders["train"], max_steps=1, progress_bar=False)
    assert "stream" in page_of(result, None, tmp_path).sections["data"]
    numbers = {"train": rows(6).map(lambda row, n: {"label": n / 4}, with_indices=True)}
    config = bert_config(num_labels=1)
    model = type(model)(config)
    numbers["train"] = numbers["train"].cast_column("label", Value("float32"))
    loaders = prepare_dataloaders(numbers, tokenizer, model=model)
    notes = loaders["train"].splits["train"]
    assert notes.quantiles == (0.0, 0.3125, 0.625, 0.9375, 1.25)
    assert notes.num_per_class is None
    assert isinstance(Path(tmp_path), Path)
