"""What the tests of studies share: small networks and images, and a laboratory without training."""

import csv
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fusedres.studies.run import run
from fusedres.studies.study import Lab, Setting, Table
from fusedres.studies.training import Images, Trained
from fusedres.train.network import build


def images(count=40, channels=1, side=8):
    generator = torch.Generator().manual_seed(1)
    return Images(torch.randn(count, channels, side, side, generator=generator), torch.arange(count) % 10)


def network(name, seed=0, **options):
    torch.manual_seed(seed)
    return build(name, classes=10, channels=1, fused=False, options=options).model.eval()


def untrained(study, networks, draws=2, **setting):
    """A `Lab` whose networks, by label, have their initial values."""
    chosen = Setting(draws=draws, **setting)
    lab = Lab(chosen, 0, {label: Trained(model, []) for label, model in networks.items()}, study.recipe(chosen), Path())
    lab.__dict__["images"] = (images(), images())
    return lab


def table_of(study, lab):
    return Table({0: list(study.measure(lab))})


def drawn(study, table):
    """The axes of a study's picture, each of which has both labels, a title above it somewhere, and something in it."""
    figure = Figure(layout="constrained")
    study.draw(figure, table)
    figure.canvas.draw()
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            assert axes.get_ylabel()
            continue
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()
        assert axes.lines or axes.patches or axes.images or axes.collections
    assert figure.get_suptitle() or all(axes.get_title() for axes in figure.axes if axes.get_label() != "<colorbar>")
    return figure.axes


def done(study, folder, seeds=(0,), **setting):
    """A study on digits, whole; its lines, and its CSV's rows."""
    said = []
    finding = run(study, folder, Setting(**setting), seeds, say=said.append)
    assert [line.split(":")[0] for line in said[-3:]] == ["paper", "here", "verdict"]
    assert (folder / f"{study.name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with (folder / f"{study.name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(float(row["mean"]) == float(row["mean"]) and int(row["samples"]) > 0 for row in rows)
    return finding, rows
