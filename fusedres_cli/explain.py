"""The arguments of ``fusedres explain``."""

from __future__ import annotations

from typing import Any

from fusedres_cli import options
from fusedres_cli.values import size

DESCRIPTION = "Counts a training step (or inference) on paper: nothing is computed, and no GPU is needed."
EXAMPLES = """examples:
  fusedres explain resnet50 --by layer --by kernel
  fusedres explain timm.resnet50d --gpu a100 -b 64 --plot resnet50d.png
  fusedres explain resnet50 --infer --cast -b 1 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "explain",
        help="bytes, launches and predicted time of a model's step, eager and on every rung, without a GPU",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.model(parser)
    options.batch(parser, 256)
    options.one_dtype(parser)
    options.gpu(parser, help="whose roofline is meant, and whose tiles are launched: such as a100, rtx4090, here")
    parser.add_argument("--rung", default="all", help="all, a schedule, or several with commas between them")
    options.px(parser)
    parser.add_argument("--size", type=size, metavar="CxHxW", help="of an image, in place of --px")
    options.infer(parser)
    parser.add_argument(
        "--cast", action="store_true", help="inference of a model that has the dtype itself, in place of autocast"
    )
    parser.add_argument(
        "--by", choices=("layer", "kernel", "kind"), action="append", default=[],
        help="also what the bytes are spent on; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    options.picture(parser, "--out", help="also draw a picture")
