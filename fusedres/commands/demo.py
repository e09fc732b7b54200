"""``fusedres demo``: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import fraction, positive, seed


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "demo",
        help="train on real digits, plain and fused side by side, and check torchvision's resnet50",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=Path, default=Path("fusedres-demo.png"), metavar="FILE.png")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch decides if not given)")
    parser.add_argument("--px", type=int, default=8, help="height and width the digits are scaled to")
    parser.add_argument("--schedule", default="auto", help="schedule of the fused models")
    parser.add_argument("--min-accuracy", type=fraction, default=0.97, help="test accuracy below this fails")
    parser.add_argument(
        "--resnet50", action=argparse.BooleanOptionalAction, default=True, help="check torchvision's resnet50"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    from fusedres.train.demo import DemoOptions, run

    return run(DemoOptions(**{name: getattr(options, name) for name in DemoOptions.__dataclass_fields__}))
