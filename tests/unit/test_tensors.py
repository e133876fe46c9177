"""Tensors in safetensors files: aliases, parts, what has no place in them."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import bert_config
from safetensors.torch import load_file
from transformers import BertForMaskedLM

from manualloop import (
    CheckpointError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    save_checkpoint,
    tensors,
)
from manualloop.tensors import find_aliases, load_tensors, num_bytes, save_tensors


def save(values, folder, stem="x"):
    return [path.name for path in save_tensors(values, folder, stem)]


def test_tensors_come_back_as_they_were(tmp_path):
    values = {
        "float": torch.randn(3, 2),
        "transposed": torch.randn(3, 2).T,
        "view": torch.arange(10)[2:5],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(2).bfloat16(),
        "float8": torch.randn(2).to(torch.float8_e4m3fn),
        "uint8": torch.arange(4, dtype=torch.uint8),
    }
    assert save(values, tmp_path) == ["x.safetensors"]
    loaded = load_tensors(tmp_path, "x", ["x.safetensors"])
    assert set(loaded) == set(values)
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert loaded[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            value.contiguous().view(-1).view(torch.uint8).tolist()
        )


def test_large_states_are_split_into_parts_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_FILE_BYTES", 1000)
    values = {f"w{n}": torch.full((100,), float(n)) for n in range(5)}
    names = save(values, tmp_path, "model")
    assert names == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    for name, value in values.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], value)
    loaded = load_tensors(tmp_path, "model", names)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_what_has_no_place_in_a_file_is_refused(tmp_path):
    for value in (torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(CheckpointError, match=r"x\.safetensors|cannot be saved"):
            save({"w": value}, tmp_path)


def test_what_shares_memory_is_saved_once_under_its_own_name():
    weight = torch.ones(2, 3)
    values = {"head": weight, "embedding": weight, "transposed": weight.T, "half": weight[:1]}
    assert find_aliases(values) == {"embedding": "head"}
    assert find_aliases(values, tied={"head"}) == {"head": "embedding"}
    assert num_bytes({"head": weight, "embedding": weight}) == 24
    empty = torch.zeros(0)
    assert find_aliases({"a": empty, "b": empty}) == {}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_loaded_tensors_do_not_keep_the_file_open_or_mapped(tmp_path):
    save({"w": torch.ones(1000)}, tmp_path)
    loaded = load_tensors(tmp_path, "x", ["x.safetensors"])
    assert "x.safetensors" not in Path("/proc/self/maps").read_text()
    opened = [
        os.readlink(f"/proc/self/fd/{n}")
        for n in os.listdir("/proc/self/fd")
        if n.isdigit() and os.path.exists(f"/proc/self/fd/{n}")
    ]
    assert not any("x.safetensors" in name for name in opened)
    assert loaded["w"].sum() == 1000


def state_of(model):
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))


@pytest.mark.parametrize("max_bytes", [500_000_000, 2000], ids=["one file", "parts"])
def test_tied_weights_stay_tied_and_from_pretrained_loads(max_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_FILE_BYTES", max_bytes)
    torch.manual_seed(0)
    model = BertForMaskedLM(bert_config())
    folder = save_checkpoint(tmp_path, state_of(model), strategy=SingleDevice("cpu"))
    names = {name for path in folder.glob("model*.safetensors") for name in load_file(path)}
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    loaded = BertForMaskedLM.from_pretrained(folder)
    for (name, one), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert loaded.config.architectures == ["BertForMaskedLM"]
    torch.manual_seed(1)
    other = BertForMaskedLM(bert_config())
    load_checkpoint(tmp_path, state_of(other), strategy=SingleDevice("cpu"))
    decoder = other.cls.predictions.decoder.weight
    assert decoder is other.bert.embeddings.word_embeddings.weight
    assert torch.equal(decoder, model.cls.predictions.decoder.weight)


@pytest.mark.parametrize("saves_tied", [True, False])
def test_weights_that_are_tied_in_one_of_the_two_are_refused(saves_tied, tmp_path):
    tied, untied = (BertForMaskedLM(bert_config(tie_word_embeddings=tie)) for tie in (True, False))
    saved, other = (tied, untied) if saves_tied else (untied, tied)
    save_checkpoint(tmp_path, state_of(saved), strategy=SingleDevice("cpu"))
    with pytest.raises(CheckpointError, match=r"decoder\.weight is (not )?tied|groups of"):
        load_checkpoint(tmp_path, state_of(other), strategy=SingleDevice("cpu"))
