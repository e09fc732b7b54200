"""``fusedres study``: its arguments and how its progress is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import positive, seed
from fusedres.studies.catalogue import STUDIES, check, listed


def add_parser(commands: Any) -> None:
    """Add the command ``study`` to the subcommands of a parser. Imports nothing that studies need."""
    parser = commands.add_parser(
        "study",
        help="the papers' experiments, each as a table, a picture and three lines",
        description="Each study trains what it needs and writes NAME.csv, NAME.json and NAME.png into a folder, and all"
        " pictures of the folder into studies.html. One that was interrupted goes on when it is asked for again.",
        epilog="examples: fusedres study --list | fusedres study degradation --seeds 3 | fusedres study all",
    )
    parser.add_argument("study", metavar="NAME", nargs="*", help="some of --list, or all")
    parser.add_argument("--list", action="store_true", help="each study with one line about it")
    parser.add_argument("--full", action="store_true", help="the paper's setting on CIFAR-10: for a GPU")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="mean and spread of so many (default: 1)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="the first of them (default: 0)")
    parser.add_argument("--epochs", type=positive, help="of each training (default: the study's own)")
    parser.add_argument("--draws", type=positive, default=10, help="random choices at a place (default: 10)")
    parser.add_argument("--plain", action="store_true", help="networks that are not fused")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="mixed precision in training")
    parser.add_argument("--device", help="cpu, cuda or cuda:<index> (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch decides if not given)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR's files lie (default: data)")
    parser.add_argument("--out", type=Path, default=Path("studies"), metavar="FOLDER", help="(default: studies)")
    parser.add_argument("--fresh", action="store_true", help="measure again; trained networks are kept")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.list:
        print(listed())
        return 0
    names = list(STUDIES) if "all" in options.study else list(dict.fromkeys(options.study))
    for name in names:
        check(name)
    if not names:
        raise ValueError(f"study: expected some of these, or all\n{listed()}")
    # Imported here, since it needs the packages of the extra [cli].
    import torch
    from rich.console import Console

    from fusedres.commands.progress import progress
    from fusedres.studies import gallery
    from fusedres.studies.catalogue import found
    from fusedres.studies.run import Record, run
    from fusedres.studies.study import Setting
    from fusedres.train.distributed import world
    from fusedres.train.stopping import Stopped, stopping

    setting = Setting(options.full, options.epochs, options.draws, options.plain, options.amp)
    studies = [found(name) for name in names]
    for study in studies:
        Record(options.out, study, setting, fresh=options.fresh)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    seeds = range(options.seed, options.seed + options.seeds)
    with world(options.device) as here, stopping(patient=False) as wish:
        for study in studies:
            console.print(study.name)
            try:
                with progress(lines=20) as tell:
                    run(
                        study, options.out, setting, seeds, say=console.print, device=here.device,
                        data_dir=options.data_dir, fresh=options.fresh, wish=wish, tell=tell,
                    )  # fmt: skip
            except Stopped as stopped:
                console.print(f"stopped by signal {stopped.number}; the same command goes on")
                return stopped.status
    page = gallery.write(options.out)
    console.print(f"written: {', '.join(names)} (.csv, .json, .png) and {page.name} in {options.out.resolve()}")
    return 0
