"""``write_model_card``: read back by the hub's own parser, and never over somebody's words."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import WORDS, messages, tiny_bert, tiny_tokenizer
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertForSequenceClassification

from manualloop import (
    ConfigError,
    evaluate_loop,
    load_checkpoint,
    prepare_dataloaders,
    train_loop,
    write_model_card,
)
from manualloop.report.card import _results
from manualloop.tasks.names import notes_of

HUB = {"hf://datasets/nyu-mll/glue@bcdcba79/sst2/train-00000-of-00001.parquet": {}}


def run(folder, source=None, names=("no", "yes"), **options):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(names))})
    texts = [f"{WORDS[n % 5]} {WORDS[n % 3]}" for n in range(12)]
    data = Dataset.from_dict({"sentence": texts, "label": [n % 2 for n in range(12)]}, features)
    if source is not None:
        data.info.download_checksums, data.info.config_name = source, "sst2"
    model = tiny_bert()
    splits = {"train": data, "validation": data.select(range(8))}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=model)
    evaluate = partial(evaluate_loop, model, loaders["validation"], "f1", confidence=0.9)
    return train_loop(
        *(model, loaders["train"]),
        num_epochs=2,
        evaluate=evaluate,
        best_metric="f1",
        checkpoint_dir=folder,
        progress_bar=False,
        **options,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("card") / "run", HUB)


def test_the_hub_reads_its_metadata(result, tmp_path):
    file = write_model_card(result, tmp_path / "mine", license="apache-2.0", language="en")
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets == ["nyu-mll/glue"]
    assert card.data.metrics == ["f1"]
    assert card.data.model_name == "mine"
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    assert found.keys() == {"loss", "f1"}
    best = result.best_metrics
    assert found["f1"].metric_value == round(best["f1"], 6)
    assert f"{best['f1_low']:.4f} to {best['f1_high']:.4f}" in found["f1"].metric_name
    assert found["f1"].dataset_type == "nyu-mll/glue"
    assert found["f1"].dataset_config == "sst2"
    assert found["f1"].dataset_split == "validation"
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    for notes, split in ((notes_of(None), "validation"), (result.state.splits["train"], None)):
        splits = {**result.state.splits, "test": notes}
        state = SimpleNamespace(model=result.state.model, splits=splits)
        both = SimpleNamespace(state=state, best_metrics=best, metrics=result.metrics)
        (entry, *_) = _results(both, "nyu-mll/glue", "sst2")
        assert entry.dataset_split == split  # without labels nothing is scored
    for text in ("| f1 |", "Nobody has written this section yet", "| train | 12 |", "no, yes"):
        assert text in card.text


def test_its_lines_load_the_weights_beside_it(result, tmp_path, monkeypatch):
    result.state.model.save_pretrained(tmp_path)
    result.state.tokenizer.save_pretrained(tmp_path)
    text = write_model_card(result, tmp_path).read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert isinstance(names["model"], BertForSequenceClassification)
    assert torch.equal(
        names["model"].classifier.weight, result.state.model.classifier.weight.detach()
    )
    assert AutoTokenizer.from_pretrained(".").get_vocab() == names["tokenizer"].get_vocab()
    assert str(tmp_path) not in text  # which is nobody's business


def test_a_checkpoint_with_a_card_is_still_whole(result, tmp_path):
    write_model_card(result, result.best_checkpoint)
    model = tiny_bert()
    load_checkpoint(result.best_checkpoint.parent, model, which="best")
    assert (result.best_checkpoint / "README.md").exists()


def test_nothing_is_made_up(tmp_path, caplog):
    result = run(tmp_path / "run")
    card = ModelCard.load(write_model_card(result, tmp_path / "card"))
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert card.data.license is None
    assert "license, language, dataset" in messages(caplog)[-1]
    assert "| f1 |" in card.text
    named = ModelCard.load(write_model_card(result, tmp_path / "card", dataset="me/own"))
    assert {entry.dataset_type for entry in named.data.eval_results} == {"me/own"}
    assert all(math.isfinite(entry.metric_value) for entry in named.data.eval_results)


def test_a_card_is_replaced_until_somebody_edits_it(result, tmp_path):
    file = write_model_card(result, tmp_path)
    write_model_card(result, tmp_path, license="mit")
    assert ModelCard.load(file).data.license == "mit"
    edited = file.read_text().replace("Nobody has written", "Somebody has written")
    file.write_text(edited)
    with pytest.raises(ConfigError, match="edited"):
        write_model_card(result, tmp_path)
    assert file.read_text() == edited
    file.write_text("# mine\n")
    with pytest.raises(ConfigError, match="not from here"):
        write_model_card(result, tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        write_model_card(result, "")


def test_hostile_names_stay_names(tmp_path):
    names = ("<script>|\n---\n", "`a` *b* [c](d) # e: {x}")
    result = run(tmp_path / "run", HUB, names)
    folder = tmp_path / "a: b #c"
    card = ModelCard.load(write_model_card(result, folder))
    assert card.data.model_name == "a: b #c"
    assert "<script>" not in card.text
    assert "&lt;script&gt;" in card.text
    lines = card.text.splitlines()
    rows = [line for line in lines if line.startswith("|") and "script" in line]
    assert rows
    assert "---" not in lines


def test_a_model_of_another_library(tmp_path):
    model = torch.nn.Linear(2, 1)
    result = train_loop(
        *(model, [torch.ones(2, 2)] * 3),
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch).square().mean(),
        progress_bar=False,
    )
    card = ModelCard.load(write_model_card(result, tmp_path))
    assert card.data.library_name == "pytorch"
    assert card.data.pipeline_tag is None
    assert "How to use" not in card.text
    assert "made no evaluation" in card.text
