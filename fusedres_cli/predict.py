"""The arguments of ``fusedres predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import batches, names

MODEL = "torchvision.resnet50"
GPUS = ("h100", "h200", "a100", "rtx4090", "l40s", "b200", "mi300x")
BATCHES = (1, 16, 64, 256, 1024)
DESCRIPTION = "Predicts a model's step on several GPUs and batches. Nothing is computed, and nothing measured."
EXAMPLES = """examples:
  fusedres predict resnet50 --gpus a100,rtx4090 --batches 32,256
  fusedres predict timm.resnet50d --out predictions.md
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "predict",
        help="predicted time of a model's step on several GPUs and batches, eager and fused, without a GPU",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.model(parser, MODEL)
    parser.add_argument("--gpus", "--gpu", type=names, default=GPUS, help="names with commas between them")
    parser.add_argument(
        "-b", "--batches", "--batch", "--batch-size", type=batches, default=BATCHES,
        help="images of a step, with commas between them",
    )  # fmt: skip
    options.one_dtype(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write a page there")
