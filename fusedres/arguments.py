"""Arguments of commands: files that are written at the end, packages that are needed then."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def check_file(path: Path | None, name: str, suffix: str) -> None:
    """Refuse a file that could not be written at the end of a long run; an existing one stays as it is.

    Args:
        path: of the file, or None if none is to be written.
        name: of the option.
        suffix: the file's, such as ``".png"``.

    Raises:
        ValueError: naming the option.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise ValueError(f"{name} must name a {suffix} file, got {path}")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{name} must name a file that can be written, got {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def check_packages(*names: str, extra: str = "cli") -> None:
    """Refuse to begin without packages that are needed at the end.

    Raises:
        ImportError: saying which extra to install.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install fusedres[{extra}]")
