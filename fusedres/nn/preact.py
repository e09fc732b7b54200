"""Fused forward passes of pre-activation blocks and of the batch norm and ReLU behind them."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedres.nn.fused import FusedPass
from fusedres.nn.layers import bare_layer_of, layer_of, norm_of, shortcut_of
from fusedres.nn.parts import (
    Named,
    NotFusable,
    Pair,
    check_fusable,
    pair_of,
    part,
    relu_part,
    why_not_bare,
    why_not_lone,
)
from fusedres.nn.plain import ZeroPadShortcut
from fusedres.patterns.bn_act import run_bn_act
from fusedres.patterns.preact import run_preact


class PreActParts(NamedTuple):
    """A pre-activation block taken apart: bn1 if it has one, convolutions with the norms behind them, the last."""

    norm: nn.Module | None
    inner: tuple[Pair, ...]
    last: nn.Module
    projection: nn.Module | None
    shortcut: str
    zero_pad_stride: tuple[int, int]
    others: tuple[Named, ...]

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
    check_fusable(why_not_bare(last, part(block, last)), None if norm is None else why_not_lone("bn1", norm))
    others = [relu_part(block, "relu")]
    if dropout is not None:
        others.append(("dropout", dropout))
    shortcut, kind, projection, stride = getattr(block, "downsample", None), "identity", None, (1, 1)
    if type(shortcut) is ZeroPadShortcut:
        kind, stride = "zero_pad", (shortcut.stride, shortcut.stride)
        others.append(("downsample", shortcut))
    elif shortcut is not None:
        kind, projection = "projection", shortcut
        check_fusable(why_not_bare("downsample", shortcut))
    return PreActParts(norm, inner, part(block, last), projection, kind, stride, tuple(others))


class FusedPreAct(FusedPass):
    """A pre-activation block as one autograd node."""

    fused_parts = staticmethod(preact_parts)

    def fused_pass(self, x: Tensor, parts: PreActParts) -> Tensor:
        projection = None if parts.projection is None else bare_layer_of(parts.projection)
        return run_preact(
            x,
            None if parts.norm is None else norm_of(parts.norm),
            [*(layer_of(pair) for pair in parts.inner), bare_layer_of(parts.last)],
            shortcut=shortcut_of(parts.shortcut, projection, parts.zero_pad_stride),
            schedule=self.fused_schedule,
        )


class NormParts(NamedTuple):
    """A batch norm and its ReLU taken apart."""

    norm: nn.Module
    convs: tuple[nn.Module, ...] = ()
    pairs: tuple[Pair, ...] = ()
    others: tuple[Named, ...] = ()

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,)


def bn_act_parts(module: nn.Module) -> NormParts:
    """Take apart a `plain.BNAct`.

    Raises:
        NotFusable: with the reason.
    """
    bn = part(module, "bn")
    check_fusable(why_not_lone("bn", bn))
    return NormParts(bn)


class FusedBNAct(FusedPass):
    """relu(bn(x)) as one autograd node, measured by whoever wrote x where that is a fused block."""

    fused_parts = staticmethod(bn_act_parts)

    def fused_pass(self, x: Tensor, parts: NormParts) -> Tensor:
        return run_bn_act(x, norm_of(parts.norm))
