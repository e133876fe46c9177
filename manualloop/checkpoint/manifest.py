"""The manifests of checkpoints: what each holds, whether it is whole, and which one to use.

``manifest.json`` lists the files of a folder ``step-00000500`` with size and sha256. It is written
last, and guards itself, too: its own sha256 is in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from manualloop.checkpoint.files import MAX_JSON_BYTES, parse_json, read_regular, verify_folder
from manualloop.checkpoint.nested import from_json
from manualloop.checkpoint.schema import MANIFEST as FIELDS
from manualloop.checkpoint.trainers import refuse_trainers
from manualloop.errors import CheckpointError
from manualloop.notices import warn

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?")
"""Names of checkpoints: the step and, if there are several of it, a number."""

_MAX_DIRECTORIES = 8

# A save decides by the manifests of all checkpoints. One that was read is not read again as long as
# its file is the same: changed, replaced or moved, it has another identity.
_Identity = tuple[int, ...]
_known: dict[str, dict[_Identity, dict[str, Any]]] = {}


class Found(NamedTuple):
    """A folder in a directory of checkpoints.

    Attributes:
        path: The folder.
        manifest: The manifest's content; None if the checkpoint cannot be used.
        problem: Why it cannot be used.
    """

    path: Path
    manifest: dict[str, Any] | None
    problem: str = ""


def find_folders(directory: Path) -> list[Found]:
    """List the checkpoints, newest first: by the step in the manifest, and no clock."""
    key = os.path.abspath(directory)
    known, seen = _known.pop(key, {}), {}
    found = []
    with suppress(FileNotFoundError):
        for name in map(NAME.fullmatch, _names_in(directory)):
            if name is None or not (path := directory / name[0]).is_dir():
                continue
            number = int(name[2] or 0)
            try:
                _require_own(path)
                identity = _identity(os.lstat(path / MANIFEST))
                manifest = known.get(identity)
                if manifest is None:
                    identity, manifest = _read(path)
                seen[identity] = manifest
                found.append((int(manifest["step"]), number, Found(path, manifest)))
            except (CheckpointError, OSError) as error:
                found.append((int(name[1]), number, Found(path, None, _problem(error))))
    _known[key] = seen
    while len(_known) > _MAX_DIRECTORIES:
        del _known[next(iter(_known))]
    return [entry for _, _, entry in sorted(found, key=lambda f: f[:2], reverse=True)]


def _identity(status: os.stat_result) -> _Identity:
    place = status.st_dev, status.st_ino, status.st_mode
    return *place, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


def _require_own(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError("it is a link, and nothing outside the folder is read")


def _problem(error: OSError) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"no {MANIFEST}"
    return f"{MANIFEST} cannot be read: {error}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises:
        CheckpointError: It is missing or damaged, of a newer format, or names files elsewhere.
    """
    try:
        return _read(folder)[1]
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(_problem(error)) from error


def _read(folder: Path) -> tuple[_Identity, dict[str, Any]]:
    data, status = read_regular(folder / MANIFEST, MAX_JSON_BYTES)
    try:
        manifest = parse_json(data)
        is_whole = isinstance(manifest, dict) and manifest_bytes(manifest) == data
        if is_whole and "metrics" in manifest:
            manifest["metrics"] = from_json(manifest["metrics"])
    except (ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{MANIFEST} is damaged")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"format {manifest.get('format')!r} is not {FORMAT}: another version of manualloop "
            "wrote it"
        )
    try:
        FIELDS(manifest, "")
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST} is not one of ours: {error}") from None
    for name in manifest["files"]:
        if not _is_name(name):
            raise CheckpointError(f"the manifest names {name!r}, which is not a file of the folder")
    return _identity(status), manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the file of a manifest, with the sha256 of the rest of it at its end."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1, allow_nan=False) + "\n").encode()


def _is_name(name: str) -> bool:
    is_base = name == os.path.basename(name) and "\\" not in name
    return is_base and name.isprintable() and name not in ("", ".", "..", MANIFEST)


def list_names(entries: Iterable[Found]) -> Iterator[str]:
    """Name folders with what is wrong with each: "step-00000007 (no manifest.json)"."""
    for entry in entries:
        yield f"{entry.path.name} ({entry.problem or 'whole'})"


