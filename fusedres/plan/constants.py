"""Constants of the model of time that were measured on a GPU, kept in a file of the cache's folder.

`fusedres calibrate` writes it, and predictions for that GPU on this machine go by it. What can not be read is set
aside, said once, and done without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedres.cache import cache_folder, read_json, say_once, set_aside, slug

# Another number where the model of time gives its constants another meaning.
FORMAT = 1

# By name, as `plan.time` has them (of ``Assumptions``, or of ``Library`` after ``library.``): what is plausible.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "rows": (0.3, 1.0),
    "contractions": (0.3, 1.0),
    "tensor_cores": (0.3, 1.0),
    "synchronous": (0.2, 1.0),
    "l2": (0.25, 4.0),
    "issue": (0.3, 1.0),
    "start": (50.0, 5000.0),
    "latency": (150.0, 3000.0),
    "gap": (2e-7, 2e-5),
    "library.products": (0.1, 1.0),
    "library.bandwidth": (0.2, 1.0),
    "library.weight_gradient": (0.2, 1.5),
    "library.rows": (0.2, 1.0),
    "library.statistics": (0.2, 1.0),
}


class NotConstants(ValueError):
    """A file that holds no constants, or none of this format."""


@dataclass(frozen=True)
class Constants:
    """What was measured of a GPU.

    Attributes:
        gpu, multiprocessors: its own.
        values: those constants that the measurements determine, by name.
        date: ISO 8601.
        made_with: versions by name.
        launches: how many were measured.
    """

    gpu: str
    multiprocessors: int
    values: Mapping[str, float]
    date: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)
    launches: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "fusedres constants": FORMAT,
            "gpu": {"name": self.gpu, "multiprocessors": self.multiprocessors},
            "constants": dict(self.values),
            "date": self.date,
            "made_with": dict(self.made_with),
            "launches": self.launches,
        }

    @classmethod
    def of_json(cls, read: Any) -> Constants:
        """The opposite of `as_json`.

        Raises:
            NotConstants: it is none, or a constant is unknown or not plausible.
        """
        if not isinstance(read, dict) or "fusedres constants" not in read:
            raise NotConstants('expected a JSON object with "fusedres constants"')
        if read["fusedres constants"] != FORMAT:
            raise NotConstants(f"expected format {FORMAT}, got {read['fusedres constants']!r}")
        try:
            gpu = read["gpu"]
            values = {str(name): float(value) for name, value in read["constants"].items()}
            made_with = {str(name): str(value) for name, value in read["made_with"].items()}
            own = cls(
                str(gpu["name"]), int(gpu["multiprocessors"]), values, str(read["date"]), made_with,
                int(read["launches"]),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotConstants(f"{type(error).__name__}: {error}") from error
        for name, value in values.items():
            if name not in BOUNDS:
                raise NotConstants(f"{name} is no constant of the model")
            least, most = BOUNDS[name]
            if not least <= value <= most or not math.isfinite(value):
                raise NotConstants(f"{name}: expected {least:g} to {most:g}, got {value:g}")
        return own


def folder() -> Path:
    """Where files of constants are."""
    return cache_folder() / "constants"


def path_for(gpu: str, multiprocessors: int) -> Path:
    """Of the constants of a GPU, by its name."""
    return folder() / f"{slug(gpu)}-{multiprocessors}.json"


def read(path: Path) -> Constants:
    """The constants in a file.

    Raises:
        NotConstants: it holds none.
        OSError: it can not be read.
    """
    try:
        told = read_json(path)
    except ValueError as error:
        raise NotConstants(str(error)) from error
    return Constants.of_json(told)


def measured_for(gpu: str, multiprocessors: int) -> Mapping[str, float]:
    """What this user has had measured of a GPU; empty where that is nothing."""
    path = path_for(gpu, multiprocessors)
    try:
        found = read(path)
    except FileNotFoundError:
        return {}
    except NotConstants as error:
        say_once(f"the constants {path} are not used ({error}), and the file was {set_aside(path)}")
        return {}
    except OSError as error:
        say_once(f"the constants {path} can not be read ({error.strerror}) and are not used")
        return {}
    if (found.gpu, found.multiprocessors) != (gpu, multiprocessors):
        say_once(f"the constants {path} are not used: they are of {found.gpu} with {found.multiprocessors}, and this "
                 f"is {gpu} with {multiprocessors} multiprocessors")  # fmt: skip
        return {}
    return found.values
