"""Folders of transformers' Trainer are recognized, and the line that is printed loads them."""

import re

import pytest
import torch
import transformers
from helpers import tiny_bert
from torch.utils.data import DataLoader

from manualloop import CheckpointError, find_checkpoint, load_checkpoint, train_loop

ROWS = [{"input_ids": torch.tensor([2, 5, 3]), "labels": torch.tensor(n % 2)} for n in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a Trainer with two checkpoints."""
    folder = tmp_path_factory.mktemp("trainer")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        save_steps=2,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(tiny_bert(), arguments, train_dataset=ROWS)
    trainer.train()
    return folder


def refusals(folder):
    model = tiny_bert()
    loader = DataLoader(ROWS, 2)
    yield lambda: train_loop(model, loader, checkpoint_dir=folder, progress_bar=False)
    yield lambda: train_loop(model, loader, checkpoint_dir=folder, resume=True, progress_bar=False)
    yield lambda: load_checkpoint(folder, model)
    yield lambda: find_checkpoint(folder)


@pytest.mark.parametrize("part", ["", "checkpoint-10"])
def test_a_folder_of_the_trainer_is_refused_with_the_line_that_loads_it(trained, part):
    before = sorted(trained.rglob("*"))
    for call in refusals(trained / part):
        with pytest.raises(
            CheckpointError, match=r"transformers' Trainer \(checkpoint-10, after 10"
        ):
            call()
    assert sorted(trained.rglob("*")) == before
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(trained / part, tiny_bert())
    (line,) = re.findall(r"model = (transformers\.\S+\(.*?\))", str(error.value))
    model = eval(line, {"transformers": transformers})
    saved = transformers.BertForSequenceClassification.from_pretrained(trained / "checkpoint-10")
    assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))


def test_a_checkpoint_named_by_its_path_and_weights_alone_are_recognized(trained, tmp_path):
    with pytest.raises(CheckpointError, match="Trainer \\(checkpoint-8, after 8"):
        load_checkpoint(trained, tiny_bert(), which=trained / "checkpoint-8")
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="was written by transformers' Trainer"):
        load_checkpoint(tmp_path, tiny_bert())


def test_other_folders_are_not_taken_for_the_trainers(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    result = train_loop(
        tiny_bert(), DataLoader(ROWS, 2), max_steps=1, checkpoint_dir=tmp_path, progress_bar=False
    )
    assert result.last_checkpoint is not None
