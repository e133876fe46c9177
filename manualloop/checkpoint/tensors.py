"""Save tensors in safetensors files of a bounded size; tensors that share memory are saved once."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualloop.errors import CheckpointError

MAX_FILE_BYTES = 500_000_000
"""Size at which a new file begins. Tensors of one file are copied from a device together."""

Aliases = dict[str, str]
"""Other names of tensors: each with the name under which the tensor is saved."""


def find_aliases(tensors: Mapping[str, Tensor], tied: Collection[str] = ()) -> Aliases:
    """Find the names of tensors that are one and the same memory.

    Args:
        tensors: Tensors by name.
        tied: Names that are an alias rather than the tensor's own name, where there is a choice:
            those that a model derives from others when it is loaded. Else the first is its own.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> find_aliases({"embedding": weight, "head": weight, "half": weight[:1]})
    {'head': 'embedding'}
    """
    own: dict[tuple[object, ...], str] = {}
    aliases: Aliases = {}
    for name in sorted(tensors, key=lambda name: name in tied):  # stable: else in their order
        tensor = tensors[name]
        if not _has_place(tensor) or tensor.numel() == 0:
            continue
        is_flipped = (tensor.is_conj(), tensor.is_neg())  # the same memory, read otherwise
        extent = (tensor.dtype, tensor.shape, tensor.stride())
        place = (tensor.device, tensor.data_ptr(), *extent, *is_flipped)
        if own.setdefault(place, name) != name:
            aliases[name] = own[place]
    return aliases


class Packed(NamedTuple):
    """Groups of tensors as they go into files.

    Attributes:
        groups: Tensors by name, for each file. No tensor is listed twice.
        aliases: Other names of these tensors, for each file.
        strides: Strides of those that do not lie in the order of their axes, for each file.
        num_bytes: Size of all of them.
    """

    groups: dict[str, dict[str, Tensor]]
    aliases: dict[str, Aliases]
    strides: dict[str, dict[str, list[int]]]
    num_bytes: int


def pack(
    groups: Mapping[str, Mapping[str, Tensor]], tied: Collection[str], models: Collection[str]
) -> Packed:
    """Prepare groups of tensors for files: each tensor once, and how it lies in memory.

    Args:
        groups: Tensors by name, for each file.
        tied: Names that a model derives from others when it is loaded.
        models: Names of the groups that are a model's, which keeps the strides of its own weights.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    aliases: dict[str, Aliases] = {}
    strides: dict[str, dict[str, list[int]]] = {}
    for stem, group in groups.items():
        aliases[stem] = find_aliases(group, tied if stem in models else ())
        strides |= {} if stem in models else {stem: find_strides(group)}
        packed[stem] = {name: one for name, one in group.items() if name not in aliases[stem]}
    size = sum(one.nbytes for group in packed.values() for one in group.values() if _has_place(one))
    return Packed(packed, aliases, strides, size)


def find_strides(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the strides of tensors that lie in memory in another order than that of their axes.

    Files hold numbers in the order of the axes. Tensors with gaps between their numbers lose them.

    >>> import torch
    >>> find_strides({"weight": torch.zeros(2, 3).t(), "bias": torch.zeros(3)})
    {'weight': [1, 3]}
    """
    return {
        name: list(tensor.stride())
        for name, tensor in tensors.items()
        if _has_place(tensor)
        and tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
        and _is_dense(tensor.shape, tensor.stride())
    }


def with_stride(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the same numbers in memory of other strides.

    Raises:
        ValueError: No tensor of this shape lies so, one number beside the other.
    """
    if len(stride) != tensor.ndim or not _is_dense(tensor.shape, stride):
        raise ValueError(f"strides {stride!r:.40} of a tensor of shape {tuple(tensor.shape)}")
    placed = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    return placed.copy_(tensor)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether strides are those of memory without gaps, in any order of the axes."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n > 1):
        if step != expected:
            return False
        expected *= size
    return all(type(step) is int and 0 <= step < 2**62 for step in stride)


def _has_place(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    if tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() == 0 or tensor.data_ptr() != 0  # a class that wraps others has none


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    *,
    is_split: bool = True,
) -> Iterator[Path]:
    """Write ``stem.safetensors``, or several parts and their index; yield each file written.

    The names are those of transformers, so that ``from_pretrained`` reads the files of a model.

    Args:
        tensors: Tensors on any device. Those that share memory are each written in full.
        folder: An existing folder.
        stem: First part of the names of the files.
        is_split: Whether a new file begins at ``MAX_FILE_BYTES``; False writes one file.

    Raises:
        OSError: The disk is full, the folder read-only, ...
        CheckpointError: A tensor has no place in such a file: it is sparse, quantized, on "meta",
            of a class that wraps others.
    """
    require_places(tensors)
    parts = list(_split(tensors, MAX_FILE_BYTES)) if is_split else [dict(tensors)]
    if len(parts) == 1:
        path = folder / f"{stem}.safetensors"
        _save(parts[0], path)
        yield path
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        path = folder / f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        _save(part, path)
        yield path
        weight_map |= dict.fromkeys(part, path.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    yield path


def require_places(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no place in a file.

    Raises:
        CheckpointError: One is sparse, quantized, on "meta", or of a class that wraps others.
    """
    for name, tensor in tensors.items():
        if not _has_place(tensor):
            layout = "nested" if tensor.is_nested else tensor.layout
            raise CheckpointError(
                f"{name} cannot be saved: it is a {type(tensor).__name__}, {tensor.dtype}, "
                f"{layout}, on {tensor.device}. Let state_dict() return dense tensors that hold "
                "data."
            )


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(_contiguous(tensors)), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # "IoError" is what safetensors wrote before 0.5.
        if any(words in str(error) for words in ("I/O", "os error", "IoError")):
            raise OSError(str(error)) from error
        raise CheckpointError(f"{path.name} cannot be written: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # RuntimeError may be a worker's death
        raise CheckpointError(
            f"A tensor for {path.name} cannot be saved: {error}. Of {len(tensors)}, the first is "
            f"{next(iter(tensors), None)!r}; let state_dict() return dense tensors."
        ) from error


def _contiguous(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # safetensors refuses tensors that overlap, and writes bytes without regard to a lazy conj().
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        yield name, tensor.to("cpu", copy=True) if memory in seen else tensor
        seen.add(memory)


def load_tensors(folder: Path, stem: str, files: Collection[str]) -> dict[str, Tensor]:
    """Read what ``save_tensors`` wrote, to the CPU.

    Args:
        folder: Folder that holds the files.
        stem: The stem that was given to ``save_tensors``.
        files: Names of the files in the folder that may be read.

    Raises:
        CheckpointError: A file is not a safetensors file, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    parts = sorted(name for name in files if _is_part(name, stem))
    if not parts:
        raise CheckpointError(f"{folder} holds no {stem}.safetensors.")
    tensors: dict[str, Tensor] = {}
    for name in parts:
        try:
            # A copy: the file is mapped into memory, and would keep its disk space when deleted.
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}.") from error
    return tensors


def _is_part(name: str, stem: str) -> bool:
    return name == f"{stem}.safetensors" or (
        name.startswith(f"{stem}-") and name.endswith(".safetensors")
    )


def describe(values: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of each tensor among some values: ``float32 (2, 3)``."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        for name, tensor in values.items()
        if isinstance(tensor, Tensor)
    }


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the tensors in a file; those that have no place in one do not count."""
    aliases = find_aliases(tensors)
    dense = (tensor for name, tensor in tensors.items() if name not in aliases)
    return sum(tensor.nbytes for tensor in dense if _has_place(tensor))
