"""An `Explanation` for a terminal: a sentence, a table, and on demand what the bytes are spent on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from fusedres.explain.explanation import EAGER, Explanation, Figures
from fusedres.patterns.choose import AUTO
from fusedres.tables import Column, Fitted
from fusedres.traffic.account import KINDS, bytes_by_kind

MEGA, GIGA = 1e6, 1e9


def sentence(found: Explanation, cast: Explanation | None = None) -> str:
    """The answer: what the last rung, ``"auto"`` if it is among them, is predicted to gain.

    Args:
        found: what is explained.
        cast: the same inference of a model that has the dtype itself.
    """
    question = found.question
    rung, eager, fused = _compared(found)
    words = (
        f"On {_article(found.gpu.name)} {found.gpu.name}, batch {question.batch}: predicted {fused.predicted_ms:.3g} ms"
        f" {'an inference' if question.infer else 'a step'} with {rung},"
        f" {eager.predicted_ms / fused.predicted_ms:.2f} x eager"
    )
    if cast is not None:
        _, eager_cast, fused_cast = _compared(cast)
        words += (
            f" under autocast; cast to {question.dtype}, {fused_cast.predicted_ms:.3g} ms,"
            f" {eager_cast.predicted_ms / fused_cast.predicted_ms:.2f} x eager"
        )
    change = 1 - fused.bytes_per_image / eager.bytes_per_image
    words += f"; {abs(change):.0%} {'fewer' if change >= 0 else 'more'} bytes".replace("%", " %")
    if not question.infer:
        saved, before = fused.saved_bytes_per_image / MEGA, eager.saved_bytes_per_image / MEGA
        words += f"; {saved:.3g} MB instead of {before:.3g} saved per image"
    return f"{words}."


def _article(word: str) -> str:
    # By sound: an h100, an l40s, an mi300x, an rtx4090, an rx7900xtx; a b200.
    return "an" if word[0].lower() in "aefhilmnorsx" else "a"


def _compared(found: Explanation) -> tuple[str, Figures, Figures]:
    """The rung that the answer is about, eager's figures and its own."""
    rung = AUTO if AUTO in found.rungs else list(found.rungs)[-1]
    return rung, found.figures(found.eager), found.figures(found.rungs[rung])


def tables(found: Explanation, by: Sequence[str] = (), cast: Explanation | None = None) -> Group:
    """The sentence, the steps, and what was asked for besides: keys of `BY`."""
    parts: list[RenderableType] = [Text(sentence(found, cast)), _steps(found, cast), Text("\n".join(_notes(found)))]
    for one in by:
        parts += BY[one](found)
    return Group(*parts)


def _steps(found: Explanation, cast: Explanation | None) -> Fitted:
    question = found.question
    mode = "inference" if question.infer else "training step"
    title = (
        f"{question.model}, {mode}, batch {question.batch}, {'cast to ' * question.cast}{question.dtype}, "
        f"{' x '.join(map(str, question.size or ()))}, {found.gpu.name}; per image"
    )
    rows = [(name, found.figures(step), step, found.figures(found.eager)) for name, step in found.steps.items()]
    if cast is not None:
        rows += [
            (f"{name}, cast", cast.figures(step), step, cast.figures(cast.eager)) for name, step in cast.steps.items()
        ]

    def column(title: str, cell: Callable[[Figures], str], drop: int = 0) -> Column:
        return Column(title, [cell(figures) for _, figures, _, _ in rows], drop)

    ratio = [f"{eager.predicted_ms / figures.predicted_ms:.2f}" for _, figures, _, eager in rows]
    ours = [str(sum(entry.ours for entry in step.entries)) for _, _, step, _ in rows]
    columns = [
        Column("", [name for name, *_ in rows], words=True),
        column("predicted ms", lambda f: f"{f.predicted_ms:.2f}"),
        column("band", lambda f: "{:.1f}-{:.1f}".format(*f.predicted_band_ms), 1),
        Column("x eager", ratio),
        column("MB", lambda f: f"{f.bytes_per_image / MEGA:.1f}"),
        column("MB saved", lambda f: f"{f.saved_bytes_per_image / MEGA:.1f}", 1),
        column("launches", lambda f: str(f.launches)),
        Column("ours", ours, 4),
        column("GFLOP", lambda f: f"{f.flops_per_image / GIGA:.2f}", 2),
        column("MB read", lambda f: f"{f.read_per_image / MEGA:.1f}", 5),
        column("MB written", lambda f: f"{f.written_per_image / MEGA:.1f}", 6),
        column("images/s at most", lambda f: f"{f.roofline_images_per_s:,.0f}", 7),
    ]
    return Fitted(title, [one for one in columns if not (question.infer and one.title == "MB saved")])


