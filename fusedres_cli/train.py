"""The arguments of ``fusedres train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import amount, dtype, positive, whole

RECIPES = (
    "he2015-cifar", "he2015-imagenet", "he2016-preact", "he2016-preact-imagenet", "stochastic-depth", "wide-resnet",
    "resnext-cifar", "densenet", "densenet-imagenet", "digits",
)  # fmt: skip
DESCRIPTION = """Writes checkpoint.pt, best.pt, model.pt, log.csv and curves.png into a folder. Under torchrun it
trains on all its processes."""
EXAMPLES = """examples:
  fusedres train                                 ResNet-20 on digits: a minute
  fusedres train cifar_resnet56 --data cifar10   downloads, trains, tests
  fusedres train resnet50 --data imagefolder:/data/imagenet --amp bf16 -j 16
  torchrun --nproc-per-node 8 -m fusedres train resnet50 --data imagefolder:DIR
  fusedres train --resume                        goes on where it was stopped
"""


def add_parser(commands: Any) -> None:
    """Add the command ``train`` to the subcommands of a parser."""
    parser = commands.add_parser(
        "train",
        help="train networks by the papers' recipes on CIFAR, folders of images or digits",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what to train")
    options.model(what, "cifar_resnet20")
    what.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the network; repeatable")
    what.add_argument("--plain", action="store_true", help="the unfused twin")
    options.schedule(what)
    what.add_argument(
        "--weights", type=Path, nargs="+", default=[], metavar="FILE",
        help="start from these instead of random ones; with --evaluate, test these, several as an ensemble",
    )  # fmt: skip

    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", help="cifar10, cifar100, digits, mnist5k or imagefolder:PATH")
    data.add_argument("--data-dir", type=Path, metavar="FOLDER", default=Path("data"), help="where CIFAR's files lie")
    data.add_argument("--download", action=argparse.BooleanOptionalAction, default=True, help="CIFAR if it is missing")
    data.add_argument("--validation", type=whole, default=0, metavar="N", help="hold out N training images (He: 5000)")
    options.px(data, help="of digits, or of crops from an image folder")

    recipe = parser.add_argument_group("recipe")
    told = f"{', '.join(RECIPES)} (default: what suits the data)"
    recipe.add_argument("--recipe", choices=RECIPES, metavar="NAME", help=told)
    recipe.add_argument(
        "--epochs", type=positive, metavar="N", help="instead of the recipe's length; drops move in proportion"
    )
    recipe.add_argument("--iterations", type=positive, metavar="N", help="the same in steps")
    options.batch(recipe, help="images per step, of all processes together (default: the recipe's)")
    recipe.add_argument("--lr", type=amount, metavar="X", help="learning rate (default: the recipe's)")
    recipe.add_argument("--weight-decay", "--wd", type=amount, metavar="X", help="(default: the recipe's)")
    recipe.add_argument(
        "--plateau", type=whole, nargs="?", const=5, metavar="PATIENCE",
        help="divide the rate by 10 when the error has not fallen for PATIENCE epochs (5) instead of at fixed steps",
    )  # fmt: skip
    options.first_seed(recipe)

    how = parser.add_argument_group("how to compute")
    how.add_argument(
        "--amp", "--amp-dtype", type=dtype, nargs="?", const="bf16", choices=["bf16", "fp16"],
        help="mixed precision (bf16 if it is not said which); fp16 with a gradient scaler",
    )  # fmt: skip
    how.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="how images lie in memory"
    )
    how.add_argument("--deterministic", action="store_true", help="the same bits in every run, on GPUs too")
    options.device(how)
    options.threads(how)
    how.add_argument(
        "-j", "--workers", type=whole, metavar="N", help="processes that read images (default: some for image files)"
    )
    how.add_argument("--graph", action="store_true", help="steps as a CUDA graph: for small networks and batches")
    how.add_argument("--augment-on-device", action="store_true", help="crop, mirror and normalise on the GPU")

    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", "--output-dir", type=Path, metavar="FOLDER", help="where they go (default: runs/MODEL-DATA-...)"
    )
    results.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, bit for bit")
    results.add_argument("--tensorboard", action="store_true", help="write its files too")
    results.add_argument(
        "--evaluate",
        action="store_true",
        help="only test --weights; checkpoints know their networks, a state_dict is of --model",
    )
    results.add_argument(
        "--test", choices=["single", "ten-crop", "multi-scale"], default="single", help="of image folders at the end"
    )
