"""fusedres.autograd.preact: finite differences; parity is in tests/nn/test_preact.py."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedres.autograd import PreAct
from fusedres.autograd.preact import BARE, PreActSpec
from fusedres.autograd.spec import ConvBN, LayerSpec, NormSpec, NormTensors
from fusedres.backends import backend
from fusedres.ops.contract import Geometry
from fusedres.plan import SCHEDULES
from fusedres.plan.choose import LIBRARY

EVERY = {**SCHEDULES, "library": LIBRARY}
NORM = NormSpec(eps=1e-3)


class Tiny(NamedTuple):
    channels: tuple[int, ...]
    shortcut: str
    preact: bool = True
    stride: int = 1


TINY = {
    "identity": Tiny((2, 3, 2), "identity"),
    "identity, activated before": Tiny((2, 3, 2), "identity", preact=False),
    "projection": Tiny((2, 2, 3), "projection", stride=2),
    "zero-pad": Tiny((2, 2, 3), "zero_pad", stride=2),
    "one convolution, no shortcut": Tiny((3, 2), "none"),
}


def inputs(tiny: Tiny, seed: int) -> list[Tensor | None]:
    """x, then the tensors that `PreAct` takes, without running statistics."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    flat: list[Tensor | None] = [draw(2, tiny.channels[0], 3, 2)]
    first = NormTensors(draw(tiny.channels[0]), draw(tiny.channels[0])) if tiny.preact else NormTensors()
    flat += first
    pairs = list(zip(tiny.channels, tiny.channels[1:], strict=False))
    for i, (c, k) in enumerate(pairs):
        last = i == len(pairs) - 1
        flat += ConvBN(draw(k, c, 3, 3), None, *(() if last else (draw(k), draw(k))))
    if tiny.shortcut == "projection":
        flat += ConvBN(draw(tiny.channels[-1], tiny.channels[0], 1, 1))
    return flat


def spec_of(tiny: Tiny, schedule: str) -> PreActSpec:
    count = len(tiny.channels) - 1
    strides = [tiny.stride] + [1] * (count - 1)
    layers = tuple(LayerSpec(Geometry((s, s), (1, 1)), BARE if i == count - 1 else NORM) for i, s in enumerate(strides))
    projected = LayerSpec(Geometry((tiny.stride, tiny.stride)), BARE) if tiny.shortcut == "projection" else None
    return PreActSpec(
        NORM if tiny.preact else None, layers, EVERY[schedule], torch.float64, tiny.shortcut, projected,
        (tiny.stride, tiny.stride), measured=EVERY[schedule].statistics,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_gradcheck(tiny, schedule):
    """By the definition of a derivative; a step over a ReLU's kink would show, so seeds are tried until none is."""
    spec = spec_of(tiny, schedule)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return PreAct.apply(x, spec, *rest)[0]

    with backend("reference"):
        for seed in range(6):
            try:
                assert torch.autograd.gradcheck(call, tuple(inputs(tiny, seed)), eps=1e-7, atol=1e-6, rtol=1e-5)
                return
            except torch.autograd.gradcheck.GradcheckError as error:
                failure = error
        raise failure


def test_without_a_gradient_there_is_none_for_anybody():
    """As when whoever consumes the output returns None for it."""
    x, *rest = inputs(TINY["identity"], 0)
    z, *_ = PreAct.apply(x, spec_of(TINY["identity"], "prologue"), *rest)

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    (Drop.apply(z).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(tensor.grad is None for tensor in rest if tensor is not None)


def test_the_statistics_returned_are_those_of_the_output():
    tiny = TINY["identity"]
    x, *rest = inputs(tiny, 0)
    z, counts, mean, m2 = PreAct.apply(x, spec_of(tiny, "prologue"), *rest)
    assert not (counts.requires_grad or mean.requires_grad or m2.requires_grad)
    count = float(counts.sum())
    assert count == z.shape[0] * z.shape[2] * z.shape[3]
    torch.testing.assert_close(mean[0], z.mean((0, 2, 3)))
    torch.testing.assert_close(m2[0] / count, z.var((0, 2, 3), correction=0))
