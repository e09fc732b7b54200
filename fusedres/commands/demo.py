"""``fusedres demo``."""

from __future__ import annotations

import argparse

from fusedres.train import demo


def run(options: argparse.Namespace) -> int:
    """Train and compare; ValueError for what was asked wrongly, before that."""
    given = {name: getattr(options, name) for name in demo.DemoOptions.__dataclass_fields__}
    return demo.run(demo.DemoOptions(**given))
