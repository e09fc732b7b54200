"""What a training step of a chain costs on each rung: a pure function of shapes.

Every kernel reads each input once and writes each output once, and every gradient is asked for. Vectors of a number
per channel, and what is summed of them, are launches without bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .schedule import Schedule

FP32_BYTES = 4
# Launches over channels or small matrices: a batch norm's numbers forward, backward, and those of the moments form.
FINALISED, FINISHED, MOMENTS_FORWARD, MOMENTS_BACKWARD = 1, 1, 2, 2


class ConvShape(NamedTuple):
    """One convolution of a chain.

    Attributes:
        read: pixels of the input that lie in some window, all images together.
        whole: pixels of the input.
        pixels: of the output.
        c, k: channels of input and output.
        weights: K * C / groups * R * S.
        pointwise: 1x1 over all channels without padding, so that the moments of its input give its statistics.
    """

    read: int
    whole: int
    pixels: int
    c: int
    k: int
    weights: int
    pointwise: bool

    @property
    def flops(self) -> int:
        return 2 * self.pixels * self.weights


class ChainShape(NamedTuple):
    """The layers in order, the projection or None, and the kind of shortcut, as in `ChainSpec`."""

    layers: tuple[ConvShape, ...]
    projection: ConvShape | None = None
    shortcut: str = "none"


class StemShape(NamedTuple):
    """A convolution and the pixels that max-pooling leaves; ``images_grad``: whether its input needs a gradient."""

    conv: ConvShape
    pooled: int
    images_grad: bool = False


class Pass(NamedTuple):
    """One launch; ``exact``: its products are of fp32 numbers where the tensors are, never of TF32."""

    moved: int = 0
    flops: int = 0
    exact: bool = False


def takes_moments(shape: ConvShape) -> bool:
    """Whether the moments form can pay: the moments of C channels cost C / K of the convolution, forward and back."""
    return shape.pointwise and 2 * shape.c <= shape.k


def chain_passes(chain: ChainShape, rung: Schedule, itemsize: int) -> Iterator[Pass]:
    """Every launch of a training step of the chain on a rung."""
    for i, layer in enumerate(chain.layers):
        end = i == len(chain.layers) - 1
        if end and rung.moments and takes_moments(layer):
            yield from _moments(layer, rung, itemsize, end=True, behind=i > 0, shortcut=chain.shortcut)
        else:
            yield from _written(layer, rung, itemsize, end=end, behind=i > 0, shortcut=chain.shortcut)
    if chain.projection is not None:
        if rung.moments and takes_moments(chain.projection):
            yield from _moments(chain.projection, rung, itemsize, end=False, behind=False, shortcut="none")
        else:
            yield from _projection(chain.projection, rung, itemsize)
    yield from _shortcut_gradient(chain, rung, itemsize)


def _sizes(layer: ConvShape, itemsize: int) -> tuple[int, int, int, int, int]:
    """Bytes of the input in windows, of its gradient, of the output, of its mask, of the weight."""
    x, dx = layer.read * layer.c * itemsize, layer.whole * layer.c * itemsize
    return x, dx, layer.pixels * layer.k * itemsize, layer.pixels * layer.k // 8, layer.weights * itemsize


def _written(
    layer: ConvShape, rung: Schedule, itemsize: int, *, end: bool, behind: bool, shortcut: str
) -> Iterator[Pass]:
    """A layer whose raw output is written; ``behind``: whether its input is another layer's output."""
    x, dx, y, bits, w = _sizes(layer, itemsize)
    yield Pass(x + w + y, layer.flops)
    yield from _numbers(y, rung)
    if end:
        joined = y if shortcut in ("identity", "zero_pad", "residual", "projection") else 0
        yield Pass(y + joined + y + bits)
    elif not rung.prologue:
        yield Pass(2 * y)
    # What arrives at the layer's output, with its mask: bits at the end, else the rectified output or y itself.
    mask = bits if end else 0 if rung.statistics else y
    if end or not rung.statistics:
        yield Pass(y + mask + y)
    yield from [Pass()] * FINISHED
    formed = y
    if rung.prologue:
        formed = 2 * y + (bits if end else 0)
    else:
        yield Pass(y + mask + y + y)
    epilogue = x if behind and rung.statistics else 0
    yield Pass(formed + w + epilogue + dx, layer.flops)
    yield Pass(formed + x + FP32_BYTES * layer.weights, layer.flops)


