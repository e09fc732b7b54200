"""The arguments of ``fusedres calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options

DESCRIPTION = """Fits constants of the model of time (fusedres/plan/time.py) to launches that were timed on a GPU
(make gpu, python -m fusedres.bench.launches), and keeps those that the times determine. Predictions
for that GPU on this machine go by them from then on."""
EXAMPLES = """examples:
  fusedres calibrate bench/results/h100    fit to what make gpu has timed
  fusedres calibrate --show                what is kept
  fusedres calibrate --reset --gpu h100    by the usual constants again
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "calibrate",
        help="fit the model that predicts times to launches that were timed on a GPU",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path,
        help="a table of timed launches, or a folder of results that holds launches.csv (default: the one in "
        "bench/results)",
    )  # fmt: skip
    options.gpu(parser, None, "the GPU, or here (default: the one that the table is of)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write there, where nothing looks for it")
    parser.add_argument("--show", action="store_true", help="print the constants that are kept, and stop")
    parser.add_argument("--reset", action="store_true", help="let go of the constants that are kept of --gpu")
