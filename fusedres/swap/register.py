"""register: a block of one's own, taken apart by the names of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fusedres.activation import activation_named
from fusedres.nn.chain import BlockParts, FusedResidual, activations_of
from fusedres.nn.fused import Fused, fused_type
from fusedres.nn.parts import NotFusable, Pair, pair_of, part
from fusedres.nn.proof import prove_class
from fusedres.swap.registry import fused_again, register_class

Names = tuple[str, str]


def register(
    cls: type[nn.Module],
    *,
    chain: Sequence[Names],
    act: str | Sequence[str] | None = "relu",
    projection: Names | None = None,
    shortcut: str = "identity",
    others: Sequence[str] = (),
) -> None:
    """Say of a class what its blocks are made of, where `fuse` does not find it in their forward.

    The forward has to be ``act(bn(conv(... act(bn(conv(x))))) + shortcut)``. `fuse` holds the first block of each kind
    against the plain forward, in fp64 on a small input, and leaves it alone if they differ; `report` says so.

    Args:
        cls: the class; those that derive from it and compute as it does are registered with it.
        chain: the names of each convolution and of the batch norm behind it, in order; ``"f.0"`` is a part of a part.
        act: the name of an activation (`fusedres.activation.NAMED`) or None, everywhere; or the names of the modules of
            the activations, in order, that behind the sum last; one may stand for all.
        projection: the names of the convolution and the batch norm of the shortcut, which some blocks may lack: these
            have ``shortcut``.
        shortcut: ``"identity"`` or ``"none"``.
        others: the names of containers that the forward calls, of which nobody may wait for a call.

    Raises:
        TypeError, ValueError: naming the argument; nothing is registered then.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a class of torch.nn.Module, got {cls!r}")
    if issubclass(cls, Fused):
        raise ValueError(f"cls: expected a plain class, got {cls.__name__}, which is fused")
    chain = [_names("chain", names) for names in chain]
    if not chain:
        raise ValueError("chain: expected the names of at least one convolution and its batch norm, got none")
    if projection is not None:
        projection = _names("projection", projection)
    if shortcut not in ("identity", "none"):
        raise ValueError(f"shortcut: expected 'identity' or 'none', got {shortcut!r}")
    if act is None or isinstance(act, str):
        activation_named(act)
        acts: Sequence[str] = ()
    else:
        acts = list(act)
        if len(acts) not in (1, len(chain)) or not all(isinstance(name, str) for name in acts):
            raise ValueError(f"act: expected 1 or {len(chain)} names of modules, got {acts!r}")
    register_class(cls, _fused_class(cls, chain, act, acts, projection, shortcut, tuple(others)))


def _names(argument: str, names: Any) -> Names:
    if not (isinstance(names, tuple | list) and len(names) == 2 and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{argument}: expected the names of a convolution and a batch norm, got {names!r}")
    return names[0], names[1]


def _fused_class(
    cls: type[nn.Module], chain: Sequence[Names], act: Any, acts: Sequence[str], projection: Names | None,
    shortcut: str, others: Sequence[str],
) -> type[Fused]:  # fmt: skip
    def parts_as_named(block: nn.Module) -> BlockParts:
        named = [(name, part(block, name)) for name in acts]
        inner, end = activations_of(named) if named else (activation_named(act),) * 2
        joins = None if projection is None else _pair_if_there(block, projection)
        kind = shortcut if joins is None else "projection"
        called = (*named, *((name, part(block, name)) for name in others))
        pairs = tuple(pair_of(block, *names) for names in chain)
        return BlockParts(pairs, joins, kind, end, (1, 1), called, inner=inner)

    def parts(block: nn.Module) -> BlockParts:
        found = parts_as_named(block)
        reason = refusal(block, found)
        if reason is not None:
            raise NotFusable(reason)
        return found

    # Which tries the pass itself, of blocks that were not tried yet.
    trial = fused_type(FusedResidual, cls, parts_as_named)
    tried: dict[Any, str | None] = {}

    def refusal(block: nn.Module, found: BlockParts) -> str | None:
        first: Any = found.chain[0].conv
        key = tuple(_kind_of(pair) for pair in found.pairs), found.shortcut, found.act, found.inner
        if key not in tried:
            tried[key] = prove_class(trial, block, first.in_channels)
        return tried[key]

    return fused_type(FusedResidual, cls, parts, fused_made_by=(fused_again, cls))


def _kind_of(pair: Pair) -> Any:
    conv: Any = pair.conv
    geometry = tuple(str(getattr(conv, name, None)) for name in ("kernel_size", "stride", "padding", "dilation"))
    return type(conv), type(pair.bn), geometry, getattr(conv, "groups", 1) == 1


def _pair_if_there(block: nn.Module, names: Names) -> Pair | None:
    """A convolution and its batch norm, or None where the container of both is missing or empty."""
    try:
        return pair_of(block, *names)
    except NotFusable:
        container = names[0].rpartition(".")[0] or names[0]
        found: Any = block
        for step in container.split("."):
            found = getattr(found, step, None)
        if found is None or (isinstance(found, nn.Sequential) and not len(found)) or type(found) is nn.Identity:
            return None
        raise
