"""``fusedres compile``: for models that are named, or for a report."""

from __future__ import annotations

import argparse
from typing import Any

from fusedres.commands.model_names import say_whose
from fusedres.explain import compile_models, compile_report

# What goes with models that are named, and what with the report.
OF_MODELS, OF_REPORT = (
    ("target", "out", "batch", "px", "dtype", "infer", "tune"),
    ("report", "every_tile", "targets", "models", "dtypes", "csv", "known"),
)


def run(options: argparse.Namespace) -> int:
    """Compile; ValueError for what was asked wrongly, before that."""
    _refuse(options, *((OF_REPORT, "without") if options.model else (OF_MODELS, "with")))
    if options.model:
        say_whose(options.model)
        given = _given(options, (*OF_MODELS, "jobs"))
        return compile_models.run(compile_models.Ahead(tuple(dict.fromkeys(options.model)), **given))
    given = _given(options, ("targets", "models", "dtypes", "jobs", "csv", "known"))
    say_whose(options.models or ())
    return compile_report.run(compile_report.CompileOptions(options.report, options.every_tile, **given))


def _given(options: argparse.Namespace, wanted: tuple[str, ...]) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in wanted}
    return {name: value for name, value in chosen.items() if value is not None}


def _refuse(options: argparse.Namespace, others: tuple[str, ...], how: str) -> None:
    """Options of the other kind of run."""
    for name in others:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')}: expected {how} MODEL")
