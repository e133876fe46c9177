"""Tensors in safetensors files: aliases, parts, what has no place in them."""

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import bert_config
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BertForMaskedLM

from manualloop import CheckpointError, SingleDevice, TrainState, load_checkpoint, save_checkpoint
from manualloop.checkpoint import tensors as tensors
from manualloop.checkpoint.tensors import (
    describe,
    find_aliases,
    load_tensors,
    num_bytes,
    save_tensors,
)

FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
]


def require_format_of(dtype):
    """Skip a test where the installed version of safetensors has no name for a dtype."""
    try:
        safetensors.torch.save({"w": torch.zeros(1).to(dtype)})
    except KeyError:
        pytest.skip(f"safetensors {safetensors.__version__} does not save {dtype}")


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


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint16, torch.complex64, *FLOAT8], ids=str)
def test_every_bit_of_unusual_types_comes_back(dtype, tmp_path):
    require_format_of(dtype)
    value = torch.arange(256, dtype=torch.uint8).view(dtype)
    (loaded,) = load_tensors(tmp_path, "x", save({"w": value}, tmp_path)).values()
    assert loaded.dtype == dtype
    assert loaded.shape == value.shape
    assert bits(loaded) == bits(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.arange(3.0).expand(2, 3),
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=[
        "strided",
        "expanded",
        "channels last",
        "conjugate",
        "negative",
        "0-d",
        "empty",
        "parameter",
    ],
)
def test_the_values_are_saved_however_they_lie_in_memory(value, tmp_path):
    require_format_of(value.dtype)
    (loaded,) = load_tensors(tmp_path, "x", save({"w": value}, tmp_path)).values()
    assert loaded.shape == value.shape
    assert loaded.is_contiguous()
    assert torch.equal(loaded, value)


def test_tensors_that_overlap_are_each_saved_whole(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    values = {
        "weight": weight,
        "half": weight[:1],
        "flat": weight.view(-1),
        "integers": weight.view(torch.int32),
        "transposed": weight.T,
    }
    assert find_aliases(values) == {}
    loaded = load_tensors(tmp_path, "x", save(values, tmp_path))
    for name, value in values.items():
        assert torch.equal(loaded[name], value), name
    loaded["half"].zero_()
    assert torch.equal(loaded["weight"], weight)


def test_a_file_is_full_at_the_bound_and_a_larger_tensor_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_FILE_BYTES", 80)
    sizes = {"a": 10, "b": 10, "c": 1, "d": 100, "e": 10, "f": 0}
    values = {name: torch.rand(size) for name, size in sizes.items()}
    names = save(values, tmp_path)
    parts = [set(load_file(tmp_path / name)) for name in names[:-1]]
    assert parts == [{"a", "b"}, {"c"}, {"d"}, {"e", "f"}]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["weight_map"] == {
        key: name for name, part in zip(names, parts, strict=False) for key in part
    }
    assert save({"a": values["a"], "b": values["b"]}, tmp_path) == ["x.safetensors"]


def test_no_tensors_are_a_file_too(tmp_path):
    assert save({}, tmp_path) == ["x.safetensors"]
    assert load_tensors(tmp_path, "x", ["x.safetensors"]) == {}


def test_only_files_of_the_list_and_of_the_stem_are_read(tmp_path):
    save({"mine": torch.ones(1)}, tmp_path)
    save({"other": torch.ones(1)}, tmp_path, "xy")
    save({"unlisted": torch.ones(1)}, tmp_path, "x-00002-of-00002")
    assert set(load_tensors(tmp_path, "x", ["x.safetensors", "xy.safetensors"])) == {"mine"}


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


@pytest.mark.filterwarnings("ignore")  # torch on how new these are, or how old
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(3).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(3, 3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.ones(3, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "TwoTensor"),
    ],
    ids=["coo", "csr", "meta", "quantized", "nested", "wrapper"],
)
def test_what_has_no_place_in_a_file_is_refused_by_name_before_anything_is_written(
    make, reason, tmp_path
):
    # In the order of a checkpoint: what comes before save_tensors leaves the refusal to it.
    values = {"good": torch.ones(2), "bad": make()}
    assert find_aliases(values) == {}
    assert num_bytes(values) >= 8
    with pytest.raises(CheckpointError, match=rf"^bad cannot be saved: it is .*{reason}"):
        save(values, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_type_that_no_file_has_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be saved.*complex128"):
        save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path)


