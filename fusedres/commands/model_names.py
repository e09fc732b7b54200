"""What the commands say of models by name, all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from fusedres.models.sources import namesake


def say_whose(names: Iterable[str]) -> None:
    """Say on standard error, of each name that both fusedres and torchvision have a model of, whose it is."""
    for name in names:
        said = namesake(name)
        if said is not None:
            print(said, file=sys.stderr)
