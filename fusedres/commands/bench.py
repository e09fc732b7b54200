"""``fusedres bench``."""

from __future__ import annotations

import argparse

from fusedres.bench import session, versus
from fusedres.commands.model_names import say_whose
from fusedres.commands.progress import progress


def run(options: argparse.Namespace) -> int:
    """Measure; ValueError for what was asked wrongly, before anything runs."""
    given = {name: getattr(options, name) for name in session.BenchOptions.__dataclass_fields__}
    say_whose(options.model)
    asked = session.BenchOptions(**given)
    if options.compare is None:
        return session.run(asked, progress)
    with progress() as tell:
        return versus.run(asked, options.compare, tell)
