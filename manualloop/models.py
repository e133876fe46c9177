"""Facts about a model that are known without running it, and the mode in which it is evaluated."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from manualloop.internals import children_of, compiled_module
from manualloop.libraries import tied_patterns
from manualloop.objects import remember
from manualloop.randomness import random_states_kept


def unwrap_model(model: nn.Module, *, adapters: bool = True) -> nn.Module:
    """Take off the wrappers of ``torch.compile`` and data parallelism, and those of PEFT.

    Args:
        model: A model, wrapped or not.
        adapters: Whether to take off the wrappers of PEFT too, which hold weights.
    """
    while True:
        kind = type(model)
        inner: object = None
        if kind.__name__ in _PARALLEL:
            inner = getattr(model, "module", None)
        elif kind.__name__.endswith("OptimizedModule"):  # FSDPOptimizedModule once it is sharded
            inner = compiled_module(model, children_of(model))
        elif adapters and hasattr(kind, "get_base_model") and "base_model" in children_of(model):
            inner = cast("Any", model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


_PARALLEL = (
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
)


def without_ranks(model: nn.Module) -> nn.Module:
    """Take off the wrapper that would communicate with the other ranks in a forward pass."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each rank holds only a part of the weights.

    A forward pass then takes all ranks.
    """
    names = {
        cls.__name__ for module in (model, unwrap_model(model)) for cls in type(module).__mro__
    }
    return bool(names & {"FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"})


def has_soft_prompt(model: nn.Module) -> bool:
    """Tell whether PEFT puts trained places before the tokens, which predict the first of them.

    A prefix of keys and values, as of prefix tuning, predicts nothing.
    """
    adapter = getattr(unwrap_model(model, adapters=False), "active_peft_config", None)
    is_prompt = bool(getattr(adapter, "is_prompt_learning", False))
    return is_prompt and getattr(adapter, "peft_type", None) not in _PREFIXES


_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


class Varying(NamedTuple):
    """Rotary positions that depend on the longest row of a batch.

    Attributes:
        kind: Name of the kind.
        length: Number of tokens above which a row changes those of the others.
    """

    kind: str
    length: int


def varying_positions(model: nn.Module) -> Varying | None:
    """Tell whether a model computes its positions for the longest row of a batch; None: not so."""
    config = config_of(model)
    texts = text_config(config)
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5, and before
        found = getattr(texts, name, None)
        for part in (found, *found.values()) if isinstance(found, Mapping) else ():
            kind = part.get("rope_type", part.get("type")) if isinstance(part, Mapping) else None
            length = getattr(texts, "max_position_embeddings", None)
            if kind == "longrope":
                own = getattr(texts, "original_max_position_embeddings", None)
                length = part.get("original_max_position_embeddings", own) or length
            if kind in ("longrope", "dynamic") and length is not None:
                return Varying(kind, int(length))
    return None


def config_of(model: nn.Module) -> Any:
    """Return the ``config`` of a model of transformers; None for other modules."""
    return own_config(unwrap_model(model))


def text_config(config: Any) -> Any:
    """Return the part of a config that tells of texts; of two, as in MusicGen, the decoder's."""
    find = getattr(config, "get_text_config", None)
    if find is None:
        return config
    for options in ({}, {"decoder": True}):
        try:
            return find(**options)
        except ValueError:  # there are several
            continue
    return config


def own_config(model: nn.Module) -> Any:
    """Return the ``config`` of a model that has no wrapper; None if it is not of transformers."""
    if "config" in vars(model) or hasattr(type(model), "config"):
        return model.config
    return None


def tied_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that a model of transformers ties to others on loading."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:  # before transformers 5: patterns, or None
        patterns = tied_patterns(model)
        return {name for name in model.state_dict() if any(re.search(p, name) for p in patterns)}
    return set(tied)


def model_name(model: nn.Module) -> str:
    """Return the class name of a model, for messages."""
    return type(unwrap_model(model)).__name__


