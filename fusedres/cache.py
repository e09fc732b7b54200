"""The folder in which what was made once is kept from one process to the next, and how files get there."""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``FUSEDRES_CACHE``, or ``fusedres`` in the user's cache folder; it need not exist."""
    root = os.environ.get("FUSEDRES_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fusedres"


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ValueError: it is none.
        OSError: it can not be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no JSON: {error}") from error


def write_json(what: Any, path: Path) -> bool:
    """Write JSON, whole or not at all; False, said once, where the disk does not take it."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of this thread alone, and as readable as other files of the user's.
        temporary = str(path.with_name(f"{path.stem}-{os.getpid()}-{threading.get_ident()}.tmp"))
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(what, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        say_once(f"{path} can not be written ({error.strerror}): what was found is kept in memory only")
        return False
    return True


def set_aside(path: Path) -> str:
    """Rename a file that is of no use; what became of it, in words."""
    aside = path.with_name(f"{path.name}.bad")
    try:
        path.replace(aside)
    except OSError:
        return "left alone"
    return f"set aside as {aside.name}"


_said: set[str] = set()


def say_once(words: str) -> None:
    """A warning, once in a process."""
    if words not in _said:
        _said.add(words)
        warnings.warn(f"fusedres: {words}", stacklevel=2)
