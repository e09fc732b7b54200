"""``fusedres train``."""

from __future__ import annotations

import argparse
import os

from fusedres.commands.model_names import say_whose
from fusedres.train import run as training


def run(options: argparse.Namespace) -> int:
    """Train or test; ValueError for what was asked wrongly, before that."""
    if os.environ.get("RANK", "0") == "0":
        say_whose([options.model])
    given = {name: getattr(options, name) for name in training.TrainOptions.__dataclass_fields__}
    return training.run(training.TrainOptions(**given | {name: tuple(given[name]) for name in ("option", "weights")}))
