"""The arguments of `fusedres train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fusedres.arguments import amount, positive, seed, whole
from fusedres.commands.model_names import RULE, say_whose
from fusedres.train.recipe import names


def add_parser(commands: Any) -> None:
    """Add the command ``train`` to the subcommands of a parser. Imports nothing that training needs."""
    parser = commands.add_parser(
        "train",
        help="train networks by the papers' recipes on CIFAR, folders of images or digits",
        description="Writes checkpoint.pt, best.pt, model.pt, log.csv and curves.png into a folder. Under torchrun it"
        " trains on all its processes: torchrun --nproc-per-node 8 -m fusedres train ...",
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", default="cifar_resnet20", help=RULE)
    what.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the network; repeatable")
    what.add_argument("--plain", action="store_true", help="the unfused twin")
    what.add_argument("--schedule", default="auto", help="of the fused blocks (default: auto)")
    what.add_argument(
        "--weights", type=Path, nargs="+", default=[], metavar="FILE",
        help="start from these instead of random ones; with --evaluate, test these, several as an ensemble",
    )  # fmt: skip

    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", help="cifar10, cifar100, digits, mnist5k or imagefolder:PATH")
    data.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR's files lie (default: data)")
    data.add_argument("--download", action=argparse.BooleanOptionalAction, default=True, help="CIFAR if it is missing")
    data.add_argument("--validation", type=whole, default=0, metavar="N", help="hold out N training images (He: 5000)")
    data.add_argument("--px", type=positive, help="size of digits, or of crops from an image folder")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", help=f"one of {', '.join(names())} (default: what suits the data)")
    recipe.add_argument("--epochs", type=positive, help="instead of the recipe's length; drops move in proportion")
    recipe.add_argument("--iterations", type=positive, help="the same in steps")
    recipe.add_argument("--batch", type=positive, help="images per step, of all processes together")
    recipe.add_argument("--lr", type=amount)
    recipe.add_argument("--weight-decay", type=amount)
    recipe.add_argument(
        "--plateau", type=whole, nargs="?", const=5, metavar="PATIENCE",
        help="divide the rate by 10 when the error has not fallen for PATIENCE epochs (5) instead of at fixed steps",
    )  # fmt: skip
    recipe.add_argument("--seed", type=seed, default=0)

    how = parser.add_argument_group("how to compute")
    how.add_argument("--amp", choices=["bf16", "fp16"], help="mixed precision; fp16 with a gradient scaler")
    how.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    how.add_argument("--deterministic", action="store_true", help="the same bits in every run, on GPUs too")
    how.add_argument("--device", help="cpu, cuda or cuda:<index> (default: a GPU if there is one)")
    how.add_argument("--threads", type=positive, help="CPU threads (PyTorch decides if not given)")
    how.add_argument("--workers", type=whole, help="processes that read images (default: some for image files)")
    how.add_argument("--graph", action="store_true", help="steps as a CUDA graph: for small networks and batches")
    how.add_argument("--augment-on-device", action="store_true", help="crop, mirror and normalise on the GPU")

    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="FOLDER", help="(default: runs/MODEL-DATA-...)")
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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    from fusedres.train.run import TrainOptions, run

    if os.environ.get("RANK", "0") == "0":
        say_whose([options.model])
    given = {name: getattr(options, name) for name in TrainOptions.__dataclass_fields__}
    return run(TrainOptions(**given | {name: tuple(given[name]) for name in ("option", "weights")}))
