"""``fusedres compile``: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import names, positive
from fusedres.commands.model_names import RULE, say_whose

EXAMPLES = """examples:
  fusedres compile resnet50 --target sm_90
      what a training step and inference launch on an H100, into Triton's cache of this machine
  fusedres compile resnet50 resnet101 --target a100 --batch 128 --dtype fp16 --out binaries
      into a folder: as ~/.cache/fusedres/binaries (or binaries in the folder that FUSEDRES_CACHE names) on a machine
      with that GPU, and with the same Triton and fusedres, it is found without being named
  fusedres compile resnet50 --tune
      and every candidate of tuning, for the GPU of this machine
  fusedres compile --report --targets sm_90 --models resnet50
      on every schedule, with a table of what the binaries ask of the GPU
"""
# What goes with models that are named, and what with the report.
OF_MODELS, OF_REPORT = (
    ("target", "out", "batch", "px", "dtype", "infer", "tune"),
    ("report", "every_tile", "targets", "models", "dtypes", "csv", "known"),
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "compile",
        help="compile the kernels that models launch, for GPUs that need not be here, before they are launched; or "
        "report on their binaries",
        description="Compiles what the first step of models launches, so that it need not. Without MODEL,\nwhat a few "
        "models launch on every schedule, for a report. Lists are separated by commas.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="*", help=RULE)
    parser.add_argument("--target", help="such as sm_90, or a GPU such as h100_pcie (default: the GPU of this machine)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="in place of Triton's cache, to be taken elsewhere")
    parser.add_argument("--batch", type=positive, help="images of a step (default: 256)")
    parser.add_argument("--px", type=positive, help="height and width of the images (default: the model's)")
    parser.add_argument("--dtype", help="bf16 or fp16 (by autocast), or fp32 (default: bf16)")
    parser.add_argument("--infer", action="store_true", help="inference alone, not training too")
    parser.add_argument("--tune", action="store_true", help="and every candidate of tuning: rungs, ways, tiles")
    parser.add_argument("--jobs", type=positive, help="processes (default: as many as there are cores)")
    report = parser.add_argument_group("the report, without MODEL")
    report.add_argument("--report", action="store_true", help="read the binaries, hold them to budgets, print a table")
    report.add_argument(
        "--every-tile", action="store_true", help="with every tile that the plan lists, not the default alone"
    )
    report.add_argument("--targets", type=names, help="such as sm_90,gfx942 (default: all)")
    report.add_argument("--models", type=names, help="as MODEL (default: a few of each kind)")
    report.add_argument("--dtypes", type=names, help="some of bf16,fp16,fp32 (default: all)")
    report.add_argument("--csv", type=Path, metavar="FILE", help="write the report's figures there too")
    report.add_argument(
        "--known", type=Path, metavar="FILE",
        help="write what the binaries ask for into the table that predictions go by (fusedres/compiler/known.csv)",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    _refuse(options, *((OF_REPORT, "without") if options.model else (OF_MODELS, "with")))
    # Imported here, since they need the packages of the extra [cli].
    if options.model:
        from fusedres.explain.compile_models import Ahead
        from fusedres.explain.compile_models import run as compile_models

        say_whose(options.model)
        return compile_models(Ahead(tuple(dict.fromkeys(options.model)), **_given(options, (*OF_MODELS, "jobs"))))
    from fusedres.explain.compile_report import CompileOptions, run

    given = _given(options, ("targets", "models", "dtypes", "jobs", "csv", "known"))
    say_whose(options.models or ())
    return run(CompileOptions(options.report, options.every_tile, **given))


def _given(options: argparse.Namespace, wanted: tuple[str, ...]) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in wanted}
    return {name: value for name, value in chosen.items() if value is not None}


def _refuse(options: argparse.Namespace, others: tuple[str, ...], how: str) -> None:
    """Options of the other kind of run."""
    for name in others:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')}: expected {how} MODEL")
