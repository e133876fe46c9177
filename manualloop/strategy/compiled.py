"""``torch.compile`` for models whose batches differ in length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from manualloop.internals import compile_once

CompileOptions = bool | Mapping[str, Any]
"""Whether to compile, or the options of ``torch.compile``."""


def compile_model(model: nn.Module, options: CompileOptions) -> None:
    """Compile a model in place, once; the names of its weights stay as they are.

    In a model of repeated blocks only the blocks are compiled, which takes as long as compiling one
    of them. Lengths are dynamic (``dynamic=True``), so that a batch of another length does not
    compile anything again.

    Args:
        model: The model, on its device.
        options: True, or options of ``torch.compile``. False does nothing.
    """
    if not options:
        return
    settings = {"dynamic": True, **(options if isinstance(options, Mapping) else {})}
    for module in repeated_blocks(model) or [model]:
        compile_once(module, settings)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the outermost lists of modules of one class, in order.

    >>> layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> len(repeated_blocks(nn.Sequential(nn.Linear(2, 2), layers)))
    0
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    >>> len(repeated_blocks(Model()))
    3
    """
    if isinstance(model, nn.ModuleList) and len(model) > 1:
        blocks = list(model)
        # A single layer is too small to be compiled by itself.
        if all(type(block) is type(blocks[0]) and [*block.children()] for block in blocks):
            return blocks
    return [block for child in model.children() for block in repeated_blocks(child)]
