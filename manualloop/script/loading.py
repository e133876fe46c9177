"""The lines that load a model, and whether they build the model of the call.

What the lines build is built, without weights, and compared with the model at hand: each difference
becomes a line of the script, or a problem.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import nn

from manualloop.libraries import attention_of
from manualloop.script.built import build, changed_settings, convert, differences, name_of_dtype
from manualloop.script.text import Call, Line, Note, literal, when
from manualloop.script.weights import are_stored, dtype_of, has_other_shapes
from manualloop.tasks.names import names_in_config

FILL_IN = "FILL IN"
"""What marks a line that nobody but the user can complete."""


class Loading(NamedTuple):
    """How a script loads a model.

    Attributes:
        lines: The lines.
        imports: The imports that they need.
        problems: What of the model at hand they do not build.
        names: Names of the classes, which are a list of the script; None if they are not.
        draws: Whether loading may draw random numbers, as for a new head.
    """

    lines: Sequence[Line]
    imports: Sequence[str] = ()
    problems: Sequence[str] = ()
    names: tuple[str, ...] | None = None
    draws: bool = True


def loading_of(model: Any) -> Loading:
    """Write the lines that load a model.

    Args:
        model: The model, without wrappers other than those of PEFT.
    """
    is_adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    base = model.get_base_model() if is_adapted else model
    kind = type(base)
    if not kind.__module__.startswith("transformers.") or not hasattr(base, "save_pretrained"):
        lines: list[Line] = [
            f"model = ...  # {FILL_IN}: the {type(model).__name__} as it was before the training",
            *_trained_parts(model, None),
        ]
        return Loading(lines)
    source = _Source.of(base, model)
    try:
        built, converted = _built(model, base, source)
    except Exception as error:  # of any class of transformers, or of PEFT
        problem = f"a {kind.__name__} cannot be built from its config here ({error!r:.200})"
        return Loading([], problems=[f"{problem}, so nothing tells what a script would train."])
    lines, imports = _loaded("base" if is_adapted else "model", kind, source)
    if is_adapted:
        lines += _ADAPTER
        imports.append("from peft import PeftModel")
    lines += _conversions(converted)
    problems = [*source.problems, *_problems_of_adapters(model), *differences(model, built)]
    lines += [*_trained_parts(model, built), *_settings(model, built), *_checkpointing(base)]
    return Loading(lines, imports, problems, source.names, draws=bool(source.where))


_ADAPTER: list[Line] = [
    Note(
        f"{FILL_IN} the folder of the adapter: "
        'model.save_pretrained("path/to/adapter"), before the training.'
    ),
    'model = PeftModel.from_pretrained(base, "path/to/adapter", is_trainable=True)',
]


def _built(model: Any, base: Any, source: _Source) -> tuple[Any, list[tuple[str, torch.dtype]]]:
    """Build what the lines load, and find what was converted since; completes the source."""
    built = build(model, base, source.config(), source.dtype)
    if attention_of(built.config) != attention_of(base.config):
        source.arguments["attn_implementation"] = attention_of(base.config)
        built = build(model, base, source.config(), source.dtype)
    converted = convert(model, built)
    widest = reduce(torch.promote_types, (dtype for _, dtype in converted), source.dtype)
    if not source.where and widest != source.dtype:  # the file has digits that would be lost
        source.dtype = widest
        built = build(model, base, source.config(), widest)
        converted = convert(model, built)
    return built, converted


class _Source:
    """Where a model is loaded from, and with what.

    Attributes:
        where: Name or folder; "" if nothing tells.
        stored: The config that is found there; that of the model if there is no such place.
        dtype: The dtype that it is loaded in.
        replaces: Whether stored weights of another shape are replaced by new ones.
        arguments: Arguments of ``from_pretrained`` beside it.
        names: Names of the classes, if the stored config has not got them.
        note: What is left to the user; "" if nothing is.
        problems: Settings that no argument can carry.
    """

    def __init__(self, where: str, stored: Any, dtype: torch.dtype, note: str) -> None:
        self.where, self.stored, self.dtype, self.note = where, stored, dtype, note
        self.replaces = False
        self.arguments: dict[str, Any] = {}
        self.names: tuple[str, ...] | None = None
        self.problems: list[str] = []

    @classmethod
    def of(cls, model: Any, whole: Any) -> _Source:
        """Find the source of a model, and what it was given beside the name.

        Args:
            model: The model.
            whole: The model with the wrappers of PEFT.
        """
        config = model.config
        own = type(config).from_dict(config.to_dict())  # as save_pretrained would keep it
        where = getattr(config, "name_or_path", "") or ""
        folder = (
            f'{FILL_IN} the folder: model.save_pretrained("path/to/model"), before the training.'
        )
        source = cls(where, own, model.dtype, folder)
        # from_pretrained notes the dtype, and so does a config that a model is built from.
        noted: Any = getattr(config, "dtype", None)
        dtypes = [noted, model.dtype] if isinstance(noted, torch.dtype) else [model.dtype]
        if where:
            try:
                stored = type(config).from_pretrained(where, local_files_only=True)
            except (OSError, ValueError):
                source.dtype = dtypes[0]
                note = "its config is not on this disk"
                source.note = f"{FILL_IN} what else from_pretrained was given: {note}."
            else:
                sizes = {getattr(one, "vocab_size", None) for one in (stored, config)}
                loaded = [d for d in dtypes if are_stored(model, where, d, whole)]
                if len(sizes) == 1 and loaded:
                    source.stored, source.dtype, source.note = stored, loaded[0], ""
                    source.replaces = has_other_shapes(model, where)
                else:  # of other embeddings or weights than those that are stored
                    source.where = ""
        source.compare(model)
        return source

    def compare(self, model: Any) -> None:
        """Note the settings of the model that differ from those that are stored."""
        config, stored, arguments = model.config, self.stored, self.arguments
        is_classifier = type(model).__name__.endswith("Classification")
        if is_classifier and stored.id2label != config.id2label:
            self.names = names_in_config(model)
        if is_classifier and self.names is None:
            arguments["num_labels"] = config.num_labels
        problem_type = getattr(config, "problem_type", None)
        inferred = "regression" if config.num_labels == 1 else "single_label_classification"
        known = getattr(stored, "problem_type", None)
        if problem_type == "multi_label_classification" or (
            problem_type != known and (problem_type not in (None, inferred) or known is not None)
        ):
            arguments["problem_type"] = problem_type
        kept = _settings_of(stored.to_dict())
        for name, value in _settings_of(config.to_dict()).items():
            if kept.get(name) == value:
                continue
            if name not in kept or not is_plain(value) or len(repr(value)) > _LONG:
                self.problems.append(
                    f"{name} of the config was changed after the model was loaded, and is not "
                    "written out. Eject the call with the config as it was loaded, and change it "
                    "in the script."
                )
            else:
                arguments[name] = value

    def config(self) -> Any:
        """Return the config that ``from_pretrained`` makes of this."""
        given = dict(self.arguments)
        if self.names is not None:
            given["id2label"] = dict(enumerate(self.names))
        return type(self.stored).from_dict(self.stored.to_dict(), **given)


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config, and of configs inside of it, that are set nowhere else."""
    return {
        name: _settings_of(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _SET_ELSEWHERE
    }


_SET_ELSEWHERE = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "num_labels", "problem_type"),
    *("transformers_version", "id2label", "label2id", "_commit_hash", "tokenizer_class"),
    "_attn_implementation_autoset",
)
_LONG = 60


