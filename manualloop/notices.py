"""Messages to the user, as records of the logger "manualloop".

Messages such as "using sentence1, sentence2 -> labels" are part of a result, so they are shown by
default: on stdout, where they stand between the lines that the program prints, and where notebooks
do not draw them in red. If the program has set up logging itself, they go where it sends INFO
records. ``logging.getLogger("manualloop").setLevel("WARNING")`` silences them.
"""

import logging
import os

from manualloop import screen

logger = logging.getLogger("manualloop")


class _OnScreen(logging.Handler):
    """Writes records to the stdout of the moment, above a bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        screen.write(self.format(record))


def say(message: str, *, from_every_rank: bool = False) -> None:
    """Show a line to the user.

    Args:
        message: The line.
        from_every_rank: Whether every rank shows the line, with its rank. By default only rank 0
            of the processes that a launcher started does.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if not from_every_rank:
            return
        message = f"rank {rank}: {message}"
    _log(logging.INFO, message)


def warn(message: str) -> None:
    """Show a line about what is probably a mistake, from every rank."""
    _log(logging.WARNING, message)


def _log(level: int, message: str) -> None:
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = _OnScreen()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.log(level, message)
