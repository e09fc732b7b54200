"""fusedres.autograd.preact: finite differences; parity is in tests/nn/test_preact.py."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedres.autograd import PreAct
from fusedres.autograd.preact import PreActSpec
from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, ZeroPad
from fusedres.autograd.spec import LayerSpec
from fusedres.operands import Geometry, Layer, Norm, NormNumbers
from fusedres.patterns.choose import LIBRARY
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.backends import backend, current
from fusedres.runtime.call import Call

EVERY = {**SCHEDULES, "library": LIBRARY}
NORM, BARE = NormNumbers(eps=1e-3), NormNumbers(batch_stats=False)


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
    first = Norm(draw(tiny.channels[0]), draw(tiny.channels[0])) if tiny.preact else Norm()
    flat += first.tensors
    pairs = list(zip(tiny.channels, tiny.channels[1:], strict=False))
    for i, (c, k) in enumerate(pairs):
        last = i == len(pairs) - 1
        norm = Norm() if last else Norm(draw(k), draw(k))
        flat += Layer(draw(k, c, 3, 3), norm=norm).tensors
    if tiny.shortcut == "projection":
        flat += Layer(draw(tiny.channels[-1], tiny.channels[0], 1, 1)).tensors
    return flat


def spec_of(tiny: Tiny, schedule: str) -> PreActSpec:
    count = len(tiny.channels) - 1
    strides = [tiny.stride] + [1] * (count - 1)
    layers = tuple(LayerSpec(Geometry((s, s), (1, 1)), BARE if i == count - 1 else NORM) for i, s in enumerate(strides))
    stride = (tiny.stride, tiny.stride)
    shortcuts = {
        "identity": Identity(),
        "zero_pad": ZeroPad(stride),
        "projection": Projection(LayerSpec(Geometry(stride), BARE)),
        "none": NO_SHORTCUT,
    }
    return PreActSpec(
        Call(torch.float64, backend=current()), EVERY[schedule], layers, shortcuts[tiny.shortcut],
        NORM if tiny.preact else None, measured=EVERY[schedule].statistics,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_gradcheck(tiny, schedule):
    """By the definition of a derivative; a step over a ReLU's kink would show, so seeds are tried until none is."""
    with backend("reference"):
        spec = spec_of(tiny, schedule)

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            return PreAct.apply(x, None, spec, *rest)[0]

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
    z, *_ = PreAct.apply(x, None, spec_of(TINY["identity"], "prologue"), *rest)

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
    z, counts, mean, m2 = PreAct.apply(x, None, spec_of(tiny, "prologue"), *rest)
    assert not (counts.requires_grad or mean.requires_grad or m2.requires_grad)
    count = float(counts.sum())
    assert count == z.shape[0] * z.shape[2] * z.shape[3]
    torch.testing.assert_close(mean[0], z.mean((0, 2, 3)))
    torch.testing.assert_close(m2[0] / count, z.var((0, 2, 3), correction=0))
