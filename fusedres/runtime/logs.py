"""The logger ``fusedres``: what is decided, told to whoever listens; ``FUSEDRES_LOG=info`` prints it."""

import logging
import os
import warnings

__all__ = ["LEVELS", "set_up"]

LEVELS = ("debug", "info", "warning", "error")


def set_up(level: str | None = None) -> None:
    """Print what is logged from ``level`` on to standard error; without a level nothing that nobody listens to.

    Args:
        level: one of `LEVELS`, or empty; what ``FUSEDRES_LOG`` says if None. Of others a warning is given.
    """
    logger = logging.getLogger("fusedres")
    for handler in list(logger.handlers):
        if handler.get_name() == __name__:
            logger.removeHandler(handler)
    level = (os.environ.get("FUSEDRES_LOG", "") if level is None else level).lower()
    # A library that has no handler at all would have its warnings printed by Python.
    handler = logging.StreamHandler() if level in LEVELS else logging.NullHandler()
    handler.set_name(__name__)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    if level in LEVELS:
        logger.setLevel(level.upper())
    elif level:
        warnings.warn(f"FUSEDRES_LOG: expected one of {', '.join(LEVELS)}, got {level!r}", stacklevel=2)
