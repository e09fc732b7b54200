"""Fused forward passes of pre-activation blocks and of the batch norm and ReLU behind them."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..preact_chain import run_bn_act, run_preact
from .fused import FusedPass
from .parts import (
    NotFusable,
    Pair,
    bare_layer_of,
    layer_of,
    norm_of,
    pair_of,
    part,
    why_not_bare,
    why_not_hooked,
    why_not_norm,
    why_not_others,
    why_not_pairs,
)
from .plain import ZeroPadShortcut


class PreActParts(NamedTuple):
    """A pre-activation block taken apart: bn1 if it has one, convolutions with the norms behind them, the last."""

    norm: nn.Module | None
    inner: tuple[Pair, ...]
    last: nn.Module
    projection: nn.Module | None
    shortcut: str
    zero_pad_stride: tuple[int, int]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.inner

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        last = (self.last,) if self.projection is None else (self.last, self.projection)
        return (*(pair.conv for pair in self.inner), *last)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        first = () if self.norm is None else (self.norm,)
        return (*first, *(pair.bn for pair in self.inner))


def preact_parts(block: Any) -> PreActParts:
    """Take apart a block with the names of `plain.PreActBlock`, every part of a kind that the fused pass replaces.

    Raises:
        NotFusable: with the reason.
    """
    depth = block.depth
    inner = tuple(pair_of(block, f"conv{i}", f"bn{i + 1}") for i in range(1, depth))
    dropout = getattr(block, "dropout", None)
    if dropout is not None and not (type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)):
        raise NotFusable("dropout stands between the last ReLU and its convolution")
    norm, last = getattr(block, "bn1", None), f"conv{depth}"
    reason = why_not_pairs(inner) or why_not_bare(last, part(block, last))
    if norm is not None:
        reason = reason or why_not_norm("bn1", norm) or why_not_hooked("bn1", norm)
    others = [(name, part(block, name)) for name in ("relu", "dropout") if getattr(block, name, None) is not None]
    shortcut, kind, projection, stride = getattr(block, "downsample", None), "identity", None, (1, 1)
    if type(shortcut) is ZeroPadShortcut:
        kind, stride = "zero_pad", (shortcut.stride, shortcut.stride)
        others.append(("downsample", shortcut))
    elif shortcut is not None:
        kind, projection = "projection", shortcut
        reason = reason or why_not_bare("downsample", shortcut)
    reason = reason or why_not_others(others)
    if reason:
        raise NotFusable(reason)
    return PreActParts(norm, inner, part(block, last), projection, kind, stride)


class FusedPreAct(FusedPass):
    """A pre-activation block as one autograd node."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> PreActParts:
        return preact_parts(module)

    def _run(self, x: Tensor, parts: PreActParts) -> Tensor:
        return run_preact(
            x,
            None if parts.norm is None else norm_of(parts.norm),
            [*(layer_of(pair) for pair in parts.inner), bare_layer_of(parts.last)],
            projection=None if parts.projection is None else bare_layer_of(parts.projection),
            shortcut=parts.shortcut,
            zero_pad_stride=parts.zero_pad_stride,
            schedule=self.fused_schedule,
        )


class NormParts(NamedTuple):
    """A batch norm and its ReLU taken apart."""

    norm: nn.Module
    convs: tuple[nn.Module, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,)


class FusedBNAct(FusedPass):
    """relu(bn(x)) as one autograd node, measured by whoever wrote x where that is a fused block."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> NormParts:
        bn = part(module, "bn")
        reason = why_not_norm("bn", bn) or why_not_hooked("bn", bn)
        if reason:
            raise NotFusable(reason)
        return NormParts(bn)

    def _run(self, x: Tensor, parts: NormParts) -> Tensor:
        return run_bn_act(x, norm_of(parts.norm))
