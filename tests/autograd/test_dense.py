"""fusedres.autograd.dense: finite differences, statistics; parity is in tests/nn/test_dense.py."""

import pytest
import torch
from torch import Tensor

from fusedres.autograd import Dense
from fusedres.autograd.dense import DenseLayerSpec, DenseSpec
from fusedres.autograd.preact import BARE
from fusedres.autograd.spec import ConvBN, LayerSpec, NormSpec, NormTensors
from fusedres.backends import backend
from fusedres.ops.contract import Geometry
from fusedres.plan import SCHEDULES
from fusedres.plan.choose import LIBRARY

EVERY = {**SCHEDULES, "library": LIBRARY}
NORM = NormSpec(eps=1e-3)


def inputs(bottleneck: bool, seed: int) -> list[Tensor | None]:
    """x of two channels, then what `Dense` takes for two layers of one and two new channels."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    flat: list[Tensor | None] = [draw(2, 2, 3, 2)]
    for channels, growth in ((2, 1), (3, 2)):
        flat += NormTensors(draw(channels), draw(channels))
        if bottleneck:
            flat += ConvBN(draw(3, channels, 1, 1), None, draw(3), draw(3))
        flat += ConvBN(draw(growth, 3 if bottleneck else channels, 3, 3))
    return flat


def spec_of(bottleneck: bool, schedule: str) -> DenseSpec:
    convs = (LayerSpec(Geometry(padding=(1, 1)), BARE),)
    if bottleneck:
        convs = (LayerSpec(Geometry(), NORM), *convs)
    return DenseSpec((DenseLayerSpec(NORM, convs),) * 2, EVERY[schedule])


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("bottleneck", [True, False])
def test_gradcheck(bottleneck, schedule):
    """A step over a ReLU's kink would show, so seeds are tried until none is."""
    spec = spec_of(bottleneck, schedule)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return Dense.apply(x, spec, *rest)[0]

    with backend("reference"):
        for seed in range(6):
            try:
                assert torch.autograd.gradcheck(call, tuple(inputs(bottleneck, seed)), eps=1e-7, atol=1e-6, rtol=1e-5)
                return
            except torch.autograd.gradcheck.GradcheckError as error:
                failure = error
        raise failure


def test_the_statistics_returned_are_those_of_the_features():
    x, *rest = inputs(True, 0)
    z, count, mean, m2 = Dense.apply(x, spec_of(True, "prologue"), *rest)
    torch.testing.assert_close(mean[0], z.mean((0, 2, 3)))
    torch.testing.assert_close(m2[0] / count, z.var((0, 2, 3), correction=0))
    assert torch.equal(z[:, :2], x)
