"""The arguments of ``fusedres coverage``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options

LIBRARIES = ("torchvision", "timm", "hf")
DESCRIPTION = """Builds every model that has batch norms without memory for its weights, fuses it and counts. With
--out, what was cut short is taken up again."""
EXAMPLES = """examples:
  fusedres coverage timm.resnet50d timm.regnety_032
  fusedres coverage --library timm --out coverage.md
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "coverage",
        help="how many batch norms of other libraries' models are in a fused pass, and why not all",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.models(parser)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="this one alone; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write a page, and its figures into FILE.csv")
    options.jobs(parser, 2)