def test_an_error_of_the_disk_stays_one(tmp_path):
    with pytest.raises(OSError, match="No such file") as error:
        save({"w": torch.ones(2)}, tmp_path / "missing")
    assert not isinstance(error.value, CheckpointError)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_file_that_may_not_grow_is_an_error_of_the_disk(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save({"w": torch.ones(1000)}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(error.value, CheckpointError)


@pytest.mark.parametrize("damage", ["nothing left", "half", "no header", "missing", "a folder"])
def test_a_damaged_file_is_named(damage, tmp_path):
    (name,) = save({"w": torch.ones(100)}, tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        left = {"nothing left": b"", "half": data[: len(data) // 2], "no header": b"\xff" * 100}
        path.write_bytes(left[damage])
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        load_tensors(tmp_path, "x", [name])


def test_a_stem_without_a_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_tensors(tmp_path, "model", ["x.safetensors"])


def test_what_shares_memory_is_saved_once_under_its_own_name():
    weight = torch.ones(2, 3)
    values = {"head": weight, "embedding": weight, "transposed": weight.T, "half": weight[:1]}
    assert find_aliases(values) == {"embedding": "head"}
    assert find_aliases(values, tied={"head"}) == {"head": "embedding"}
    assert num_bytes({"head": weight, "embedding": weight}) == 24
    empty = torch.zeros(0)
    assert find_aliases({"a": empty, "b": empty}) == {}


def test_a_conjugate_is_no_alias_though_it_is_the_same_memory():
    value = torch.tensor([1 + 2j])
    negative = value.conj().imag
    assert negative.data_ptr() == value.imag.data_ptr()
    assert find_aliases({"a": value, "b": value.conj(), "c": value[:]}) == {"c": "a"}
    assert find_aliases({"a": value.imag, "b": negative}) == {}


def test_a_square_matrix_is_no_alias_of_its_transpose(tmp_path):
    weight = torch.arange(4.0).reshape(2, 2)
    values = {"weight": weight, "transposed": weight.T}
    assert find_aliases(values) == {}
    loaded = load_tensors(tmp_path, "x", save(values, tmp_path))
    assert torch.equal(loaded["transposed"], weight.T)


def test_what_has_no_address_is_no_alias():
    first, second = (TwoTensor(value, value) for value in (torch.zeros(2), torch.ones(2)))
    assert first.data_ptr() == second.data_ptr() == 0
    assert find_aliases({"a": first, "b": second}) == {}


def test_of_many_names_all_are_aliases_of_one():
    weight, other = torch.ones(2), torch.ones(2)
    values = {"a": weight, "b": other, "c": weight.detach(), "d": torch.nn.Parameter(weight)}
    assert find_aliases(values) == {"c": "a", "d": "a"}
    assert find_aliases(values, tied={"a", "c"}) == {"a": "d", "c": "d"}
    assert find_aliases(values, tied=set(values)) == {"c": "a", "d": "a"}
    assert num_bytes(values) == 16


def test_dtype_and_shape_are_told_in_words():
    values = {"w": torch.ones(2, 3), "n": torch.tensor(1), "b": torch.zeros(0).bfloat16()}
    assert describe(values) == {"w": "float32 (2, 3)", "n": "int64 ()", "b": "bfloat16 (0,)"}


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    (name,) = save({"w": torch.ones(1000)}, tmp_path)
    (loaded,) = load_tensors(tmp_path, "x", [name]).values()
    with open(tmp_path / name, "r+b") as file:
        file.write(bytes((tmp_path / name).stat().st_size))
    assert loaded.sum() == 1000
    loaded.zero_()


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
