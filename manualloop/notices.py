"""What the library tells the user once, as log records of the logger "manualloop".

They are part of the result ("using sentence1, sentence2 -> labels"), so they are shown unless the
program has set up logging itself: then they go where it sends INFO records.
``logging.getLogger("manualloop").setLevel("WARNING")`` silences them.
"""

import logging

logger = logging.getLogger("manualloop")


def say(message: str) -> None:
    """Show a line to the user."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.info(message)
