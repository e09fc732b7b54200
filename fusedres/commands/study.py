"""``fusedres study``: which studies run, and how their progress is told."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from fusedres.commands.progress import progress
from fusedres.studies import gallery
from fusedres.studies.catalogue import STUDIES, check, found, listed
from fusedres.studies.run import Record
from fusedres.studies.run import run as run_study
from fusedres.studies.study import Setting
from fusedres.train.distributed import world
from fusedres.train.stopping import Stopped, stopping


def run(options: argparse.Namespace) -> int:
    """Run them one after the other; ValueError for what was asked wrongly, before that."""
    if options.list:
        print(listed())
        return 0
    names = list(STUDIES) if "all" in options.study else list(dict.fromkeys(options.study))
    for name in names:
        check(name)
    if not names:
        raise ValueError(f"study: expected some of these, or all\n{listed()}")
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
                    run_study(
                        study, options.out, setting, seeds, say=console.print, device=here.device,
                        data_dir=options.data_dir, fresh=options.fresh, wish=wish, tell=tell,
                    )  # fmt: skip
            except Stopped as stopped:
                console.print(f"stopped by signal {stopped.number}; the same command goes on")
                return stopped.status
    page = gallery.write(options.out)
    console.print(f"written: {', '.join(names)} (.csv, .json, .png) and {page.name} in {options.out.resolve()}")
    return 0
