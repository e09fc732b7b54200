"""``fusedres bench``."""

from __future__ import annotations

import argparse

from fusedres.bench import session
from fusedres.commands.model_names import say_whose


def run(options: argparse.Namespace) -> int:
    """Measure; ValueError for what was asked wrongly, before anything runs."""
    given = {name: getattr(options, name) for name in session.BenchOptions.__dataclass_fields__}
    say_whose(options.model)
    return session.run(session.BenchOptions(**given))