def is_plain(value: Any) -> bool:
    """Tell whether a value can be written as code: numbers, texts, and lists and dicts of them."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values())) and all(isinstance(key, str) for key in value)
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _problems_of_adapters(model: Any) -> Iterator[str]:
    adapters = getattr(model, "peft_config", {})
    names = list(adapters)
    if names not in ([], ["default"]):
        yield (
            f"the model has the adapters {', '.join(names)}, and a script loads one, which is "
            "called default. Eject the call with one adapter of this name."
        )
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        yield (
            "PEFT does not load an adapter of virtual tokens to train it. Eject the call with the "
            "model without it, and wrap it in the script: model = get_peft_model(model, config)."
        )


def _loaded(name: str, kind: type, source: _Source) -> tuple[list[Line], list[str]]:
    written = {name: literal(value) for name, value in source.arguments.items()}
    if {str(source.dtype), _default_dtype(source)} != {"torch.float32"}:
        written[name_of_dtype(source.stored)] = str(source.dtype)
    if source.replaces:
        written["ignore_mismatched_sizes"] = "True"
    lines: list[Line] = []
    if source.names is not None:
        lines.append(Call("classes = [", map(literal, source.names), "]"))
        written = {
            "id2label": "dict(enumerate(classes))",
            "label2id": "{name: number for number, name in enumerate(classes)}",
            **written,
        }
    where = literal(source.where or "path/to/model")
    arguments = [where, *(f"{name}={value}" for name, value in written.items())]
    return [
        *lines,
        *when(source.note, Note(source.note)),
        Call(f"{name} = {kind.__name__}.from_pretrained(", arguments),
    ], [f"from transformers import {kind.__name__}"]


def _default_dtype(source: _Source) -> str:
    """Return the dtype that is loaded if none is given: that of the config, or of the file."""
    return str(getattr(source.stored, "dtype", None) or dtype_of(source.where) or torch.float32)


def _conversions(converted: Sequence[tuple[str, torch.dtype]]) -> list[Line]:
    """The lines for modules that were converted after the model was loaded."""
    lines: list[Line] = []
    for dtype in dict.fromkeys(dtype for _, dtype in converted):
        paths = [path for path, other in converted if other == dtype]
        if paths == [""]:
            return [f"model.to({dtype})  # converted after it was loaded"]
        lines += [
            Call("for name in [", map(literal, paths), "]:"),
            [f"model.get_submodule(name).to({dtype})"],
        ]
    return [*when(lines, "# Converted after the model was loaded."), *lines]


def _trained_parts(model: nn.Module, built: nn.Module | None) -> list[Line]:
    """The lines for parameters that are trained, or not, otherwise than those that are loaded."""
    # Loading may thaw what a class freezes, such as tables of positions. PEFT freezes the base.
    freezes = hasattr(built, "peft_config")
    before = {} if built is None else dict(built.named_parameters())
    changed: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        was_trained = name not in before or before[name].requires_grad
        if not was_trained if trains else was_trained or not freezes:
            changed[trains][id(parameter)] = name
    lines: list[Line] = []
    for trains, comment in (
        (False, "# These parts stay as they are: they get no gradient."),
        (True, "# These parts are trained, too."),
    ):
        names = [*_parts(model, "", changed[trains])]
        inside = tuple(f"{name}." for name in names) or ("\0",)
        alone = [name for name in changed[trains].values() if not name.startswith(inside)]
        for found, kind in ((names, "submodule"), (alone, "parameter")):
            if found:
                called = "trained" if trains else "frozen"
                lines += [
                    comment,
                    Call(f"{called} = [", map(literal, found), "]"),
                    f"for name in {called}:",
                    [f"model.get_{kind}(name).requires_grad_({trains})"],
                ]
    return lines


def _parts(module: nn.Module, name: str, wanted: Container[int]) -> Iterator[str]:
    """Yield the names of the outermost modules whose parameters are all wanted, by their ids."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if all(id(parameter) in wanted for parameter in parameters):
        yield name
        return
    for child, inner in module.named_children():
        yield from _parts(inner, f"{name}.{child}" if name else child, wanted)


