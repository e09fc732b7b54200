"""fusedres.autograd.dense: finite differences, statistics; parity is in tests/nn/test_dense.py."""

import pytest
import torch
from torch import Tensor

from fusedres.autograd import Dense
from fusedres.autograd.dense import DenseLayerSpec, DenseSpec
from fusedres.autograd.spec import LayerSpec
from fusedres.operands import Geometry, Layer, Norm, NormNumbers
from fusedres.patterns.choose import LIBRARY
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.backends import backend, current
from fusedres.runtime.call import Call

EVERY = {**SCHEDULES, "library": LIBRARY}
NORM, BARE = NormNumbers(eps=1e-3), NormNumbers(batch_stats=False)


def inputs(bottleneck: bool, seed: int) -> list[Tensor | None]:
    """x of two channels, then what `Dense` takes for two layers of one and two new channels."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    flat: list[Tensor | None] = [draw(2, 2, 3, 2)]
    for channels, growth in ((2, 1), (3, 2)):
        flat += Norm(draw(channels), draw(channels)).tensors
        if bottleneck:
            flat += Layer(draw(3, channels, 1, 1), norm=Norm(draw(3), draw(3))).tensors
        flat += Layer(draw(growth, 3 if bottleneck else channels, 3, 3)).tensors
    return flat


def spec_of(bottleneck: bool, schedule: str) -> DenseSpec:
    convs = (LayerSpec(Geometry(padding=(1, 1)), BARE),)
    if bottleneck:
        convs = (LayerSpec(Geometry(), NORM), *convs)
    call = Call(torch.float64, backend=current())
    return DenseSpec(call, EVERY[schedule], (DenseLayerSpec(NORM, convs),) * 2)


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("bottleneck", [True, False])
def test_gradcheck(bottleneck, schedule):
    """A step over a ReLU's kink would show, so seeds are tried until none is."""
    with backend("reference"):
        spec = spec_of(bottleneck, schedule)

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            return Dense.apply(x, None, spec, *rest)[0]

        for seed in range(6):
            try:
                assert torch.autograd.gradcheck(call, tuple(inputs(bottleneck, seed)), eps=1e-7, atol=1e-6, rtol=1e-5)
                return
            except torch.autograd.gradcheck.GradcheckError as error:
                failure = error
        raise failure


def test_the_statistics_returned_are_those_of_the_features():
    x, *rest = inputs(True, 0)
    z, count, mean, m2 = Dense.apply(x, None, spec_of(True, "prologue"), *rest)
    torch.testing.assert_close(mean[0], z.mean((0, 2, 3)))
    torch.testing.assert_close(m2[0] / count, z.var((0, 2, 3), correction=0))
    assert torch.equal(z[:, :2], x)
