"""The house: layers, public names, signatures, import cost, size."""

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import manualloop
import manualloop.tasks
import manualloop.tracking

PACKAGE = Path(manualloop.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}

# The rows of the plan: a room imports only rooms of the rows below its own.
ROWS = [
    ["forecast", "script"],
    ["accumulation", "loop", "verify"],
    ["steps", "report"],
    ["body", "nonfinite", "plan"],
    ["update", "evaluation", "run", "tracking"],
    ["checks", "reading", "checkpoint"],
    ["data"],
    ["tasks"],
    ["mistakes", "strategy", "state"],
    ["optimizers"],
    ["arguments", "batches", "keywords", "models", "times"],
    ["deprecation", "errors", "types", "notices", "progress", "randomness"],
    ["objects", "internals", "libraries", "passing", "screen"],
]

# One door per dependency.
DOORS = {
    "accelerate": {"strategy.accelerated", "strategy.launch", "internals"},
    "datasets": {"data.tables", "evaluation.predictions", "internals"},
    "transformers": {"data.collate", "optimizers.schedules", "libraries", "script.built"},
    "evaluate": {"evaluation.modules"},
    "peft": {"checkpoint.pretrained"},
    "tqdm": {"screen"},
    "sklearn": {"evaluation.metrics", "evaluation.probabilities", "evaluation.reports"},
    "scipy": {"evaluation.metrics", "evaluation.weighted", "evaluation.compare"},
    "torchmetrics": set(),
    "seqeval": set(),  # it and the next three by evaluation.forms.load_extra
    "sacrebleu": set(),
    "rouge_score": set(),
    "pycocotools": set(),
    "matplotlib": {"run.plot"},
    "safetensors": {"checkpoint.tensors", "script.weights"},
    "tensorboard": set(),  # it and the next three by tracking.records.load
    "wandb": set(),
    "mlflow": set(),
    "trackio": set(),
    "jinja2": {"report.page"},
    "markupsafe": {"report.page", "report.parts", "report.svg"},
    "huggingface_hub": {"report.card", "script.weights"},
}

PUBLIC_NAMES = [
    "Accelerated",
    "AccumulationReport",
    "BatchReport",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "DataError",
    "DistributedError",
    "ManualLoopError",
    "MetricError",
    "ModelError",
    "NonFiniteError",
    "Predictions",
    "PredictionsComparison",
    "PreflightReport",
    "ResumeReport",
    "RunComparison",
    "SingleDevice",
    "Step",
    "Strategy",
    "TrainResult",
    "TrainState",
    "Update",
    "Window",
    "accumulate_gradients",
    "apply_update",
    "check_accumulation",
    "compare_predictions",
    "compare_runs",
    "count_items",
    "eject",
    "evaluate_loop",
    "find_checkpoint",
    "inspect_batch",
    "launch",
    "load_checkpoint",
    "load_metric",
    "plot_history",
    "predict_loop",
    "preflight",
    "prepare_dataloaders",
    "prepare_optimizer",
    "prepare_scheduler",
    "prepare_strategy",
    "save_checkpoint",
    "train_loop",
    "train_steps",
    "verify_resume",
    "windows",
    "write_model_card",
    "write_report",
]

