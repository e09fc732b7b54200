"""Folders of binaries that were compiled elsewhere: how they are written, and how a run finds them.

A folder is laid out as Triton's cache, with ``manifest.json`` beside it that says what it holds and what made it. Those
in the folder ``binaries`` of fusedres's cache (and that folder itself) are looked into where Triton's own cache has no
binary; nothing is copied, and they may be read-only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fusedres.cache import cache_folder
from fusedres.compiler.targets import triton

FORMAT = 1
NAME = "manifest.json"


class NotBinaries(ValueError):
    """A folder whose manifest is none, or none of this format."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        made_with: versions by name, and of the kernels a digest of their source.
        targets: how many binaries of each.
        models: whose.
    """

    made_with: dict[str, str]
    targets: dict[str, int]
    models: tuple[str, ...]

    def why_not(self, target: str) -> str | None:
        """Why a run on a target finds nothing in it, or None."""
        if target not in self.targets:
            return f"they were compiled for {', '.join(self.targets)}, and this is {target}"
        now = made_with()
        differing = [f"{name} {self.made_with.get(name)}, here {now[name]}" for name in now if self.differs(name)]
        return f"they were made with {', '.join(differing)}" if differing else None

    def differs(self, name: str) -> bool:
        return self.made_with.get(name) != made_with()[name]


@functools.cache
def made_with() -> dict[str, str]:
    """What binaries depend on besides their target: Triton's cache tells them apart by as much."""
    try:
        own = version("fusedres")
    except PackageNotFoundError:  # a source tree that was never installed
        own = "0+unknown"
    sources = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {"fusedres": own, "triton": str(getattr(triton, "__version__", None)), "kernels": digest}


def read(folder: Path) -> Manifest | None:
    """What a folder says of itself; None: it says nothing.

    Raises:
        NotBinaries: it can not be understood.
    """
    try:
        told = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if told["fusedres binaries"] != FORMAT:
            raise NotBinaries(f"expected format {FORMAT}, got {told['fusedres binaries']!r}")
        targets = {str(name): int(count) for name, count in told["targets"].items()}
        return Manifest({**told["made_with"]}, targets, tuple(map(str, told["models"])))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotBinaries:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotBinaries(f"{type(error).__name__}: {error}") from error


def check(folder: Path) -> None:
    """Refuse a folder for binaries that holds something else, or those of another version.

    Raises:
        ValueError: naming the argument.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    try:
        found = read(folder)
    except NotBinaries as error:
        raise ValueError(f"out: expected a folder for binaries, got {folder}, whose {NAME} is none: {error}") from error
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, or one that fusedres compile made, got {folder}")
    why = None if found is None else found.why_not(next(iter(found.targets), ""))
    if why is not None:
        raise ValueError(f"out: expected a folder of these versions, got {folder}: {why}")


def write(folder: Path, target: str, models: Iterable[str], binaries: int) -> Manifest:
    """Write down that a folder holds ``binaries`` of a target now, besides what it held of others."""
    found = read(folder)
    targets, before = ({}, ()) if found is None else (found.targets, found.models)
    told = Manifest(made_with(), {**targets, target: binaries}, tuple(dict.fromkeys([*before, *models])))
    what = {"fusedres binaries": FORMAT, "made_with": told.made_with, "targets": told.targets, "models": told.models}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / NAME)
    return told


def held(folder: Path, target: str) -> int:
    """How many binaries of a target a folder has in fact."""
    backend, arch = ("hip", target) if target.startswith("gfx") else ("cuda", int(target.removeprefix("sm_")))
    count = 0
    for path in folder.glob("*/*.json"):
        if path.name.startswith("__grp__"):
            continue
        try:
            gpu = json.loads(path.read_text())["target"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        count += isinstance(gpu, dict) and (gpu.get("backend"), gpu.get("arch")) == (backend, arch)
    return count


def folder() -> Path:
    """Where folders of binaries are found without being named."""
    return cache_folder() / "binaries"


def found_for(target: str) -> list[Path]:
    """The folders with binaries for a target, of these versions. Of the others it is said once why not."""
    try:
        inner = sorted(path for path in folder().iterdir() if path.is_dir())
    except OSError:
        return []
    fitting, others = [], []
    for path in (folder(), *inner):
        try:
            manifest = read(path)
        except NotBinaries as error:
            others.append(f"the binaries in {path} are not used: its {NAME} can not be read ({error})")
            continue
        why = None if manifest is None else manifest.why_not(target)
        if manifest is not None and why is None:
            fitting.append(path)
        elif why is not None:
            others.append(f"the binaries in {path} are not used: {why}")
    for words in others:
        _say_once(words)
    return fitting


_said: set[str] = set()


def _say_once(words: str) -> None:
    if words not in _said:
        _said.add(words)
        warnings.warn(f"fusedres: {words}", stacklevel=2)


_used: dict[Path, None] = {}


def use_for(target: str) -> None:
    """Let Triton find what the folders for a target hold, from now on in this process.

    Triton's cache, wherever the program has it, comes first and takes what is compiled anew. A cache manager of the
    program's own stays in force, and is asked first.
    """
    fresh = [path for path in found_for(target) if path not in _used]
    if not fresh:
        return
    _used.update(dict.fromkeys(fresh))
    from triton.runtime.cache import FileCacheManager

    base: Any = triton.knobs.cache.manager_class or FileCacheManager
    if not hasattr(base, "looks_into_folders"):
        triton.knobs.cache.manager_class = _looking(base)


def _looking(base: Any) -> Any:
    """A cache manager like ``base`` that looks into the folders, too."""

    class Looking(base):
        looks_into_folders = True

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override=override, dump=dump)
            self._key_in_folders = None if override or dump else key

        def get_group(self, filename: str) -> dict[str, str] | None:
            found: dict[str, str] | None = super().get_group(filename)
            if found is not None or self._key_in_folders is None:
                return found
            return next(_groups(self._key_in_folders, filename), None)

        def get_file(self, filename: str) -> str | None:
            found: str | None = super().get_file(filename)
            if found is not None or self._key_in_folders is None:
                return found
            files = (path / self._key_in_folders / filename for path in _used)
            return next((str(file) for file in files if file.exists()), None)

    return Looking


def _groups(key: str, filename: str) -> Iterator[dict[str, str]]:
    """The files of a binary by name. In a group they stand with their paths of where they were made."""
    for path in _used:
        try:
            names = json.loads((path / key / f"__grp__{filename}").read_text())["child_paths"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        files = {name: path / key / name for name in names}
        if files and all(file.exists() for file in files.values()):
            yield {name: str(file) for name, file in files.items()}