def _settings(model: nn.Module, built: nn.Module) -> list[Line]:
    """The lines for settings of modules that were changed after the model was loaded."""
    lines: list[Line] = []
    modules = dict(model.named_modules())
    for (kind, name, value), paths in changed_settings(model, built).items():
        alike = [module for module in modules.values() if isinstance(module, kind)]
        is_of_torch = getattr(torch.nn, kind.__name__, None) is kind
        if is_of_torch and len(paths) > 1 and all(getattr(m, name) == value for m in alike):
            lines += [
                "for module in model.modules():",
                [f"if isinstance(module, torch.nn.{kind.__name__}):"],
                [[f"module.{name} = {literal(value)}"]],
            ]
        else:
            lines += [
                Call("for name in [", map(literal, paths), "]:"),
                [f"model.get_submodule(name).{name} = {literal(value)}"],
            ]
    return [*when(lines, "# Changed after the model was loaded."), *lines]


def _checkpointing(model: Any) -> list[Line]:
    flags = [vars(module).get("gradient_checkpointing") for module in model.modules()]
    if True not in flags:
        return []
    new = "activation_checkpointing_enable"  # the name before transformers 5.20 is the other one
    name = new if hasattr(model, new) else "gradient_checkpointing_enable"
    return [f"model.{name}()  # activations are computed twice, and not kept"]