def num_labels(model: nn.Module) -> int | None:
    """Return the number of classes that a classifier has outputs for; None if it is not known.

    It is ``config.num_labels``, except for a transformers model with another head, where that is a
    default without a meaning.
    """
    model = unwrap_model(model)
    config = getattr(model, "config", None)
    if hasattr(config, "id2label") and "Classif" not in type(model).__name__:
        return None
    value = getattr(config, "num_labels", None)
    return value if isinstance(value, int) else None


def num_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a classifier, or of a model that finds classes in images."""
    name, config = model_name(model), config_of(model)
    is_one = any(part in name for part in ("Segmentation", "ObjectDetection"))
    return getattr(config, "num_labels", None) if is_one else num_labels(model)


def problem_type(model: nn.Module) -> str | None:
    """Return ``config.problem_type``, which the user chooses, or the model at its first batch."""
    value = getattr(config_of(model), "problem_type", None)
    return value if isinstance(value, str) else None


class Forward(NamedTuple):
    """The arguments of a forward pass.

    Attributes:
        columns: Their names, without ``*args`` and ``**kwargs``.
        takes_any: Whether it takes ``**kwargs``.
    """

    columns: list[str]
    takes_any: bool


def forward_of(model: nn.Module) -> Forward:
    """Return the arguments of a model's forward pass."""
    parameters = inspect.signature(unwrap_model(model).forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Forward(names, any(p.kind is p.VAR_KEYWORD for p in parameters))


def forward_columns(model: nn.Module) -> list[str]:
    """Return the names of the forward pass's arguments, without ``*args`` and ``**kwargs``."""
    return forward_of(model).columns


def accepts(model: nn.Module, column: str) -> bool:
    """Tell whether the forward pass takes a column, by name or among its ``**kwargs``."""
    forward = forward_of(model)
    return forward.takes_any or column in forward.columns


def predicts_without_labels(model: nn.Module) -> bool:
    """Tell whether labels make no difference to a model's outputs, apart from the loss.

    Those of an encoder-decoder are what its decoder reads, and other modules do not tell.
    """
    config = config_of(model)
    return config is not None and not getattr(config, "is_encoder_decoder", False)


def vocab_size(model: nn.Module) -> int | None:
    """Return the number of rows of the input embedding; None where there is none."""
    get_embeddings = getattr(unwrap_model(model), "get_input_embeddings", None)
    try:
        embeddings = get_embeddings() if get_embeddings else None
    except NotImplementedError:  # raised by transformers for models without one
        return None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def devices_of(model: nn.Module) -> dict[torch.device, str]:
    """Return the name of a model's first tensor on each device that holds any of them.

    Looked at are parameters, buffers, and plain attributes, which ``model.to`` does not move.

    >>> devices_of(nn.Linear(1, 1))
    {device(type='cpu'): 'weight'}
    """
    model = unwrap_model(model, adapters=False)
    named: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        named += [(f"{path}.{name}".lstrip("."), value) for name, value in vars(module).items()]
    found: dict[torch.device, str] = {}
    for name, value in named:
        if isinstance(value, torch.Tensor):
            found.setdefault(value.device, name)
    return found


def max_length(model: nn.Module) -> int | None:
    """Return the number of tokens that the position embeddings have room for.

    None for models without learned absolute positions, which take any length; the
    ``max_position_embeddings`` of their config is a recommendation.
    """
    for name, module in unwrap_model(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in _POSITION_EMBEDDINGS:
            # RoBERTa counts positions from padding_idx + 1; BART and OPT keep `offset` rows free.
            unused = module.padding_idx + 1 if module.padding_idx is not None else 0
            return module.num_embeddings - max(unused, getattr(module, "offset", 0))
    return None


_POSITION_EMBEDDINGS = ("position_embeddings", "wpe", "embed_positions")


_NUM_SAMPLED = 16


def sample_weights(model: nn.Module) -> torch.Tensor:
    """Return some numbers of some trainable weights, as bits: other weights have others."""
    weights = [
        weight
        for weight in model.parameters()
        if weight.requires_grad and weight.is_floating_point() and weight.numel()
    ]
    numbers = [
        weight.detach().reshape(-1)[:: -(-weight.numel() // _NUM_SAMPLED)].double().cpu()
        for weight in weights[:: -(-len(weights) // _NUM_SAMPLED) or 1]
    ]
    return torch.cat(numbers).view(torch.int64) if numbers else torch.empty(0)


def digest_of_weights(model: nn.Module) -> str:
    """Return a short digest of a few numbers of every weight: other weights have another.

    A change of a few numbers in a large weight may not show.
    """
    sampled: dict[torch.device, list[torch.Tensor]] = {}
    for weight in map(own_part, model.parameters()):
        if weight.numel() and not weight.is_meta and not is_lazy(weight):
            some = weight.detach().reshape(-1)[:: -(-weight.numel() // _NUM_SAMPLED)]
            sampled.setdefault(weight.device, []).append(some.float())
    numbers = [torch.cat(parts).cpu() for parts in sampled.values()]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in numbers))
    return digest.hexdigest()[:8]


def coarsest_dtype(model: nn.Module, device: torch.device, *others: torch.dtype) -> torch.dtype:
    """Return the kind of numbers with the fewest digits among those that a model computes with.

    Its outputs may have more: accelerate and some models make float32 of them.

    Args:
        model: The model.
        device: The device it is on.
        others: Further kinds of numbers, such as that of the outputs.

    >>> coarsest_dtype(nn.Linear(1, 1).bfloat16(), torch.device("cpu"), torch.float32)
    torch.bfloat16
    """
    floats = [weight for weight in model.parameters() if weight.is_floating_point()]
    kinds = {w.dtype if w.element_size() > 1 else torch.bfloat16 for w in floats} | {*others}
    if torch.is_autocast_enabled(device.type):
        kinds.add(torch.get_autocast_dtype(device.type))
    if getattr(config_of(model), "quantization_config", None) is not None:
        kinds.add(torch.bfloat16)
    if torch.float32 in kinds:
        kinds.add(_OF_PRODUCTS[torch.get_float32_matmul_precision()])
    return max(kinds or {torch.float32}, key=lambda kind: torch.finfo(kind).eps)


_OF_PRODUCTS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
"""Kinds of numbers with the digits of products of float32: TF32 has as many as float16."""


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds: of one that is not sharded, all of it."""
    own: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return own


def names_not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity, with one wait for each device.

    Of a tensor that is sharded over ranks only the part of this rank is looked at.
    """
    parts = {
        name: own_part(tensor).detach()
        for name, tensor in tensors.items()
        if not is_lazy(tensor) and (tensor.is_floating_point() or tensor.is_complex())
    }
    parts = {
        name: own
        for name, own in parts.items()
        if own.element_size() > 1 and not own.is_meta and own.numel()
    }
    # A sum is the fastest pass there is. Where it is not finite, it may only have overflowed.
    suspects = _not_finite({name: own.sum() for name, own in parts.items()})
    return _not_finite({n: torch.linalg.vector_norm(parts[n], torch.inf) for n in suspects})


def _not_finite(numbers: Mapping[str, torch.Tensor]) -> list[str]:
    flags: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, number in numbers.items():
        flags.setdefault(number.device, {})[name] = torch.isfinite(number)
    are_finite: dict[str, bool] = {}
    for of_device in flags.values():
        are_finite |= zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True)
    return [name for name in numbers if not are_finite[name]]


def remember_configs(model: nn.Module) -> Callable[[], None]:
    """Return a function that makes the model's configs again what they are now.

    Models of transformers write into their config in a forward pass: ``problem_type``, which the
    labels of one batch decide.
    """
    configs: dict[str, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = vars(module).get(name)
            if callable(getattr(config, "to_dict", None)):
                configs[f"config{id(config)}"] = config
    return remember(configs)


def part_in_eval_mode(model: nn.Module) -> str | None:
    """Name a model of transformers inside another module that is trained as it was loaded.

    ``from_pretrained`` returns it in eval mode, without dropout, and a module that is built around
    it is in training mode. None: there is no such part.

    >>> part_in_eval_mode(nn.Sequential(nn.Linear(1, 1).eval()))
    """
    model = unwrap_model(model)
    if not model.training or hasattr(model, "save_pretrained"):
        return None
    for name, part in model.named_modules():
        is_loaded = name and hasattr(part, "save_pretrained") and own_config(part) is not None
        is_trained: bool = is_loaded and any(weight.requires_grad for weight in part.parameters())
        if is_trained and not any(module.training for module in part.modules()):
            return str(name)
    return None


def remember_modes(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts every submodule back into train or eval mode, as it is now."""
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in modes:
            if module.training != training:
                # Not the attribute alone: some models merge weights in train().
                module.train(training)

    return put_back


def call_own_train(model: nn.Module) -> None:
    """Call ``model.train()`` if a class in a model in training mode has a ``train`` of its own.

    Such a method keeps a part in eval mode, such as batch normalisation or a teacher, and a model
    that was just built is in training mode without it. A loop by hand calls it in every epoch.
    Parts that are in eval mode stay in it.

    >>> class Frozen(nn.Sequential):
    ...     def train(self, mode=True):
    ...         super().train(mode)[0].eval()
    ...         return self
    >>> model = Frozen(nn.BatchNorm1d(2), nn.Dropout())
    >>> call_own_train(model)
    >>> model[0].training, model[1].training
    (False, True)
    """
    model = unwrap_model(model)
    before = [(module, module.training) for module in model.modules()]
    if not model.training or all(
        getattr(module.train, "__module__", None) in _PLAIN_TRAIN for module, _ in before
    ):
        return
    model.train()
    wanted = [(module, module.training and was) for module, was in before]
    for module, mode in wanted:
        if module.training != mode:
            module.train(mode)


_PLAIN_TRAIN = {"torch.nn.modules.module", "transformers.modeling_utils"}
"""Modules of Python whose ``train`` sets the modes of all parts alike."""


def batch_statistics(model: nn.Module) -> str | None:
    """Name the first layer that computes statistics over the batch; None if there is none.

    These are layers of batch normalisation in training mode, and others that keep running means:
    what they compute of a row depends on the rows beside it.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not module.training or not hasattr(module, "running_mean") or "Frozen" in kind:
            continue
        if module.running_mean is not None or "InstanceNorm" not in kind:
            return f"{name or 'the model'} ({kind})"
    return None


@contextmanager
def evaluation_mode(
    model: nn.Module, device: torch.device, *, inference: bool = True, **owners: Any
) -> Iterator[None]:
    """Put a model into eval mode without gradients, and leave no trace of it afterwards.

    Every submodule's mode, the model's configs and all random states are put back, including those
    of generators that objects hold, so that evaluating in the middle of training does not change
    the training. Gradients are switched off by ``no_grad``: what a model keeps from a forward pass
    in ``inference_mode``, such as a table that grows with the longest row, could not be trained
    with.

    Args:
        model: The model.
        device: The device it is on.
        inference: Whether no gradients are needed.
        owners: Further objects that may hold random generators: the loader, a loss function.
    """
    put_back = [remember_modes(model), remember_configs(model)]
    try:
        with (
            random_states_kept(devices=device.type != "cpu", model=model, **owners),
            torch.inference_mode(False),  # the caller's, too
            torch.set_grad_enabled(not inference),
        ):
            model.eval()
            yield
    finally:
        for call in put_back:
            call()
