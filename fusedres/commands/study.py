"""The arguments of `fusedres study`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import check_packages, positive, seed


def add_parser(commands: Any) -> None:
    """Add the command ``study`` to the subcommands of a parser. Imports nothing that studies need."""
    parser = commands.add_parser(
        "study",
        help="the papers' experiments about residual networks, on digits: a table and a picture each",
        description="ensembles: blocks deleted and permuted, gradients by length of path (Veit et al. 2016)."
        " shattered: autocorrelation of gradients at initial values (Balduzzi et al. 2017).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("study", choices=["ensembles", "shattered"])
    parser.add_argument("--model", default="cifar_resnet56", help="a network of basic blocks")
    parser.add_argument("--epochs", type=positive, default=30, help="of training, where a study trains")
    parser.add_argument("--draws", type=positive, default=20, help="random choices per point")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch decides if not given)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    import torch
    from rich.console import Console

    from fusedres.studies import ensembles, shattered

    if not options.out.is_dir():
        raise ValueError(f"out must be an existing folder, got {options.out}")
    check_packages("matplotlib")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    given = {"seed": options.seed, "draws": options.draws, "say": console.print}
    if options.study == "ensembles":
        ensembles.run(options.model, options.out, epochs=options.epochs, **given)
    else:
        shattered.run(options.model, options.out, **given)
    console.print(f"written: {options.out / options.study}.csv and .png")
    return 0
