"""``fusedres demo``."""

from __future__ import annotations

import argparse

from fusedres.explain.explanation import Question, explain
from fusedres.explain.table import sentence
from fusedres.patterns.choose import AUTO
from fusedres.train import demo
from fusedres.train.twins import Predicted


def run(options: argparse.Namespace) -> int:
    """Train and compare; ValueError for what was asked wrongly, before that."""
    given = {name: getattr(options, name) for name in demo.DemoOptions.__dataclass_fields__}
    return demo.run(demo.DemoOptions(**given), predicted if options.resnet50 else None)


def predicted() -> Predicted:
    """ResNet-50's training step on an H100, on paper."""
    found = explain(Question("resnet50", rungs=(AUTO,)))
    figures = {"plain": found.figures(found.eager), "fused": found.figures(found.rungs[AUTO])}
    return Predicted(sentence(found), found.gpu.name, {name: one.predicted_ms for name, one in figures.items()})
