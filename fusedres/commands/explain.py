"""``fusedres explain``: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusedres.arguments import check_file, check_packages
from fusedres.commands.model_names import RULE, say_whose

ALL = "all"


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "explain",
        help="bytes, launches and roofline of a model's step, eager and on every rung, without a GPU",
        description="Counts a training step (or inference) on paper: nothing is computed, and no GPU is needed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=RULE)
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp16 (by autocast), or fp32")
    parser.add_argument("--gpu", default="h100", help="whose roofline is meant, and whose tiles are launched")
    parser.add_argument("--rung", default=ALL, help="all, a schedule, or several with commas between them")
    parser.add_argument("--size", type=_size, metavar="CxHxW", help="of an image (default: what the model is made for)")
    parser.add_argument("--infer", action="store_true", help="inference in place of a training step")
    parser.add_argument(
        "--cast", action="store_true", help="inference of a model that has the dtype itself, in place of autocast"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw a picture")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explain, print, draw; ValueError for what was asked wrongly, before anything is printed."""
    out: Path | None = options.out
    check_file(out, "out", ".png")
    if out is not None:
        check_packages("matplotlib")
    # Imported here, since they need the packages of the extra [cli].
    from rich.console import Console

    from fusedres.explain.explanation import Question, explain
    from fusedres.explain.table import tables

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


def _size(text: str) -> tuple[int, int, int]:
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected CxHxW, such as 3x224x224, got {text!r}")
    return numbers[0], numbers[1], numbers[2]
