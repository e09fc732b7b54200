"""The studies by name. Imports nothing, so that their names are there at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fusedres.studies.study import Study

__all__ = ["STUDIES", "check", "found", "listed"]


class Entry(NamedTuple):
    """The module that holds a study, under the study's name in capitals, and one line about it."""

    module: str
    line: str


STUDIES = {
    "degradation": Entry("degradation", "depth against training error, plain and residual (He 2015, figures 1, 4, 6)"),
    "options": Entry("options", "shortcuts of option A, B and C, and none (He 2015, table 3)"),
    "responses": Entry("responses", "strength of layers' responses, plain and residual (He 2015, figure 7)"),
    "warmup": Entry("warmup", "a deep network with and without a low learning rate at first (He 2015, section 4.2)"),
    "plateau": Entry("plateau", "the learning rate falls at fixed times or on plateaus (He 2015, sections 3.4, 4.2)"),
    "ensemble": Entry("ensemble", "probabilities of several networks averaged (He 2015, tables 4, 5)"),
    "shortcuts": Entry("shortcuts", "scaled, gated, convolved and dropped shortcuts (He 2016, table 1)"),
    "identity": Entry("identity", "signals and gradients through shortcuts scaled by λ (He 2016, equations 7, 8)"),
    "activations": Entry("activations", "where batch norm and ReLU stand in a block (He 2016, table 2)"),
    "preact": Entry("preact", "how fast deep networks learn with pre-activation (He 2016, figures 1, 6)"),
    "lesion": Entry("lesion", "blocks and layers of trained networks deleted (Veit 2016, figures 3, 5a)"),
    "permute": Entry("permute", "blocks of a trained network in another order (Veit 2016, figure 5b)"),
    "paths": Entry("paths", "lengths of paths, and which of them carry gradient (Veit 2016, figure 6)"),
    "unrolled": Entry("unrolled", "the last blocks of a stage refine, and can be dropped (Greff 2017, Veit 2016)"),
    "reuse": Entry("reuse", "weights of a DenseNet by the layer whose features they read (Huang 2017, figure 5)"),
    "shattered": Entry("shattered", "how gradients of near and of unrelated inputs correlate (Balduzzi 2017)"),
}
"""In the order of the papers."""


def listed() -> str:
    """Each study's name with its line."""
    width = max(map(len, STUDIES))
    return "\n".join(f"{name:{width}}  {entry.line}" for name, entry in STUDIES.items())


def check(name: str) -> None:
    """Raise the ValueError that lists the studies if ``name`` is none of them."""
    if name not in STUDIES:
        raise ValueError(f"study: expected some of these, or all, got {name!r}\n{listed()}")


def found(name: str) -> Study:
    """The study called ``name``.

    Raises:
        ValueError: there is none; the message lists them.
    """
    check(name)
    return getattr(import_module(f"fusedres.studies.{STUDIES[name].module}"), name.upper())
