"""What a model takes up: its parameters, the state of its optimizer, its checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.checkpoint.parts import saved_part
from manualloop.internals import unwrap_optimizer
from manualloop.models import is_sharded, own_part, unwrap_model
from manualloop.optimizers.access import parameters_of
from manualloop.optimizers.together import each


class Parameters(NamedTuple):
    """The parameters of a model, counted in numbers.

    Attributes:
        num_all: Numbers in all parameters, each counted once.
        num_trainable: Numbers in those that require a gradient.
        num_shared: Numbers in those that have several names, such as tied embeddings.
        dtypes: Numbers of the trainable parameters by the name of their dtype.
        left_alone: Names of trainable parameters that no optimizer has.
    """

    num_all: int
    num_trainable: int
    num_shared: int
    dtypes: Mapping[str, int]
    left_alone: tuple[str, ...]


def count_parameters(model: nn.Module, optimizer: Optimizer) -> Parameters:
    """Count the parameters of a model, and find those that its optimizer does not have."""
    model = unwrap_model(model, adapters=False)
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    dtypes: Counter[str] = Counter()
    for parameter in trainable.values():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    in_optimizer = {id(parameter) for parameter in parameters_of(optimizer)}
    return Parameters(
        num_all=sum(p.numel() for p in parameters.values()),
        num_trainable=sum(p.numel() for p in trainable.values()),
        num_shared=sum(p.numel() for p in parameters.values() if names[id(p)] > 1),
        dtypes=dict(dtypes.most_common()),
        left_alone=tuple(name for name, p in trainable.items() if id(p) not in in_optimizer),
    )


def bytes_of(tensors: Iterable[Any]) -> int:
    """Return the size of some tensors, each part of memory once; other values have none.

    >>> weight = nn.Parameter(Tensor(3, 2))
    >>> bytes_of([weight, weight, "a"])
    24
    """
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            own = own_part(tensor).detach()
            found[own.data_ptr() or id(tensor), own.shape] = own.numel() * own.element_size()
    return sum(found.values())


def bytes_of_optimizer(optimizer: Any) -> int | None:
    """Return the size of an optimizer's state, also of one that is made at the first update.

    Returns:
        The number of bytes; None for an optimizer of which nobody knows what it will keep.
    """
    total = 0
    for one in map(unwrap_optimizer, each(optimizer)):
        if one.state:
            total += bytes_of(value for of in one.state.values() for value in _values(of))
            continue
        for group in one.param_groups:
            copies = _COPIES.get(type(one).__name__, lambda group: None)(group)
            if copies is None:
                return None
            trained = [own_part(p) for p in group["params"] if p.requires_grad]
            total += int(copies * sum(p.numel() * p.element_size() for p in trained))
    return total


def _values(state: Any) -> Iterable[Any]:
    return state.values() if isinstance(state, Mapping) else ()


# How many numbers an optimizer of torch keeps for each parameter, by its settings.
_COPIES: dict[str, Any] = {
    **dict.fromkeys(("Adam", "AdamW"), lambda group: 3 if group["amsgrad"] else 2),
    **dict.fromkeys(("Adamax", "NAdam", "RAdam", "Adadelta"), lambda group: 2),
    **dict.fromkeys(("Adagrad", "Muon"), lambda group: 1),
    "SGD": lambda group: 1 if group["momentum"] else 0,
    "RMSprop": lambda group: 1 + bool(group["momentum"]) + bool(group["centered"]),
}


def bytes_of_checkpoint(model: nn.Module, optimizer: Any) -> int | None:
    """Return the size of a checkpoint: the weights that it holds, and the optimizer's state.

    Returns:
        The number of bytes; None where it is not known before: of a sharded model, whose state
        takes all ranks, or of an optimizer of a kind that is not known.
    """
    of_optimizer = bytes_of_optimizer(optimizer)
    if of_optimizer is None or is_sharded(model):
        return None
    saved: Any = saved_part(model)
    return bytes_of(saved.state_dict().values()) + of_optimizer