def find(directory: Path, which: str | os.PathLike[str], *, verify: bool) -> Found:
    """Return the checkpoint that ``load_checkpoint`` is asked for.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if which == "last":
        found = find_last(directory, verify=verify)
        if found is None:
            raise CheckpointError(f"There is no checkpoint in {directory}.")
        return found
    if which == "best":
        found = find_best(find_folders(directory))
        if found is None:
            raise CheckpointError(
                f"No checkpoint in {directory} was saved with a best_metric. Save them with "
                'save_checkpoint(..., metrics=scores, best_metric="f1"), or load which="last".'
            )
    else:
        path = Path(which)
        if not path.is_dir():
            path = directory / which
            with naming(path):
                _require_own(path)
        refuse_trainers(path)
        with naming(path):
            found = Found(path, read_manifest(path))
    with naming(found.path):
        verify_folder(found.path, found.manifest or {}, hashes=verify)
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a checkpoint in the errors of a block."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error.__cause__


def find_last(directory: Path, *, verify: bool = True) -> Found | None:
    """Return the newest checkpoint that is whole; None if there is no checkpoint.

    Raises:
        CheckpointError: There are some, and each is damaged; or transformers' ``Trainer`` has
            written them.
    """
    damaged: list[Found] = []
    for entry in find_folders(directory):
        try:
            if entry.manifest is None:
                raise CheckpointError(entry.problem)
            verify_folder(entry.path, entry.manifest, hashes=verify)
        except CheckpointError as error:
            damaged.append(Found(entry.path, None, str(error)))
            continue
        if damaged:
            warn(f"skipped {', '.join(list_names(damaged))}: resuming from {entry.path.name}.")
        return entry
    if damaged:
        raise CheckpointError(
            f"No checkpoint in {directory} is whole: {', '.join(list_names(damaged))}. To begin "
            "anew, remove them or use another checkpoint_dir."
        )
    refuse_trainers(directory)
    return None


def find_best(entries: list[Found]) -> Found | None:
    """Return the checkpoint with the best metrics, by the ``best_metric`` of the newest.

    Args:
        entries: What ``find_folders`` returned.

    Returns:
        Of equals the oldest; None if no checkpoint was saved with a ``best_metric``.
    """
    usable = [(entry, entry.manifest) for entry in entries if entry.manifest is not None]
    best_metric = next((m["best_metric"] for _, m in usable if m["best_metric"]), None)
    if best_metric is None:
        return None
    scored = [
        (entry, score(metrics, best_metric))
        for entry, manifest in reversed(usable)  # oldest first: max takes the first of equals
        if isinstance((metrics := manifest["metrics"]).get(metric_name(best_metric)), int | float)
    ]
    return max(scored, key=lambda one: one[1])[0] if scored else None


def score(metrics: Mapping[str, Any], best_metric: str) -> float:
    """Return how good metrics are: the higher, the better; NaN is the worst.

    Args:
        metrics: Values by name.
        best_metric: Name of the one that counts; see ``is_lower_better``.

    >>> score({"loss": 0.5}, "loss"), score({"loss": float("nan")}, "loss")
    (-0.5, -inf)
    """
    value = metrics[metric_name(best_metric)]
    value = -value if is_lower_better(best_metric) else value
    return -math.inf if math.isnan(value) else value


def metric_name(best_metric: str) -> str:
    """Return the name in a ``best_metric``, which may begin with a sign."""
    return best_metric[1:] if has_sign(best_metric) else best_metric


def has_sign(best_metric: str) -> bool:
    """Tell whether a ``best_metric`` begins with the sign that decides: "-" if lower is better."""
    return best_metric.startswith(("-", "+"))


def is_lower_better(best_metric: str) -> bool:
    """Tell whether the lowest value is the best one: by the sign, else if it is a loss or an error.

    The ends of an interval, ``loss_low`` and ``loss_high``, are as the score itself.

    >>> [is_lower_better(name) for name in ("f1", "-f1", "loss", "+loss", "mismatched_mse")]
    [False, True, True, False, True]
    >>> [is_lower_better(name) for name in ("accuracy_low", "loss_high")]
    [False, True]
    """
    if has_sign(best_metric):
        return best_metric.startswith("-")
    is_negated = best_metric.startswith("neg_")  # as scikit-learn names what it turns around
    return _LOWER.fullmatch(best_metric.lower()) is not None and not is_negated


def is_known(name: str) -> bool:
    """Tell whether everybody knows which value of a metric is the best.

    >>> [is_known(name) for name in ("val_loss", "f1_macro", "eval_accuracy", "gap")]
    [True, True, True, False]
    """
    return any(kind.fullmatch(name.lower()) is not None for kind in (_LOWER, _HIGHER))


_LOWER = re.compile(
    r"(.*[_/])?(loss|nll|cross_entropy|perplexity|ppl|error|error_rate|edit_rate|mse|mae|rmse|rmsle|"
    r"mape|smape|wer|cer|ter|eer|ece|brier|brier_score|deviance|distance|divergence)(_low|_high)?",
    re.DOTALL,
)
_HIGHER = re.compile(
    r"(.*[_/])?(accuracy|f1|precision|recall|roc_auc|auc|matthews_correlation|pearson|spearmanr|"
    r"exact_match|bleu|chrf|rouge\w+|mean_iou|map)([_/](none|macro|micro|weighted|samples))?"
    r"(_low|_high)?",
    re.DOTALL,
)
