"""Tables that nobody measured, and what every study and every picture is held to."""

import torch
from matplotlib.figure import Figure

from fusedres.studies.study import Row, Setting, Table


def table(ends, curves=()):
    """A `Table` of the values of each seed at 0, by series, and of a falling curve for each name in ``curves``."""
    seeds = range(max(map(len, ends.values())))
    falling = [Row(name, epoch, 0.8 / epoch) for name in curves for epoch in (1, 2, 3)]
    return Table({seed: [*(Row(name, 0, values[seed]) for name, values in ends.items()), *falling] for seed in seeds})


def errors(labels):
    """The names of the curves of networks."""
    return [f"{label}, {part}" for label in labels for part in ("training", "test")]


def drawn(study, table):
    """The axes of the study's picture, every one labelled and none of its texts outside the picture or on another."""
    figure = Figure(layout="constrained")
    study.draw(figure, table)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()
        if axes.get_xlabel() == "epoch":
            assert all(float(tick).is_integer() for tick in axes.get_xticks())
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts, *ticks(axes.xaxis), *ticks(axes.yaxis)]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert all(figure.bbox.contains(*point) for box in boxes for point in (box.min, box.max))
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    return figure.axes


def ticks(axis):
    """The labels of those ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]


def shown(axes):
    """What the legend names."""
    return [text.get_text() for text in axes.get_legend().get_texts()]


def of_the_paper(study):
    """The networks of the paper's setting by label, each built, on no device, and its recipe made."""
    built = {}
    with torch.device("meta"):
        for spec in study.networks(Setting(full=True)):
            built[spec.label] = spec.make(classes=10, channels=3, fused=False)
            assert spec.change(study.recipe(Setting(full=True))).length == 64_000
    return built
