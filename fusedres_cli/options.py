"""Options that several commands have: in all of them by the same names, those of timm and torchvision among them.

A model is given as MODEL or as --model MODEL. A list is separated by commas, or an option is repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusedres_cli.values import DTYPES, dtype, names, positive, seed

# What `fusedres.models.sources.source` takes.
RULE = (
    "NAME (fusedres's own, else torchvision's), torchvision.NAME of any task, timm.NAME, hf.TYPE (of transformers), "
    "path.py:function or path.py:Class"
)
SCHEDULES = ("auto", "memory", "block_end", "stats", "prologue", "moments")
"""What ``fuse`` takes."""

Options = argparse.ArgumentParser | argparse._ArgumentGroup


def model(parser: Options, default: str | None = None) -> None:
    """One model."""
    # Without a default of its own, so that the option's stays where MODEL is left out.
    parser.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=RULE)
    parser.add_argument("--model", metavar="MODEL", default=default, help="the same")


def models(parser: Options) -> None:
    """Any number of models."""
    parser.add_argument("model", metavar="MODEL", nargs="*", default=argparse.SUPPRESS, help=RULE)
    parser.add_argument("--model", metavar="MODEL", action="extend", type=names, default=[], help="the same")


def batch(parser: Options, default: int | None = None, help: str = "images of a step") -> None:
    parser.add_argument("-b", "--batch", "--batch-size", type=positive, metavar="N", default=default, help=help)


def px(parser: Options, default: int | None = None, help: str = "of the images (default: the model's own)") -> None:
    parser.add_argument(
        "--px", "--img-size", type=positive, metavar="N", default=default, help=f"height and width {help}"
    )


def one_dtype(parser: Options, default: str | None = "bf16", help: str = "bf16 and fp16 by autocast") -> None:
    parser.add_argument("--dtype", "--amp-dtype", type=dtype, choices=tuple(DTYPES), default=default, help=help)


def schedule(parser: Options, default: str = "auto") -> None:
    parser.add_argument(
        "--schedule", choices=SCHEDULES, metavar="NAME", default=default,
        help=f"of the fused blocks: {', '.join(SCHEDULES)}",
    )  # fmt: skip


def gpu(parser: Options, default: str | None = "h100", help: str = "such as a100 or rtx4090, or here") -> None:
    parser.add_argument("--gpu", metavar="NAME", default=default, help=help)


def infer(parser: Options, help: str = "inference in place of a training step") -> None:
    parser.add_argument("--infer", action="store_true", help=help)


def threads(parser: Options) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (PyTorch decides if not given)")


def jobs(parser: Options, default: int | None = None, help: str = "processes") -> None:
    parser.add_argument("-j", "--jobs", "--workers", type=positive, metavar="N", default=default, help=help)


def first_seed(parser: Options, help: str = "of all that is random") -> None:
    parser.add_argument("--seed", type=seed, metavar="N", default=0, help=help)


def device(parser: Options, help: str = "cpu, cuda or cuda:<index> (default: a GPU if there is one)") -> None:
    parser.add_argument("--device", help=help)


def picture(parser: Options, *others: str, help: str = "draw a picture there") -> None:
    parser.add_argument("--plot", "--picture", *others, dest="plot", type=Path, metavar="FILE.png", help=help)
