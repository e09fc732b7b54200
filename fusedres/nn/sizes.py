"""What a forward may be tried on: sizes of inputs that its layers take."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fusedres.nn.kinds import Kind, holds_norms, kind_of
from fusedres.nn.match import Match
from fusedres.nn.reading import Reading
from fusedres.nn.steps import FusedStep, Modules

SIDE = 8
_PIXELS = 2 * SIDE * SIDE


def work_of(found: Match, modules: Modules) -> int:
    """About how often a forward multiplies on a small input; without end where modules with fused passes of their own
    are in it."""
    for step in found.steps:
        for node in step.nodes:
            if node.op == "call_module" and not isinstance(step, FusedStep):
                called = modules.found[node.target]
                if holds_norms(called):
                    return 10**18
    return _PIXELS * sum(parameter.numel() for parameter in modules.found[0].parameters())


def input_sizes(reading: Reading, module: nn.Module) -> list[tuple[int, int, int, int]] | None:
    """(N, C, H, W) for each tensor that a forward takes; None where its layers do not tell."""
    sizes = []
    for node in reading.nodes:
        if node.op == "placeholder":
            channels = _taken(node, module, set()) or _given(node, module)
            if channels is None:
                return None
            sizes.append((2, channels, SIDE, SIDE))
    return sizes


def _taken(node: fx.Node, module: nn.Module, seen: set[fx.Node]) -> int | None:
    """How many channels somebody wants who takes what a node gives."""
    for user in node.users:
        if user in seen or user.op == "output":
            continue
        seen.add(user)
        called = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        wanted = None if called is None else _wanted(called)
        name = getattr(user.target, "__name__", str(user.target))
        if wanted is None and name not in ("cat", "concat", "getattr", "getitem", "size", "chunk", "split"):
            wanted = _taken(user, module, seen)
        if wanted is not None:
            return wanted
    return None


def _wanted(called: nn.Module) -> int | None:
    for inner in called.modules():
        wanted = inner.__dict__.get("in_channels", inner.__dict__.get("num_features"))
        if wanted is not None:
            return int(wanted)
    return None


def _given(node: fx.Node, module: nn.Module) -> int | None:
    """How many channels what is added to a node has."""
    for user in node.users:
        for other in user.all_input_nodes:
            found = other
            while found is not node and found.op != "placeholder" and found.all_input_nodes:
                called: Any = module.get_submodule(str(found.target)) if found.op == "call_module" else None
                if called is not None and kind_of(called) in (Kind.CONV, Kind.NORM):
                    return int(called.out_channels if kind_of(called) is Kind.CONV else called.num_features)
                found = found.all_input_nodes[0]
    return None
