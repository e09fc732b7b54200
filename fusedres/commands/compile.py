"""``fusedres compile``: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import names, positive
from fusedres.commands.model_names import RULE, say_whose


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "compile",
        help="compile the kernels that models launch, for GPUs that need not be here, and report on the binaries",
        description="Records the kernels that training and inference of the models launch, on every schedule, and "
        "compiles them into Triton's cache. Lists are separated by commas.",
    )
    parser.add_argument("--report", action="store_true", help="read the binaries, hold them to budgets, print a table")
    parser.add_argument(
        "--every-tile", action="store_true", help="with every tile that the plan lists, not the default alone"
    )
    parser.add_argument("--targets", type=names, help="such as sm_90,gfx942 (default: all)")
    parser.add_argument("--models", type=names, help=f"{RULE} (default: a few of each kind)")
    parser.add_argument("--dtypes", type=names, help="some of bf16,fp16,fp32 (default: all)")
    parser.add_argument("--jobs", type=positive, help="processes (default: as many as there are cores)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the report's figures there too")
    parser.add_argument(
        "--known", type=Path, metavar="FILE",
        help="write what the binaries ask for into the table that predictions go by (fusedres/compiler/known.csv)",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    from fusedres.explain.compile_report import CompileOptions, run

    chosen = {name: getattr(options, name) for name in ("targets", "models", "dtypes", "jobs", "csv", "known")}
    given = {name: value for name, value in chosen.items() if value is not None}
    say_whose(options.models or ())
    return run(CompileOptions(options.report, options.every_tile, **given))