def _numbers(y: int, rung: Schedule) -> Iterator[Pass]:
    if not rung.statistics:
        yield Pass(y)
    yield from [Pass()] * FINALISED


def _projection(layer: ConvShape, rung: Schedule, itemsize: int) -> Iterator[Pass]:
    x, dx, y, bits, w = _sizes(layer, itemsize)
    yield Pass(x + w + y, layer.flops)
    yield from _numbers(y, rung)
    if not rung.statistics:
        yield Pass(2 * y)
    yield Pass(y + bits + y)
    yield from [Pass()] * FINISHED
    formed = 2 * y + bits if rung.prologue else y
    if not rung.prologue:
        yield Pass(y + bits + 2 * y)
    yield Pass(formed + w + dx, layer.flops)
    yield Pass(formed + x + FP32_BYTES * layer.weights, layer.flops)


def _moments(
    layer: ConvShape, rung: Schedule, itemsize: int, *, end: bool, behind: bool, shortcut: str
) -> Iterator[Pass]:
    """A layer whose output exists only behind the block's last ReLU."""
    x, dx, y, bits, w = _sizes(layer, itemsize)
    gram = layer.c * (layer.c + 1) * layer.pixels
    yield Pass(x, gram, exact=True)
    yield from [Pass()] * (MOMENTS_FORWARD + FINALISED)
    if end:
        joined = y if shortcut in ("identity", "zero_pad", "residual") else 0
        yield Pass(x + w + joined + y + bits, layer.flops)
    else:  # contracted by the pass that ends the block
        yield Pass(x + w, layer.flops)
    yield Pass(y + bits + x + FP32_BYTES * layer.weights, layer.flops)
    yield from [Pass()] * MOMENTS_BACKWARD
    yield Pass(y + bits + w + x + dx, layer.flops + 2 * layer.pixels * layer.c**2)


def _shortcut_gradient(chain: ChainShape, rung: Schedule, itemsize: int) -> Iterator[Pass]:
    """What joins the gradient of the block's input."""
    end, first = chain.layers[-1], chain.layers[0]
    arriving, bits = end.pixels * end.k * itemsize, end.pixels * end.k // 8
    at_input = first.whole * first.c * itemsize
    if chain.shortcut == "none":
        return
    if chain.shortcut == "projection":
        yield Pass(3 * at_input if not rung.statistics else at_input)
    elif chain.shortcut == "residual":
        yield Pass(2 * arriving + bits)
    elif rung.statistics and chain.shortcut == "identity":
        yield Pass(arriving + bits)
    else:
        yield Pass(2 * arriving + bits)
        yield Pass(3 * at_input)


def stem_passes(stem: StemShape, rung: Schedule, itemsize: int) -> Iterator[Pass]:
    """Every launch of a training step of convolution, batch norm, ReLU and max-pooling on a rung."""
    layer = stem.conv
    x, dx, y, _, w = _sizes(layer, itemsize)
    pooled, indices = stem.pooled * layer.k * itemsize, stem.pooled * layer.k
    yield Pass(x + w + y, layer.flops)
    yield from _numbers(y, rung)
    yield Pass(y + pooled + indices)
    yield Pass(pooled + indices + y)
    weight_grad = FP32_BYTES * layer.weights
    if rung.moments and not stem.images_grad:
        yield Pass(y + x + weight_grad, layer.flops)
        yield Pass(x, layer.flops // layer.k)
        yield Pass(y + x + weight_grad, layer.flops)
        yield from [Pass()] * MOMENTS_BACKWARD
        return
    yield Pass(2 * y)
    yield from [Pass()] * FINISHED
    formed = 2 * y if rung.prologue else y
    if not rung.prologue:
        yield Pass(3 * y)
    yield Pass(formed + x + weight_grad, layer.flops)
    if stem.images_grad:
        yield Pass(formed + w + dx, layer.flops)
