"""An accelerator without a chip: torch's device "far", whose memory and arithmetic are the CPU's.

`python -m pytest -p far_device ...` makes it this process's accelerator, as cuda is where there is
one: `"auto"` takes it, the host has to copy to and from it, and may not mix its tensors with its
own. What the host waits for is noted in ``WAITS``, which `torch.cuda.set_sync_debug_mode` does on
cuda. It draws from the CPU's random generator, knows no streams, events or low precision, and
tells nothing about speed.

It stands on torch's registration of devices in Python, which torch calls experimental. A module
that moves to it gets its new weights swapped in, where one that moves to cuda gets new data.
"""

import functools
import sys
from types import SimpleNamespace

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_READS = {  # whose result the host needs before it continues
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}

WAITS: list[str] = []
"""The source files that made the host wait, the innermost outside of torch for each wait."""


class FarTensor(torch.Tensor):
    """A tensor of the device; ``near`` holds its numbers."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="far:0",
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, *args, **(kwargs or {}))

    def tolist(self):  # torch refuses it for classes of tensors
        return self.cpu().tolist()

    def data_ptr(self):
        return self.near.data_ptr()

    def untyped_storage(self):
        return self.near.untyped_storage()

    def __repr__(self):
        return f"far({self.near!r})"


def _run(op, *args, **kwargs):
    can_decompose, views = _about(op)
    if can_decompose:  # in inference mode: else its parts come here
        return op.decompose(*args, **kwargs)
    tensors = list(_tensors((*args, *kwargs.values())))
    given = {id(t.near): t for t in tensors if isinstance(t, FarTensor)}
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if _waits(op, args, kwargs, bool(given), target):
        _note()
    if given and op not in (aten._to_copy.default, aten.copy_.default):
        near = [t for t in tensors if not isinstance(t, FarTensor) and t.ndim > 0]
        assert not near, f"{op}: a tensor of the CPU among those of the device: {near}"
    if target == "far":
        kwargs["device"] = "cpu"
    # What is made in inference mode is an inference tensor, but not a view of one made outside.
    is_inference = torch.is_inference_mode_enabled() and not (
        views and not any(t.is_inference() for t in tensors)
    )
    with torch.inference_mode(is_inference):
        results = op(*_near(args), **{name: _near(value) for name, value in kwargs.items()})
        if target == "cpu" or not (given or target == "far"):
            return results
        if isinstance(results, torch.Tensor):
            return given[id(results)] if id(results) in given else FarTensor(results)
        return tree_map_only(torch.Tensor, lambda r: given.get(id(r), FarTensor(r)), results)


# Every operation comes here, and what is found out about it takes longer than it does.
@functools.cache
def _about(op):
    return op._can_decompose(), any(result.alias_info is not None for result in op._schema.returns)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _near(value):
    if isinstance(value, FarTensor):
        return value.near
    return type(value)(map(_near, value)) if isinstance(value, list | tuple) else value


def _waits(op, args, kwargs, is_far, target):
    if op is aten._to_copy.default:
        crosses = target == "cpu" if is_far else target == "far"
        return crosses and not kwargs.get("non_blocking")
    if op is aten.copy_.default:
        crosses = isinstance(args[0], FarTensor) != isinstance(args[1], FarTensor)
        return crosses and not (kwargs.get("non_blocking") or args[2:] == (True,))
    return is_far and op in _READS


def _note():
    own = (__file__, torch.__path__[0])
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    WAITS.append(frame.f_code.co_filename)


_module = SimpleNamespace(
    current_device=lambda: 0,
    device_count=lambda: 1,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],  # without effect
    is_available=lambda: True,
    is_initialized=lambda: True,
    manual_seed_all=lambda seed: None,
    _is_in_bad_fork=lambda: False,
)
backend_registration._setup_privateuseone_for_python_backend("far", _module)
_kernels = library.Library("_", "IMPL")  # while it lives, they are registered
_kernels.fallback(_run, "PrivateUse1")
_kernels.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
# `model.to("far")` keeps its parameters, as `.to("cuda")` does: the optimizer has them already.
torch.__future__.set_swap_module_params_on_conversion(True)


def pytest_report_header():
    """Print which device the tests run on."""
    from manualloop import prepare_strategy

    return f'"auto" is {prepare_strategy("auto").device}'
