"""The arguments of ``fusedres tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options

DESCRIPTION = """Measures on this machine's GPU what fuse(model) is to take for each block of a model: eager PyTorch
or a rung of the ladder, and tiles and library calls inside it. What is wrong is left out, and the
whole step is never slower than eager PyTorch's. The plan is kept in the cache folder
(FUSEDRES_CACHE), where fuse(model) finds it. A tuning that was interrupted goes on."""
EXAMPLES = """examples:
  fusedres tune resnet50
  fusedres tune timm.resnet50d -b 1 --infer
  fusedres tune resnet50 --predict --gpu a100
  fusedres tune --show
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "tune",
        help="measure on this GPU what is fastest for a model, so that it is never slower than eager PyTorch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.model(parser)
    options.batch(parser, 256)
    options.px(parser)
    options.one_dtype(parser)
    options.infer(parser)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options.picture(parser, help="draw it there (default: beside the plan)")
    paper = parser.add_argument_group("without a GPU")
    paper.add_argument("--predict", action="store_true", help="write what is predicted, and measure nothing")
    options.gpu(paper, help="which GPU is predicted")
    paper.add_argument("--out", type=Path, metavar="FILE.json", help="of the predicted plan (default: in the cache)")
    plans = parser.add_argument_group("plans")
    plans.add_argument("--show", action="store_true", help="list the plans in the cache folder, and stop")
    plans.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="take over what plans of other machines hold, and stop"
    )
