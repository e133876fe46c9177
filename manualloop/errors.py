"""The errors of this package. Each class also derives from the built-in error that fits.

A message says what happened and where (split, batch, row, rank), and ends with the line that fixes
it.
"""


class ManualLoopError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ManualLoopError, ValueError):
    """The arguments of a call do not fit together."""


class DataError(ManualLoopError, ValueError):
    """The data cannot be trained or evaluated on as it is."""


class ModelError(ManualLoopError, ValueError):
    """The model cannot be trained as it is, or does not fit the data."""


class MetricError(ManualLoopError, ValueError):
    """A metric is unknown, or cannot score the predictions."""


class NonFiniteError(ManualLoopError, ArithmeticError):
    """The loss or the gradient norm is NaN or infinite."""


class DistributedError(ManualLoopError, RuntimeError):
    """The processes of a run do not fit together, or one of them is gone."""


class CheckpointError(ManualLoopError, OSError):
    """A checkpoint cannot be written, or cannot be used: missing, damaged, or of another run."""