def _notes(found: Explanation) -> Iterator[str]:
    """How the figures came about."""
    gpu = found.gpu
    yield (
        "Computed, not measured: ms by a model of time, with its band; MB as if every kernel read each input once and "
        f"wrote each output once. At most: {gpu.bandwidth / 1e12:.2f} TB/s, {found.rate / 1e12:.0f} TFLOP/s "
        f"({gpu.source})."
    )
    if gpu.alike is not None:
        yield f"{gpu.name} is not in the table of GPUs: its figures are {gpu.source}."
    known = {name: count for name, step in found.steps.items() if (count := found.alike(step))}
    if known:
        words = ", ".join(f"{name} {count}" for name, count in known.items())
        yield f"Launches predicted from the code of another binary of their kernel: {words}."
    if not found.question.infer:
        read = (found.figures(found.eager).bytes_per_image + found.reread_per_image()) / MEGA
        yield (
            f"Eager's convolutions are counted as if both gradients read the output's at once; as kernels read it, "
            f"eager moves {read:.1f} MB. SGD with momentum adds {found.sgd_per_image() / MEGA:.1f} MB to every row."
        )


def _by_kind(found: Explanation) -> list[RenderableType]:
    by_step = {name: bytes_by_kind(step.entries) for name, step in found.steps.items()}
    kinds = [kind for kind in KINDS if any(totals[kind] for totals in by_step.values())]
    each = [
        _of_step(found, name, [f"{totals[kind] / found.question.batch / MEGA:.1f}" for kind in kinds])
        for name, totals in by_step.items()
    ]
    return [Fitted("MB per image by kind of work", [Column("", kinds, words=True), *each])]


def _of_step(found: Explanation, name: str, cells: Sequence[str]) -> Column:
    """Those of eager and of the rung that the answer is about stay; of the others the lower go first."""
    stays = name in (EAGER, _compared(found)[0])
    return Column(name, cells, 0 if stays else len(found.steps) - list(found.steps).index(name))


def _by_layer(found: Explanation) -> list[RenderableType]:
    rows = list(_merged(found.layers()))
    each = [
        _of_step(found, step, [
            f"{one[step].bytes_per_image / MEGA:.2f} ({one[step].launches})" if one[step].launches else ""
            for _, one in rows
        ])
        for step in found.steps
    ]  # fmt: skip
    parts: list[RenderableType] = [
        Fitted("MB per image (launches) by layer", [Column("", [name for name, _ in rows], words=True), *each])
    ]
    choices = found.rungs[AUTO].choices if AUTO in found.rungs else {}
    chosen = []
    for (rung, why), same in itertools.groupby(choices.items(), key=lambda one: (one[1].schedule.name, one[1].reason)):
        names = [name for name, _ in same]
        chosen.append((names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", rung, why))
    if chosen:
        titles = ("layer", "rung", "why")
        columns = [
            Column(title, cells, words=True) for title, cells in zip(titles, zip(*chosen, strict=True), strict=True)
        ]
        parts.append(Fitted(f"{AUTO}: the choice of each layer", columns))
    return parts


def _merged(layers: dict[str, dict[str, Figures]]) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Layers, those in one row that follow each other with the same figures, which are each one's."""
    for figures, same in itertools.groupby(layers.items(), key=lambda item: item[1]):
        names = [name for name, _ in same]
        yield names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}, {len(names)} alike", figures


def _by_kernel(found: Explanation) -> list[RenderableType]:
    rung = list(found.rungs)[-1]
    rows = found.operations(found.rungs[rung])
    columns = [
        Column("", [name for name, *_ in rows], words=True),
        Column("launches", [str(count) for _, count, _, _ in rows]),
        Column("MB", [f"{moved / MEGA:.2f}" for _, _, moved, _ in rows]),
        Column("of the roofline", [f"{share:.1%}" for *_, share in rows]),
    ]
    return [Fitted(f"{rung}: MB per image by kernel", columns)]


BY: Mapping[str, Callable[[Explanation], list[RenderableType]]] = {
    "layer": _by_layer, "kernel": _by_kernel, "kind": _by_kind,
}  # fmt: skip