SIGNATURES = {
    "accumulate_gradients": "model, batches, *, loss_fn=None, terms=None, strategy=None",
    "apply_update": (
        "state, batches, strategy, *, loss_fn=None, terms=None, max_grad_norm=None, "
        "on_nonfinite='raise'"
    ),
    "check_accumulation": "model, batch, *, loss_fn=None, terms=None, strategy=None",
    "compare_predictions": "a, b, metric, *, confidence=0.95",
    "compare_runs": "a, b",
    "count_items": "model, batch",
    "eject": "*arguments, **options",
    "evaluate_loop": (
        "model, eval_dataloader, metric=None, *, strategy=None, postprocess=None, "
        "decode=None, loss_fn=None, terms=None, confidence=None, progress_bar=False"
    ),
    "find_checkpoint": "checkpoint_dir, which='last'",
    "inspect_batch": "loader, tokenizer=None",
    "launch": "function, args=(), *, num_processes=None, mixed_precision=None, use_port=None",
    "load_checkpoint": "checkpoint_dir, state, *, which='last', strategy=None, verify=True",
    "load_metric": "name, config=None, **options",
    "plot_history": "*results, labels=None",
    "predict_loop": (
        "model, dataloader, *, strategy=None, postprocess=None, decode=None, progress_bar=False"
    ),
    "preflight": (
        "model, loaders, optimizer=None, lr_scheduler='linear', *, num_epochs=None, "
        "max_steps=None, num_warmup_steps=0, gradient_accumulation_steps=1, max_grad_norm=None, "
        "loss_fn=None, terms=None, step_fn=None, strategy=None, extras=None, evaluate=None, "
        "best_metric=None, checkpoint_dir=None, keep_checkpoints=2, **others"
    ),
    "prepare_dataloaders": (
        "datasets, tokenizer=None, *, model=None, task=None, text_columns=None, "
        "label_column=None, max_length=None, batch_size=8, eval_batch_size=None, "
        "max_tokens=None, pack=False, group_by_length=False, pad_to_multiple_of=None, "
        "drop_last=False, "
        "collate_fn=None, preprocess=None, transform=None, fill=None, keep=(), num_proc=None, "
        "seed=42, num_workers=0, pin_memory=None"
    ),
    "prepare_optimizer": (
        "model, name='adamw', *, lr=5e-05, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-08, "
        "fused='auto', param_groups=None"
    ),
    "prepare_scheduler": (
        "optimizer, name='linear', *, num_training_steps, num_warmup_steps=0, **kwargs"
    ),
    "prepare_strategy": "spec='auto', *, mixed_precision='no', compile=False, timeout='10 min'",
    "save_checkpoint": (
        "checkpoint_dir, state, *, metrics=None, keep=2, best_metric=None, strategy=None"
    ),
    "train_loop": (
        "model, train_dataloader, optimizer=None, lr_scheduler='linear', *, num_epochs=None, "
        "max_steps=None, max_time=None, num_warmup_steps=0, gradient_accumulation_steps=1, "
        "max_grad_norm=None, loss_fn=None, terms=None, step_fn=None, on_nonfinite='raise', "
        "strategy=None, "
        "extras=None, evaluate=None, evaluate_every='epoch', best_metric=None, patience=None, "
        "checkpoint_dir=None, checkpoint_every='epoch', keep_checkpoints=2, resume='auto', "
        "on_step=None, trackers=(), log_every=50, progress_bar=True, preflight=True"
    ),
    "train_steps": (
        "state, train_dataloader, *, num_epochs=None, max_steps=None, "
        "gradient_accumulation_steps=1, max_grad_norm=None, loss_fn=None, terms=None, "
        "step_fn=None, "
        "on_nonfinite='raise', strategy=None, preflight=True"
    ),
    "verify_resume": "train_fn, *, at",
    "windows": "loader, size, *, skip=0",
    "write_model_card": (
        "result, folder, *, license=None, language=None, dataset=None, base_model=None"
    ),
    "write_report": "result, path, predictions=None, *, rows=None",
}


# Of manualloop.tasks.
TASK_SIGNATURES: dict[str, str] = {
    "answer_windows": (
        "tokenizer, max_length=384, stride=128, *, pad=True, question='question', "
        "context='context', answers='answers'"
    ),
    "best_spans": (
        "predictions, kept, *, n_best=20, max_answer_length=30, null_threshold=None, "
        "id='id', context='context'"
    ),
    "boxes": (
        "processor=None, augment=None, *, column='image', objects='objects', box='bbox', "
        "label='category'"
    ),
    "chat": (
        "tokenizer, *, column='messages', max_length=None, trains=None, stop=None, "
        "**template_options"
    ),
    "check_isolation": "model",
    "complete": "tokenizer, prompt='prompt', completion='completion', *, max_length=None",
    "cut": "tokenizer, max_length, column='text'",
    "detected": "processor, *, threshold=0.0",
    "detection_terms": "outputs, batch, *, eos_coefficient=0.1",
    "distil": "teacher, *, temperature=1.0, alpha=0.5",
    "dpo": "beta=0.1, *, reference=None, kind='sigmoid'",
    "fill_in_middle": "tokenizer, rate=0.5, *, spm_rate=0.5, tokens=None, max_length=None",
    "flatten_choices": "tokenizer, first, second, *, label='label', max_length=None",
    "generated": "tokenizer, *, references=None, num_samples=3, **generate_options",
    "images": "augment=None, *, processor=None, column='image'",
    "images_and_masks": "augment=None, *, processor=None, column='image', mask=None",
    "lm_loss": "model, batch",
    "margins": "outputs, batch",
    "mask_tokens": "tokenizer, probability=0.15",
    "pack": "tokenizer, length, column='text'",
    "preference_pairs": (
        "tokenizer, *, prompt='prompt', chosen='chosen', rejected='rejected', "
        "max_length=None, stop=None, **template_options"
    ),
    "preferred": "predictions, references=None",
    "reference_logps": "model, rows, *, batch_size=8, path=None",
    "reward": "model, batch",
    "source_target": (
        "tokenizer, source, target, prefix='', max_length=128, max_target_length=None"
    ),
    "span_logits": "outputs, batch",
    "squad": (
        "dataset, *, n_best=20, max_answer_length=30, null_threshold=None, id='id', "
        "context='context', answers='answers'"
    ),
    "tag_words": (
        "tokenizer, words='tokens', tags='ner_tags', *, label_all=False, max_length=None, "
        "names=None"
    ),
    "upsampled": "outputs, batch",
}

