"""Fused forward passes of the blocks that the papers compare with the residual block: what a chain covers is one."""

from typing import Any

import torch
from torch import Tensor

from ..chain import run_chain
from ..functional import add_act
from ..preact_chain import run_bn_act, run_preact
from .fused import FusedBlock
from .parts import (
    BlockParts,
    NotFusable,
    bare_layer_of,
    layer_of,
    norm_of,
    residual_parts,
    why_not_bare,
)


class FusedBeside(FusedBlock):
    """The residual, the sum and the ReLU as one autograd node; the shortcut beside it by its own modules."""

    depth: int

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        parts = residual_parts(block, block.depth)
        if parts.shortcut == "none":
            raise NotFusable("there is no shortcut")
        return parts

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        plain: Any = self
        return self._run_beside(x, parts, plain.shortcut(x))

    def _run_beside(
        self, x: Tensor, parts: BlockParts, residual: Tensor | None, *, act: str | None = "relu", gain: float = 1.0
    ) -> Tensor:
        """act(F(x) * gain + residual)."""
        *inner, last = (layer_of(pair) for pair in parts.chain)
        return run_chain(
            x,
            [*inner, last._replace(gain=gain)],
            shortcut="none" if residual is None else "residual",
            residual=residual,
            act=act,
            schedule=self.fused_schedule,
        )


class FusedScaled(FusedBeside):
    """Constant scaling: the residual's factor is in its last gamma and beta."""

    residual_scale: float

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        plain: Any = self
        return self._run_beside(x, parts, plain.shortcut(x), gain=self.residual_scale)


class FusedGated(FusedBeside):
    """Gates as they are; the residual as one node, with the sum and the ReLU where the gate leaves it alone."""

    exclusive: bool

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        plain: Any = self
        gate, shortcut = plain.gated(x)
        if not self.exclusive:
            return self._run_beside(x, parts, shortcut)
        return torch.relu(shortcut + gate * self._run_beside(x, parts, None, act=None))


class FusedStochastic(FusedBlock):
    """A residual block that in training is there or not, and in evaluation by the probability of its being there."""

    survival: float

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        return residual_parts(block, 2)

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        plain: Any = self
        if not self.training:
            return self._run_chain(x, parts, gain=self.survival)
        # The same draw as the plain block's.
        if torch.rand(()).item() >= self.survival:
            return torch.relu(plain.shortcut(x))
        return self._run_chain(x, parts)


class FusedOrdered(FusedBeside):
    """The orders of figure 4 of He et al. 2016, from the chains that they contain."""

    order: str

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        parts = super().blocks_parts(block)
        last = parts.chain[-1]
        # There batch norm comes after the sum.
        reason = why_not_bare(last.conv_name, last.conv) if block.order == "bn_after_add" else None
        if reason:
            raise NotFusable(reason)
        return parts

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        plain: Any = self
        if self.order == "relu_only":
            return self._run_beside(torch.relu(x), parts, plain.shortcut(x), act=None)
        if self.order == "relu_before_add":
            return add_act(self._run_beside(x, parts, None), plain.shortcut(x), act=None)
        # The sum is measured as it is written, for the batch norm behind it.
        *inner, last = parts.chain
        outside = parts.projection is not None
        total = run_preact(
            x,
            None,
            [*(layer_of(pair) for pair in inner), bare_layer_of(last.conv)],
            shortcut="none" if outside else parts.shortcut,
            zero_pad_stride=parts.zero_pad_stride,
            schedule=self.fused_schedule,
        )
        if outside:
            total = total + plain.shortcut(x)
        return run_bn_act(total, norm_of(last.bn))
