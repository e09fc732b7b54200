"""What a training step of a chain costs on each rung: a pure function of shapes.

Every kernel reads each input once and writes each output once, and every gradient is asked for. Vectors of a number
per channel, and what is summed of them, are launches without bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, Shortcut, ZeroPad
from fusedres.compiler.targets import Target
from fusedres.plan.backward_tiles import BackwardTile, backward_tile, writing_pays
from fusedres.plan.conv_tiles import weight_grad_tiles
from fusedres.plan.schedule import Schedule
from fusedres.plan.shapes import ConvVariant
from fusedres.plan.tiles import MOST_PARTS

FP32_BYTES = 4
# Launches over channels and small matrices in the moments form.
MOMENTS_FORWARD, MOMENTS_BACKWARD = 2, 2
# A batch norm's numbers are summed of the parts that its convolution's tiles of pixels make; of many, in two steps.
TILE = 128
# The stem's without its raw output, by the library.
EARLY = 17


class LayerShape(NamedTuple):
    """One convolution of a chain.

    Attributes:
        read: pixels of the input that lie in some window, all images together.
        whole: pixels of the input.
        pixels: of the output.
        c, k: channels of input and output.
        groups: of channels.
        window: (R, S).
        padded: whether windows reach beyond the input.
    """

    read: int
    whole: int
    pixels: int
    c: int
    k: int
    groups: int = 1
    window: tuple[int, int] = (1, 1)
    padded: bool = False

    @property
    def weights(self) -> int:
        return self.k * self.c // self.groups * math.prod(self.window)

    @property
    def flops(self) -> int:
        return 2 * self.pixels * self.weights

    @property
    def pointwise(self) -> bool:
        """Whether the moments of the input's channels tell the statistics of the output."""
        return self.window == (1, 1) and not self.padded and self.groups == 1


class ChainShape(NamedTuple):
    """The layers in order, and what joins them, as in `ChainSpec`; a projection is of a `LayerShape`."""

    layers: tuple[LayerShape, ...]
    shortcut: Shortcut = NO_SHORTCUT

    @property
    def projection(self) -> LayerShape | None:
        """The shape of a projection."""
        return self.shortcut.layer if isinstance(self.shortcut, Projection) else None


class StemShape(NamedTuple):
    """A convolution and the pixels that max-pooling leaves; ``images_grad``: whether its input needs a gradient."""

    conv: LayerShape
    pooled: int
    images_grad: bool = False


class Pass(NamedTuple):
    """One launch; ``exact``: its products are of fp32 numbers where the tensors are, never of TF32."""

    moved: int = 0
    flops: int = 0
    exact: bool = False


def takes_moments(layer: LayerShape) -> bool:
    """Whether the moments form can pay: the moments of C channels cost C / K of the convolution, forward and back."""
    return layer.pointwise and 2 * layer.c <= layer.k


