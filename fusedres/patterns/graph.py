"""Patterns in evaluation as nodes of a compiler's graph: one op for each, which enters the pattern's door when it runs.

So everything is decided as in eager mode, by the tensors that a call has and the device that they are on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.graph import LIBRARY, TAGS
from fusedres.context import context
from fusedres.ops.rows import channels_last
from fusedres.runtime.call import Call
from fusedres.runtime.text import known, text_of, value_of


class Evaluated(NamedTuple):
    """What a node is told: the pattern, the dtype of its contractions, and whether autocast chose that."""

    pattern: Any
    dtype: torch.dtype
    autocast: bool


known(Evaluated)


def graphed(pattern: type, enter: Callable[[Any], Tensor]) -> None:
    """Make the op of an evaluated pattern, ``fusedres::evaluated_chain`` of ``_Chain``; ``enter`` is the door."""
    name = op_of(pattern)
    known(pattern)
    LIBRARY.define(f"{name}(Tensor[] given, str spec) -> Tensor", tags=TAGS)

    def run(given: list[Tensor], spec: str) -> Tensor:
        told = value_of(spec, given)
        if not isinstance(told, Evaluated):
            raise ValueError(f"spec: expected the text of a pass in evaluation, got {spec!r}")
        kind = given[0].device.type
        with torch.no_grad(), torch.autocast(kind, told.dtype if told.autocast else None, enabled=told.autocast):
            z = channels_last(enter(told.pattern))
        return z

    def fake(given: list[Tensor], spec: str) -> Tensor:
        with context(backend="reference", replays=False, graphed=False):
            return run(given, spec)

    def differentiated(ctx: Any, dz: Tensor) -> Any:
        raise RuntimeError(f"fusedres::{name}: a pass in evaluation keeps nothing, and has no gradients")

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"fusedres::{name}", differentiated, lib=LIBRARY)
    torch.library.register_fake(f"fusedres::{name}", fake, lib=LIBRARY)


def op_of(pattern: type) -> str:
    """What the op of an evaluated pattern is called."""
    return f"evaluated_{pattern.__name__.strip('_').lower()}"


def evaluated(pattern: Any, call: Call) -> Tensor:
    """The evaluation of a pattern as a node of the graph that is made at this moment.

    Raises:
        Untold: of constants that a graph can not carry.
    """
    given: list[Tensor] = []
    spec = text_of(Evaluated(pattern, call.dtype, call.autocast), given)
    z: Tensor = getattr(torch.ops.fusedres, op_of(type(pattern))).default(given, spec)
    return z
