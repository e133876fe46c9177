"""Libraries for metrics that a plain installation does not have."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from manualloop.errors import MetricError


def load_extra(module: str, metric: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MetricError: It is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0].replace("_", "-")
        raise MetricError(
            f"The metric {metric!r} needs {library}, which cannot be imported ({error}). Install "
            'it: pip install "manualloop[metrics]".'
        ) from error
