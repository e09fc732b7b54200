"""The arguments of ``fusedres demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import fraction, positive

DESCRIPTION = "Trains on real digits, plain and fused side by side, and checks torchvision's resnet50."
EXAMPLES = """examples:
  fusedres demo
  fusedres demo --epochs 2 --no-resnet50   a quick look
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "demo",
        help="train on real digits, plain and fused side by side, and check torchvision's resnet50",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("--epochs", type=positive, metavar="N", default=16, help="through the images")
    options.batch(parser, 64)
    options.first_seed(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("fusedres-demo.png"), metavar="FILE.png", help="where the picture goes"
    )
    options.threads(parser)
    options.px(parser, 8, "that the digits are scaled to")
    options.schedule(parser, "memory")
    parser.add_argument(
        "--min-accuracy",
        type=fraction,
        metavar="X",
        help="test accuracy below this fails (default: 0.97 from 16 epochs on)",
    )
    parser.add_argument(
        "--resnet50",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also torchvision's, and what is predicted of it",
    )  # fmt: skip
