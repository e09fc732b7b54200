"""``fusedres explain``: what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fusedres.arguments import check_file, check_packages
from fusedres.commands.model_names import say_whose
from fusedres.commands.progress import progress
from fusedres.explain.explanation import Explanation, Question, explain
from fusedres.explain.table import tables
from fusedres.models.sources import source

ALL = "all"


def run(options: argparse.Namespace) -> int:
    """Explain, print, draw; ValueError for what was asked wrongly, before anything is printed."""
    out: Path | None = options.plot
    check_file(out, "plot", ".png")
    if out is not None:
        check_packages("matplotlib")
    if options.model is None:
        raise ValueError("model: expected one to explain, such as resnet50")
    found, cast = _explained(options)
    say_whose([options.model])
    if out is not None:
        from fusedres.explain.picture import draw

        draw(out, found)
    if options.json:
        told = found.as_json()
        print(json.dumps(told if cast is None else {**told, "served_cast": cast.as_json()}, indent=2))
        return 0
    console = Console(highlight=False)
    console.print(tables(found, options.by, cast))
    if not options.by:
        console.print("More: --by layer, --by kernel, --by kind; --json has all of it.", soft_wrap=True)
    if out is not None:
        console.print(f"picture: {out.resolve()}", soft_wrap=True)
    return 0


def _explained(options: argparse.Namespace) -> tuple[Explanation, Explanation | None]:
    """What was asked, and of an inference by autocast the same of a model that has the dtype itself."""
    rungs = () if options.rung == ALL else tuple(dict.fromkeys(options.rung.split(",")))
    size = options.size
    if options.px is not None:
        if size is not None:
            raise ValueError("px: expected instead of --size, not together with it")
        size = (source(options.model).of_images().size[0], options.px, options.px)
    asked = options.model, options.batch, options.dtype, options.gpu, rungs
    question = Question(*asked, infer=options.infer, size=size, cast=options.cast)
    with progress(lines=0) as tell:
        found = explain(question, tell=tell)
        if not question.infer or question.cast or question.dtype == "fp32":
            return found, None
        answered = list(found.rungs)[-1:]
        return found, explain(replace(question, cast=True, rungs=tuple(answered)), tell=tell)
