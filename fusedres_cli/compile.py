"""The arguments of ``fusedres compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import dtypes, names

DESCRIPTION = """Compiles what the first step of models launches, so that it need not. Without MODEL, what a few
models launch on every schedule, for a report. Lists are separated by commas."""
EXAMPLES = """examples:
  fusedres compile resnet50 --target sm_90
      what training and inference launch on an H100, into Triton's cache here
  fusedres compile resnet50 resnet101 --target a100 -b 128 --out binaries
      into a folder: as ~/.cache/fusedres/binaries (or binaries in the folder
      that FUSEDRES_CACHE names) on a machine with that GPU, and with the same
      Triton and fusedres, it is found without being named
  fusedres compile resnet50 --tune
      and every candidate of tuning, for the GPU of this machine
  fusedres compile --report --targets sm_90 --models resnet50
      on every schedule, with a table of what the binaries ask of the GPU
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "compile",
        help="compile the kernels that models launch, for GPUs that need not be here, before they are launched; or "
        "report on their binaries",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.models(parser)
    parser.add_argument("--target", help="such as sm_90, or a GPU such as h100_pcie (default: the GPU of this machine)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="in place of Triton's cache, to be taken elsewhere")
    options.batch(parser, help="images of a step (default: 256)")
    options.px(parser)
    options.one_dtype(parser, None, "bf16 and fp16 by autocast (default: bf16)")
    options.infer(parser, "inference alone, not training too")
    parser.add_argument("--tune", action="store_true", help="and every candidate of tuning: rungs, ways, tiles")
    options.jobs(parser, help="processes (default: as many as there are cores)")
    report = parser.add_argument_group("the report, without MODEL")
    report.add_argument("--report", action="store_true", help="read the binaries, hold them to budgets, print a table")
    report.add_argument(
        "--every-tile", action="store_true", help="with every tile that the plan lists, not the default alone"
    )
    report.add_argument("--targets", type=names, help="such as sm_90,gfx942 (default: all)")
    report.add_argument("--models", type=names, help="as MODEL (default: a few of each kind)")
    report.add_argument("--dtypes", type=dtypes, help="some of bf16,fp16,fp32 (default: all)")
    report.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the report's figures there too")
    report.add_argument(
        "--known", type=Path, metavar="FILE",
        help="write what the binaries ask for into the table that predictions go by (fusedres/compiler/known.csv)",
    )  # fmt: skip