# Of manualloop.tracking.
TRACKER_SIGNATURES = {
    "csv_file": "path",
    "mlflow": "experiment=None, *, name=None, tracking_uri=None, config=None, tags=None",
    "tensorboard": "directory, *, config=None",
    "trackio": "project, *, name=None, config=None, **options",
    "wandb": "project=None, *, name=None, config=None, **options",
}


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def nodes_at_run_time(tree):
    """Yield all nodes of a tree without those that only type checkers see."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        left += node.orelse if is_typing else ast.iter_child_nodes(node)


@cache
def imports_of(module):
    """List the modules that a module imports at run time, wherever in it that stands."""
    found = []
    for node in nodes_at_run_time(tree_of(module)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.append(node.module)
    return found


def row_of(room):
    return next(number for number, row in enumerate(ROWS) if room in row)


def package_imports_of(module):
    """The package's own modules that a module imports."""
    for imported in imports_of(module):
        if imported.startswith("manualloop."):
            yield imported.removeprefix("manualloop.")


def test_every_room_is_in_a_row():
    rooms = {module.split(".")[0] for module in MODULES}
    assert sorted(rooms) == sorted(room for row in ROWS for room in row)


def test_imports_point_down():
    up = [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in package_imports_of(module)
        if (other := imported.split(".")[0]) != (room := module.split(".")[0])
        and row_of(other) <= row_of(room)
    ]
    assert up == []


def test_no_package_has_a_circle_of_imports():
    graph = {module: set(package_imports_of(module)) & set(MODULES) for module in MODULES}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_packages_have_empty_init_files():
    found = {path.parent.name for path in PACKAGE.rglob("*/__init__.py") if path.read_text()}
    assert found == {"tasks", "tracking"}  # whose names are public


def test_dependencies_come_in_by_their_door():
    elsewhere = [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in imports_of(module)
        if module not in DOORS.get(imported.split(".")[0], MODULES)
    ]
    assert elsewhere == []


def test_public_names_are_frozen_sorted_and_documented():
    assert manualloop.__all__ == PUBLIC_NAMES == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert inspect.getdoc(getattr(manualloop, name)), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        manualloop.no_such_name  # noqa: B018


PACKAGES = [manualloop, manualloop.tasks, manualloop.tracking]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda it: it.__name__)
def test_type_checkers_see_the_public_names(package):
    source = ast.parse(Path(package.__file__).read_text())
    typed = {
        alias.asname: (node.module, alias.name)
        for block in source.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(typed) == package.__all__
    for name, (module, original) in typed.items():
        assert name == original
        assert module.removeprefix(f"{package.__name__}.") == package._HOME[name]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda it: it.__name__)
def test_completion_shows_the_public_names_alone(package):
    expected = sorted([*package.__all__, *(["__version__"] if package is manualloop else [])])
    assert dir(package) == expected
    jedi = pytest.importorskip("jedi")  # which completes in IPython and Jupyter
    completions = jedi.Interpreter("package.", [{"package": package}]).complete()
    shown = {completion.name for completion in completions}
    assert {name for name in shown if not name.startswith("__")} == set(package.__all__)


def test_every_public_method_and_property_has_a_docstring():
    without = []
    for kind in filter(inspect.isclass, (getattr(manualloop, name) for name in PUBLIC_NAMES)):
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not name.startswith("_") and inspect.isfunction(function):
                without += [] if inspect.getdoc(function) else [f"{kind.__name__}.{name}"]
    assert without == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name):
    assert signature_of(getattr(manualloop, name)) == f"({SIGNATURES[name]})"


