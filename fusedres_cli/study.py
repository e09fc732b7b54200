"""The arguments of ``fusedres study``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import dtype, positive

DESCRIPTION = """Each study trains what it needs and writes NAME.csv, NAME.json and NAME.png into a folder, and all
pictures of the folder into studies.html. One that was interrupted goes on when it is asked for
again."""
EXAMPLES = """examples:
  fusedres study --list
  fusedres study degradation --seeds 3
  fusedres study all
"""


def add_parser(commands: Any) -> None:
    """Add the command ``study`` to the subcommands of a parser."""
    parser = commands.add_parser(
        "study",
        help="the papers' experiments, each as a table, a picture and three lines",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("study", metavar="NAME", nargs="*", help="some of --list, or all")
    parser.add_argument("--list", action="store_true", help="each study with one line about it")
    parser.add_argument("--full", action="store_true", help="the paper's setting on CIFAR-10: for a GPU")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="mean and spread of so many")
    options.first_seed(parser, "the first of them")
    parser.add_argument("--epochs", type=positive, metavar="N", help="of each training (default: the study's own)")
    parser.add_argument("--draws", type=positive, metavar="N", default=10, help="random choices at a place")
    parser.add_argument("--plain", action="store_true", help="networks that are not fused")
    parser.add_argument(
        "--amp", "--amp-dtype", type=dtype, nargs="?", const="bf16", choices=["bf16", "fp16"],
        help="mixed precision in training (bf16 if it is not said which)",
    )  # fmt: skip
    options.device(parser)
    options.threads(parser)
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", default=Path("data"), help="where CIFAR's files lie")
    parser.add_argument(
        "--out", "--output-dir", type=Path, default=Path("studies"), metavar="FOLDER", help="where results go"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again; trained networks are kept")
