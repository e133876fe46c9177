"""What the library tells the user once, as log records of the logger "manualloop".

They are part of the result ("using sentence1, sentence2 -> labels"), so they are shown unless the
program has set up logging itself: then they go where it sends INFO records.
``logging.getLogger("manualloop").setLevel("WARNING")`` silences them.
"""

import logging
import os

logger = logging.getLogger("manualloop")


def say(message: str, *, from_every_rank: bool = False) -> None:
    """Show a line to the user.

    Args:
        message: The line.
        from_every_rank: Of several processes that a launcher has started, only that of rank 0
            speaks, unless the line is about this one.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if not from_every_rank:
            return
        message = f"rank {rank}: {message}"
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.info(message)