def signature_of(function):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@pytest.mark.parametrize(
    ("package", "signatures"),
    [(manualloop.tasks, TASK_SIGNATURES), (manualloop.tracking, TRACKER_SIGNATURES)],
    ids=["tasks", "tracking"],
)
def test_functions_of_packages_are_frozen_sorted_and_documented(package, signatures):
    names = package.__all__
    assert names == sorted(names) == sorted(signatures)
    for name in names:
        function = getattr(package, name)
        assert signature_of(function) == f"({signatures[name]})", name
        for argument in inspect.signature(function).parameters:
            documented = re.search(rf"^ *\**{argument}: ", function.__doc__, re.MULTILINE)
            assert documented, f"{name}: {argument}"


def test_every_public_function_is_frozen():
    functions = {name for name in PUBLIC_NAMES if inspect.isfunction(getattr(manualloop, name))}
    assert functions == set(SIGNATURES)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_docstrings_name_every_argument(name):
    function = getattr(manualloop, name)
    documented = inspect.getdoc(function)
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^ *\**{argument}: ", documented, re.MULTILINE), argument


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return result.stdout.strip()


IMPORTS = """
import sys, threading

def loaded(*names):
    return sorted(set(names) & set(sys.modules))

large = ("transformers", "datasets", "evaluate", "accelerate", "sklearn", "scipy", "matplotlib",
         "torchmetrics")
import manualloop
print(loaded("torch"))
from manualloop import (evaluate_loop, launch, load_metric, prepare_dataloaders, prepare_strategy,
                        train_loop, train_steps)
print(loaded(*large))
import torch
print(torch.cuda.is_initialized(), threading.active_count())
metric = load_metric("glue/mrpc")
print(loaded(*large))
metric.compute(predictions=[1], references=[1])
print(loaded("evaluate"))
"""


@pytest.fixture(scope="module")
def after_imports():
    """What one new process finds after each of several imports."""
    return run_python(IMPORTS).splitlines()


def test_importing_the_package_loads_nothing(after_imports):
    assert after_imports[0] == "[]"


def test_importing_the_loop_loads_no_other_library_than_torch(after_imports):
    assert after_imports[1] == "[]"


def test_importing_the_loop_opens_no_device_and_no_connection(after_imports):
    assert after_imports[2] == "False 1"


def test_a_built_in_metric_loads_no_library_before_it_scores_and_never_evaluate(after_imports):
    assert after_imports[3:] == ["[]", "[]"]


def test_modules_stay_readable():
    lengths = {module: path.read_text().count("\n") for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 500} == {}
    long = {}
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if length > 60:
                    long[f"{module}.{node.name}"] = length
    assert long == {}


# Names with an underscore that are public: documented, and where.
PUBLIC_ALL_THE_SAME = {
    "_asdict": "NamedTuple's",
    "_exit": "os's",
    "_thread": "the module of this name is documented",
    "_fields": "NamedTuple's",
    "_replace": "NamedTuple's",
}
# Members that another object of the same class looks at.
OWN_MEMBERS = {"evaluation.metrics": {"_rows", "_num_rows", "_num_batches"}}


def private_names_of(module):
    """Yield the names with an underscore that a module takes from other objects and modules."""
    for node in ast.walk(tree_of(module)):
        names, owner = [], None
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            names, owner = [node.attr], ast.unparse(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [part for alias in node.names for part in f"{module}.{alias.name}".split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_NAME:
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        if owner not in ("self", "cls", "super()"):
            yield from (name for name in names if is_private(name))


BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name):
    is_dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not is_dunder and name not in PUBLIC_ALL_THE_SAME


def test_private_names_of_others_are_used_in_two_modules_alone():
    found = {
        module: names
        for module in MODULES.keys() - {"internals", "libraries"}
        if (names := set(private_names_of(module)) - OWN_MEMBERS.get(module, set()))
    }
    assert found == {}, "give each a function in internals.py or libraries.py"


def test_the_oldest_pins_are_the_lower_bounds():
    root = Path(__file__).parents[1]
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)", (root / "constraints-oldest.txt").read_text(), re.M)
    )
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (root / "pyproject.toml").read_text())
    runtime = [bound for bound in bounds if bound[0] in pins]
    assert {"torch", "transformers", "datasets", "accelerate", "numpy"} <= {
        name for name, _ in runtime
    }
    for name, bound in runtime:
        assert f"{pins[name]}.".startswith(f"{bound}."), f"{name}>={bound}, tested {pins[name]}"


def test_no_pickle():
    for module, path in MODULES.items():
        assert not re.search(r"\bpickle\b|torch\.load\b", path.read_text()), module
