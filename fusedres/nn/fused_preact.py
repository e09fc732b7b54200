"""Fused forward passes of pre-activation blocks and of the batch norm and ReLU behind them."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..preact_chain import run_bn_act, run_preact
from .fused import Fused
from .parts import (
    NotFusable,
    Pair,
    bare_layer_of,
    layer_of,
    norm_of,
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
    def convs(self) -> tuple[nn.Module, ...]:
        last = (self.last,) if self.projection is None else (self.last, self.projection)
        return (*(pair.conv for pair in self.inner), *last)


def preact_parts(block: Any) -> PreActParts:
    """Take apart a block with the names of `plain.PreActBlock`, every part of a kind that the fused pass replaces.

    Raises:
        NotFusable: with the reason.
    """
    modules, depth = block._modules, block.depth
    inner = tuple(Pair(modules[f"conv{i}"], modules[f"bn{i + 1}"], f"conv{i}", f"bn{i + 1}") for i in range(1, depth))
    dropout = modules.get("dropout")
    if dropout is not None and not (type(dropout) is nn.Dropout and (dropout.p == 0 or not block.training)):
        raise NotFusable("dropout stands between the last ReLU and its convolution")
    norm, last = modules.get("bn1"), f"conv{depth}"
    reason = why_not_pairs(inner) or why_not_bare(last, modules[last])
    if norm is not None:
        reason = reason or why_not_norm("bn1", norm) or why_not_hooked("bn1", norm)
    others = [(name, modules[name]) for name in ("relu", "dropout") if modules.get(name) is not None]
    shortcut, kind, projection, stride = modules.get("downsample"), "identity", None, (1, 1)
    if type(shortcut) is ZeroPadShortcut:
        kind, stride = "zero_pad", (shortcut.stride, shortcut.stride)
        others.append(("downsample", shortcut))
    elif shortcut is not None:
        kind, projection = "projection", shortcut
        reason = reason or why_not_bare("downsample", shortcut)
    reason = reason or why_not_others(others)
    if reason:
        raise NotFusable(reason)
    return PreActParts(norm, inner, modules[last], projection, kind, stride)


class FusedPreAct(Fused):
    """A pre-activation block as one autograd node."""

    def fused_convs(self) -> tuple[nn.Module, ...]:
        return preact_parts(self).convs

    def forward(self, x: Tensor) -> Tensor:
        if not self.goes_plain(x):
            try:
                parts = preact_parts(self)
            except NotFusable:
                pass
            else:
                return self._run(x, parts)
        plain: Tensor = super().forward(x)
        return plain

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


class FusedBNAct(Fused):
    """relu(bn(x)) as one autograd node, measured by whoever wrote x where that is a fused block."""

    def fused_convs(self) -> tuple[nn.Module, ...]:
        bn = self._modules["bn"]
        reason = why_not_norm("bn", bn) or why_not_hooked("bn", bn)  # type: ignore[arg-type]
        if reason:
            raise NotFusable(reason)
        return ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.goes_plain(x):
            try:
                self.fused_convs()
            except NotFusable:
                pass
            else:
                bn: Any = self._modules["bn"]
                return run_bn_act(x, norm_of(bn))
        plain: Tensor = super().forward(x)
        return plain
