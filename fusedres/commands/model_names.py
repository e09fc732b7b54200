"""What the commands say of models by name, all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable

# What `models.sources.source` takes.
RULE = (
    "NAME (fusedres's own, else torchvision's), torchvision.NAME of any task, timm.NAME, hf.TYPE (of transformers), "
    "path.py:function or path.py:Class"
)


def say_whose(names: Iterable[str]) -> None:
    """Say on standard error, of each name that both fusedres and torchvision have a model of, whose it is."""
    from fusedres.models.sources import namesake

    for name in names:
        said = namesake(name)
        if said is not None:
            print(said, file=sys.stderr)
