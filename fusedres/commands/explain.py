"""``fusedres explain``: what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from fusedres.arguments import check_file, check_packages
from fusedres.commands.model_names import say_whose
from fusedres.explain.explanation import Question, explain
from fusedres.explain.table import tables

ALL = "all"


def run(options: argparse.Namespace) -> int:
    """Explain, print, draw; ValueError for what was asked wrongly, before anything is printed."""
    out: Path | None = options.plot
    check_file(out, "plot", ".png")
    if out is not None:
        check_packages("matplotlib")
    rungs = () if options.rung == ALL else tuple(dict.fromkeys(options.rung.split(",")))
    asked = options.model, options.batch, options.dtype, options.gpu, rungs
    found = explain(Question(*asked, infer=options.infer, size=options.size, cast=options.cast))
    say_whose([options.model])
    if out is not None:
        from fusedres.explain.picture import draw

        draw(out, found)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(tables(found))
    if out is not None:
        console.print(f"picture: {out.resolve()}", soft_wrap=True)
    return 0