class _Sizes(NamedTuple):
    """Bytes of a layer's input in windows, of its gradient, of the output, of its mask, of the weight."""

    x: int
    dx: int
    y: int
    bits: int
    w: int

    @classmethod
    def of(cls, layer: LayerShape, itemsize: int) -> _Sizes:
        y = layer.pixels * layer.k
        read, whole = layer.read * layer.c, layer.whole * layer.c
        return cls(read * itemsize, whole * itemsize, y * itemsize, y // 8, layer.weights * itemsize)


def chain_passes(chain: ChainShape, rung: Schedule, itemsize: int, target: Target) -> Iterator[Pass]:
    """Every launch of a training step of the chain on a rung."""
    last = len(chain.layers) - 1
    for i, layer in enumerate(chain.layers):
        joining = _joining(chain, rung, itemsize) if i == 0 else 0
        if i == last and rung.moments and takes_moments(layer):
            yield from _moments(layer, itemsize, target, residual=_residual(chain, rung, itemsize), joining=joining)
        elif i == last:
            yield from _written(layer, rung, itemsize, target, behind=i > 0, joining=joining)
            sizes = _Sizes.of(layer, itemsize)
            yield Pass(2 * sizes.y + sizes.bits + _residual(chain, rung, itemsize))
        else:
            yield from _written(layer, rung, itemsize, target, behind=i > 0, joining=joining, inner=True)
    if chain.projection is not None:
        projection = _sampled(chain.projection)
        if rung.moments and takes_moments(projection):
            yield from _moments(projection, itemsize, target)
        else:
            yield from _written(projection, rung, itemsize, target)
            if not rung.statistics:  # normalised before it joins
                yield Pass(2 * _Sizes.of(chain.projection, itemsize).y)
    if isinstance(chain.shortcut, Residual):
        end = _Sizes.of(chain.layers[-1], itemsize)
        yield Pass(2 * end.y + end.bits)


def _residual(chain: ChainShape, rung: Schedule, itemsize: int) -> int:
    """Bytes of the shortcut that the block's end reads: none where it contracts the projection itself."""
    if isinstance(chain.shortcut, ZeroPad):  # the pixels that it looks at
        return chain.layers[-1].pixels * chain.layers[0].c * itemsize
    contracted = chain.projection is not None and rung.moments and takes_moments(chain.projection)
    return 0 if chain.shortcut == NO_SHORTCUT or contracted else _Sizes.of(chain.layers[-1], itemsize).y


def _joining(chain: ChainShape, rung: Schedule, itemsize: int) -> int:
    """Bytes that the first layer's input gradient reads of what comes by the shortcut."""
    end = chain.layers[-1]
    if isinstance(chain.shortcut, (Identity, ZeroPad)):
        values = end.pixels * chain.layers[0].c
        return values * itemsize + values // 8
    return 0 if chain.projection is None else _Sizes.of(_sampled(chain.projection), itemsize).dx


def _sampled(projection: LayerShape) -> LayerShape:
    """A projection whose input's gradient is written at the pixels alone that it reads, where it is 1x1."""
    return projection._replace(whole=projection.pixels) if projection.pointwise else projection


def _written(
    layer: LayerShape,
    rung: Schedule,
    itemsize: int,
    target: Target,
    *,
    behind: bool = False,
    joining: int = 0,
    inner: bool = False,
) -> Iterator[Pass]:
    """A layer whose raw output is written, but for what ends its block.

    Args:
        layer, rung, itemsize: of the layer.
        behind: whether another layer made its input.
        joining: bytes that join its input's gradient.
        inner: whether another layer consumes its output, so that its sums may come from that layer's epilogue.
    """
    x, dx, y, bits, w = _Sizes.of(layer, itemsize)
    yield Pass(x + w + y, layer.flops)
    if not rung.statistics:
        yield Pass(y)
    yield from _numbers(layer, parts=rung.statistics)
    if inner and not rung.prologue:
        yield Pass(2 * y)
    # At the output's gradient stand bits at the block's end, and inside of it the rectified output or nothing.
    mask = bits if not inner else 0 if rung.statistics else y
    if not (inner and rung.statistics):
        yield Pass(2 * y + mask)
    yield from _numbers(layer, parts=rung.statistics and inner)
    tile = _joint_tile(layer, rung, itemsize, target, producer=behind and rung.statistics, bits=bool(mask))
    at_hand = not rung.prologue or (tile is None and writing_pays(_variant(layer, itemsize, operands=2), target))
    formed = y if at_hand else 2 * y + mask
    if at_hand:
        yield Pass(3 * y + mask)
    if tile is not None:
        yield from _in_parts(formed + x + w + dx + joining, 2 * layer.flops, tile.parts, layer)
        return
    yield Pass(formed + w + (x if behind and rung.statistics else 0) + dx + joining, layer.flops)
    yield from _weight_gradient(layer, formed + x, itemsize, target, parts=rung.prologue)


def _numbers(layer: LayerShape, *, parts: bool) -> Iterator[Pass]:
    """What makes a batch norm's numbers of its sums; ``parts``: whether these come in one for each tile of pixels."""
    yield from [Pass()] * (2 if parts and layer.pixels > TILE * MOST_PARTS else 1)


def _moments(
    layer: LayerShape, itemsize: int, target: Target, *, residual: int | None = None, joining: int = 0
) -> Iterator[Pass]:
    """A layer whose output exists only behind the block's last ReLU; a projection has no ``residual``."""
    x, dx, y, bits, w = _Sizes.of(layer, itemsize)
    yield Pass(x, layer.c * (layer.c + 1) * layer.pixels, exact=True)
    yield from [Pass()] * MOMENTS_FORWARD
    if residual is None:  # contracted in the pass that ends the block
        yield Pass(x + w, layer.flops)
    else:
        yield Pass(x + w + residual + y + bits, layer.flops)
    yield from _weight_gradient(layer, y + bits + x, itemsize, target, parts=True)
    yield from [Pass()] * MOMENTS_BACKWARD
    yield Pass(y + bits + w + x + dx + joining, layer.flops + 2 * layer.pixels * layer.c**2)


def _weight_gradient(layer: LayerShape, read: int, itemsize: int, target: Target, *, parts: bool) -> Iterator[Pass]:
    """The contraction over the pixels, and the sum of its parts where it is a kernel of ours."""
    tiles = weight_grad_tiles(_variant(layer, itemsize), target) if parts else ()
    if not tiles:
        yield Pass(read + layer.weights * itemsize, layer.flops)
        if itemsize < FP32_BYTES:
            yield Pass(layer.weights * (itemsize + FP32_BYTES))
        return
    yield from _in_parts(read, layer.flops, tiles[0].parts, layer)


def _joint_tile(
    layer: LayerShape, rung: Schedule, itemsize: int, target: Target, *, producer: bool, bits: bool
) -> BackwardTile | None:
    """Of the launch that makes both gradients of a convolution of stride 1, as `conv_backward` asks for it."""
    if layer.pixels != layer.whole:
        return None
    shape = _variant(layer, itemsize, operands=2 if rung.prologue else 1)._replace(prologue=producer)
    return backward_tile(shape, target, bits=bits and rung.prologue)


def _variant(layer: LayerShape, itemsize: int, operands: int = 1) -> ConvVariant:
    """The convolution as its tiles depend on it; ``operands``: of how many tensors dy is formed."""
    c, k = layer.c // layer.groups, layer.k // layer.groups
    return ConvVariant(layer.pixels, c, k, layer.groups, *layer.window, itemsize, operands=operands)


def _in_parts(moved: int, flops: int, parts: int, layer: LayerShape) -> Iterator[Pass]:
    """A launch that leaves a weight's gradient in parts, and the sum of these."""
    dw = FP32_BYTES * layer.weights
    yield Pass(moved + parts * dw, flops)
    if parts > 1:
        yield Pass((parts + 1) * dw)


def stem_passes(stem: StemShape, rung: Schedule, itemsize: int, target: Target) -> Iterator[Pass]:
    """Every launch of a training step of convolution, batch norm, ReLU and max-pooling on a rung."""
    layer = stem.conv
    x, dx, y, _, w = _Sizes.of(layer, itemsize)
    pooled, indices = stem.pooled * layer.k * itemsize, stem.pooled * layer.k
    yield Pass(x + w + y, layer.flops)
    if not rung.statistics:
        yield Pass(y)
    yield from _numbers(layer, parts=rung.statistics)
    yield Pass(y + pooled + indices)
    if rung.moments and not stem.images_grad:
        for output in (y, pooled + indices):
            yield from _weight_gradient(layer, output + x, itemsize, target, parts=True)
        yield from [Pass()] * EARLY
        return
    yield Pass(pooled + indices + y)
    yield Pass(2 * y)
    yield from _numbers(layer, parts=False)
    formed = 2 * y if rung.prologue else y
    if not rung.prologue:
        yield Pass(3 * y)
    yield from _weight_gradient(layer, formed + x, itemsize, target, parts=rung.prologue)
    if stem.images_grad:
        yield Pass(formed + w + dx, layer.flops)
