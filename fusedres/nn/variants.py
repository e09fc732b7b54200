"""Fused forward passes of the blocks that the papers compare with the residual block: what a chain covers is one."""

from typing import Any

import torch
from torch import Tensor

from fusedres.activation import IDENTITY
from fusedres.autograd.shortcut import NO_SHORTCUT
from fusedres.functional import add_act
from fusedres.nn.chain import BlockParts, FusedBlock, residual_parts
from fusedres.nn.in_graph import Told
from fusedres.nn.layers import bare_layer_of, layer_of, norm_of, shortcut_of
from fusedres.nn.parts import NotFusable, check_fusable, relu_part, why_not_bare
from fusedres.patterns.bn_act import run_bn_act
from fusedres.patterns.preact import run_preact
from fusedres.runtime.torch_private import constant_to_compilers


def rectified_parts(block: Any) -> BlockParts:
    """Take apart a `plain.ResidualBlock` whose own code has ReLUs too.

    Raises:
        NotFusable: with the reason.
    """
    relu_part(block, "relu")
    return residual_parts(block, block.depth)


def joined_parts(block: Any) -> BlockParts:
    """The same of one that has a shortcut."""
    parts = rectified_parts(block)
    if parts.shortcut == "none":
        raise NotFusable("there is no shortcut")
    return parts


def ordered_parts(block: Any) -> BlockParts:
    """The same of one in an order of figure 4 of He et al. 2016."""
    parts = joined_parts(block)
    last = parts.chain[-1]
    # There batch norm comes after the sum.
    check_fusable(why_not_bare(last.conv_name, last.conv) if block.order == "bn_after_add" else None)
    return parts


class FusedBeside(FusedBlock):
    """The residual, the sum and the ReLU as one autograd node; the shortcut beside it by its own modules."""

    fused_parts = staticmethod(joined_parts)

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        plain: Any = self
        return self.run_chain(x, parts, residual=plain.shortcut(x), **options)


class FusedScaled(FusedBeside):
    """Constant scaling: the residual's factor is in its last gamma and beta."""

    residual_scale: float

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        return super().fused_pass(x, parts, gain=self.residual_scale)


class FusedGated(FusedBeside):
    """Gates as they are; the residual as one node, with the sum and the ReLU where the gate leaves it alone."""

    exclusive: bool

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        plain: Any = self
        gate, shortcut = plain.gate_and_shortcut(x)
        if not self.exclusive:
            return self.run_chain(x, parts, residual=shortcut)
        return torch.relu(shortcut + gate * self.run_chain(x, parts, alone=True, act=IDENTITY))


class FusedStochastic(FusedBlock):
    """A residual block that in training is there or not, and in evaluation by the probability of its being there."""

    fused_parts = staticmethod(rectified_parts)
    survival: float

    @constant_to_compilers
    def fused_told(self) -> Told | None:
        # A draw decides what runs in training, of which a graph would hold one.
        return None if self.training else super().fused_told()

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        plain: Any = self
        if not self.training:
            return self.run_chain(x, parts, gain=self.survival)
        # The same draw as the plain block's.
        if torch.rand(()).item() >= self.survival:
            return torch.relu(plain.shortcut(x))
        return self.run_chain(x, parts)


class FusedOrdered(FusedBeside):
    """The orders of figure 4 of He et al. 2016, from the chains that they contain."""

    fused_parts = staticmethod(ordered_parts)
    order: str

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        plain: Any = self
        if self.order == "relu_only":
            return self.run_chain(torch.relu(x), parts, residual=plain.shortcut(x), act=IDENTITY)
        if self.order == "relu_before_add":
            return add_act(self.run_chain(x, parts, alone=True), plain.shortcut(x), act=None)
        # The sum is measured as it is written, for the batch norm behind it.
        *inner, last = parts.chain
        outside = parts.projection is not None
        total = run_preact(
            x,
            None,
            [*(layer_of(pair) for pair in inner), bare_layer_of(last.conv)],
            shortcut=NO_SHORTCUT if outside else shortcut_of(parts.shortcut, None, parts.zero_pad_stride),
            schedule=self.fused_schedule,
        )
        if outside:
            total = total + plain.shortcut(x)
        return run_bn_act(total, norm_of(last.bn))
