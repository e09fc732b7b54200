"""fusedres.ops.stem_contractions on kernels: weight gradients of few channels, dy at hand or still pooled."""

import pytest
import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, PoolGeometry
from fusedres.ops.stem_contractions import early_weight_grad, output_contraction, pooled_contraction
from fusedres.ops.stem_pool import stem_pool
from tests.comparison import relative_error
from tests.kernels.convolutions import Conv
from tests.kernels.executed import activation, covering, executed

CASES = {
    "ResNet's stem": (Conv((1, 3, 29, 26), 64, (7, 7), Geometry((2, 2), (3, 3))), PoolGeometry()),
    "tails of K, a wide pool": (
        Conv((2, 3, 15, 17), 24, (3, 3), Geometry(padding=(1, 1))),
        PoolGeometry((3, 2), (3, 1)),
    ),
    "one channel, windows beyond a tile": (Conv((1, 1, 20, 21), 16, (17, 17)), PoolGeometry((2, 2), (2, 2), (0, 0))),
    "enough channels to run along": (Conv((1, 16, 9, 8), 16, (3, 3), Geometry(padding=(1, 1))), PoolGeometry()),
    "dilated": (Conv((1, 4, 14, 13), 16, (3, 3), Geometry((1, 1), (2, 1), (2, 1))), PoolGeometry()),
}


def check(target: str, case: str, dtype: torch.dtype) -> None:
    conv, pool = CASES[case]
    p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
    y = activation((conv.size[0], conv.k, p, q), dtype, 0.5)
    scale, shift, mean = torch.rand(conv.k) + 0.5, torch.randn(conv.k), y.float().mean((0, 2, 3))
    z, index = stem_pool.reference(y, scale, shift, pool)
    dz, u = OutputGrad(activation(tuple(z.shape), dtype)), ConvInput(conv.input(dtype))
    rest = (conv.window, conv.geometry)

    weight, vectors = conv.weight(dtype), Normaliser(mean, *torch.rand(3, conv.k))

    def forward_and_back() -> tuple[Tensor, ...]:
        early = output_contraction(y, mean, u, *rest)
        late = pooled_contraction(dz, index, tuple(y.shape), pool, u, *rest)
        small = early_weight_grad(*late, p * q * conv.size[0], *early, weight, vectors)
        return *early, *late, small.dweight, small.dgamma

    ours, trace = executed(target, forward_and_back)
    assert trace.by_kernel()["conv_weight_grad_kernel"] == 2

    def computed(statistics: torch.dtype) -> tuple[Tensor, ...]:
        def to(tensor: Tensor) -> Tensor:
            return tensor.double() if statistics == torch.float64 else tensor

        source, numbers = ConvInput(to(u.tensor)), Normaliser(*map(to, vectors.vectors.values()))
        early = output_contraction.reference(to(y), to(mean), source, *rest)
        late = pooled_contraction.reference(OutputGrad(to(dz.g)), index, tuple(y.shape), pool, source, *rest)
        small = early_weight_grad.reference(*late, p * q * conv.size[0], *early, to(weight), numbers)
        return *early, *late, small.dweight, small.dgamma

    exact, theirs = computed(torch.float64), computed(torch.float32)
    names = ("E", "mean", "D", "sum(g)", "dweight", "dgamma")
    for name, mine, other, truth in zip(names, ours, theirs, exact, strict=True):
        error, allowed = relative_error(mine, truth), max(1.5 * relative_error(other, truth), 2e-6)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, case, dtype)
