"""fusedres.kernels.bn_backward, compiled and executed: sums, coefficients, and the gradient at the input."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fusedres.operands import Normaliser, OutputGrad
from fusedres.ops.act_mask import act_backward, pack_relu_mask
from fusedres.ops.bn_backward import bn_backward, bn_backward_apply, bn_backward_reduce
from fusedres.ops.zero_pad_shortcut import ZeroPaddedGrad, zero_pad_size
from fusedres.plan.tiles import pinned, reduction_tiles
from tests.comparison import assert_as_accurate_as_eager
from tests.kernels.executed import MEASURABLE, SIZES, TESTED, Size, activation, covering, executed

MASKS = ("none", "bits", "output")
EPS = 1e-5
each_target = pytest.mark.parametrize("target", TESTED)


class Operands:
    """A batch norm with its ReLU behind, and a gradient that arrives there."""

    def __init__(self, size: Size, dtype: torch.dtype, mask: str) -> None:
        self.y, self.g = activation(size, dtype, mean=0.5), activation(size, dtype, mean=0.1)
        self.gamma = torch.rand(size[1]) + 0.5
        z = torch.relu(activation(size, dtype))
        self.open = z > 0 if mask != "none" else torch.ones_like(z, dtype=torch.bool)
        self.mask = {"none": None, "bits": pack_relu_mask(z), "output": z}[mask.removeprefix("pooled, ")]
        if mask.startswith("pooled"):
            self.g = self.g[:, :, :1, :1].contiguous().expand(size)

    def norm(self, dtype: torch.dtype) -> Normaliser:
        y = self.y.to(dtype)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        invstd = torch.rsqrt(var + EPS)
        scale = invstd * self.gamma.to(dtype)
        return Normaliser(mean, invstd, scale, -mean * scale)

    def eager(self, dtype: torch.dtype, statistics: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(dy, dgamma, dbeta) as the library computes them from the masked gradient."""
        norm = self.norm(statistics)
        g = torch.where(self.open, self.g, 0.0).to(dtype)
        given = torch.ops.aten.native_batch_norm_backward(
            g, self.y.to(dtype), self.gamma.to(statistics), None, None, norm.mean, norm.invstd, True, EPS, [True] * 3
        )
        dy, dgamma, dbeta = given
        return dy, dgamma, dbeta

    @property
    def arriving(self) -> OutputGrad:
        return OutputGrad(self.g, self.mask)


def check(target: str, size: Size, dtype: torch.dtype, mask: str) -> None:
    operands = Operands(size, dtype, mask)
    norm = operands.norm(torch.float32)
    ours, trace = executed(
        target, lambda: bn_backward(operands.arriving, operands.y, norm, operands.gamma, batch_stats=True)
    )
    names = ("bn_backward_reduce_kernel", "bn_backward_finish_kernel", "bn_backward_apply_kernel")
    assert trace.by_kernel() == dict.fromkeys(names, 1)
    theirs, exact = operands.eager(dtype, torch.float32), operands.eager(torch.float64, torch.float64)
    for name, our, their, truth in zip(("dy", "dgamma", "dbeta"), ours, theirs, exact, strict=True):
        assert_as_accurate_as_eager(our, their.to(our.dtype), truth, name=name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("case", "target", "dtype"), covering(MEASURABLE))
def test_agrees(case: str, target: str, dtype: torch.dtype, mask: str) -> None:
    check(target, MEASURABLE[case], dtype, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("case", "target", "dtype"), covering(["many tiles of rows, the last one short", "odd C"]))
def test_parts_of_several_tiles(case: str, target: str, dtype: torch.dtype, mask: str) -> None:
    with patch("fusedres.plan.tiles.PROGRAMS", 3):
        check(target, SIZES[case], dtype, mask)


@pytest.mark.parametrize(
    ("case", "target", "dtype"), covering(["a stage of ResNet-50", "odd C", "one pixel"], offset=1)
)
def test_a_pooled_gradient_is_read_as_it_is(case: str, target: str, dtype: torch.dtype) -> None:
    if case != "one pixel":
        check(target, SIZES[case], dtype, "pooled, bits")
    operands = Operands(SIZES[case], dtype, "pooled, bits")
    out, trace = executed(target, lambda: act_backward(operands.g, operands.mask))
    assert torch.equal(out, torch.where(operands.open, operands.g, 0.0))
    n, c = SIZES[case][:2]
    assert trace.launches[0].read["g_ptr"] == n * c * dtype.itemsize


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "a row is several pieces", "odd C"]))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    size = SIZES[case]
    for tile in reduction_tiles(size[0] * size[2] * size[3], size[1]):
        with pinned(tile), patch("fusedres.plan.tiles.PROGRAMS", 2):
            check(target, size, dtype, "bits")


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["one value", "8 divides C"]))
def test_sums_alone(case: str, target: str, dtype: torch.dtype) -> None:
    operands = Operands(SIZES[case], dtype, "bits")
    norm = operands.norm(torch.float32)
    sums, trace = executed(target, lambda: bn_backward_reduce(operands.arriving, operands.y, norm))
    assert trace.by_kernel() == {"bn_backward_reduce_kernel": 1, "bn_backward_finish_kernel": 1}
    wide = Normaliser(*(tensor.double() for tensor in norm.vectors.values()))
    exact = bn_backward_reduce.reference(OutputGrad(operands.g.double(), operands.mask), operands.y, wide)
    eager = bn_backward_reduce.reference(operands.arriving, operands.y, norm)
    for ours, theirs, truth in zip(sums, eager, exact, strict=True):
        assert_as_accurate_as_eager(ours, theirs, truth)


@pytest.mark.parametrize("form", ["scaled", "whole", "whole, about zero", "frozen, y at hand"])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "one value"]))
def test_apply_alone(case: str, target: str, dtype: torch.dtype, form: str) -> None:
    operands = Operands(SIZES[case], dtype, "output")
    p, q, r, mean = torch.randn(4, SIZES[case][1])
    dy = operands.arriving._replace(p=p)
    if form.startswith("whole"):
        dy = dy._replace(y=operands.y, q=q, r=r, mean=mean if form == "whole" else None)
    elif form.startswith("frozen"):
        dy = dy._replace(y=operands.y, mean=mean)
    ours, trace = executed(target, lambda: bn_backward_apply(dy))
    assert trace.by_kernel() == {"bn_backward_apply_kernel": 1}
    wide = OutputGrad(*(part.double() if torch.is_tensor(part) else part for part in dy))
    assert_as_accurate_as_eager(ours, bn_backward_apply.reference(dy), bn_backward_apply.reference(wide))


@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "odd C", "one value"]))
def test_apply_joins_a_gradient_from_elsewhere(case: str, target: str, dtype: torch.dtype, wider: bool) -> None:
    """One launch for the gradient at a pre-activation block's input, the shortcut's in it."""
    operands = Operands(SIZES[case], dtype, "none")
    p, q, r, mean = torch.randn(4, SIZES[case][1])
    dy = operands.arriving._replace(p=p, y=operands.y, q=q, r=r, mean=mean)
    add = OutputGrad(activation(SIZES[case], torch.float32 if wider else dtype))
    ours, trace = executed(target, lambda: bn_backward_apply(dy, add=add))
    assert trace.by_kernel() == {"bn_backward_apply_kernel": 1}
    wide = OutputGrad(*(part.double() if torch.is_tensor(part) else part for part in dy))
    exact = bn_backward_apply.reference(wide, add=OutputGrad(add.g.double()))
    assert_as_accurate_as_eager(ours, bn_backward_apply.reference(dy, add=add), exact)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "odd C", "one value"]))
def test_apply_joins_the_gradient_of_a_zero_pad_shortcut(
    case: str, target: str, dtype: torch.dtype, mask: bool
) -> None:
    operands = Operands(SIZES[case], dtype, "none")
    p, q, r, mean = torch.randn(4, SIZES[case][1])
    dy = operands.arriving._replace(p=p, y=operands.y, q=q, r=r, mean=mean)
    end = zero_pad_size(SIZES[case], SIZES[case][1] + 16, (2, 2))
    grad = OutputGrad(activation(end, dtype), pack_relu_mask(activation(end, dtype)) if mask else None)
    add = ZeroPaddedGrad(grad, SIZES[case], (2, 2))
    ours, trace = executed(target, lambda: bn_backward_apply(dy, add=add))
    assert trace.by_kernel() == {"bn_backward_apply_kernel": 1, **({"act_backward_kernel": 1} if mask else {})}
    wide = OutputGrad(*(part.double() if torch.is_tensor(part) else part for part in dy))
    exact = bn_backward_apply.reference(wide, add=add._replace(grad=grad._replace(g=grad.g.double())))
    assert_as_accurate_as_eager(ours, bn_backward_apply.reference(dy, add=add), exact)


@each_target
def test_frozen_statistics_need_no_coefficients(target: str) -> None:
    operands = Operands((2, 16, 5, 5), torch.float32, "bits")
    norm = operands.norm(torch.float32)
    (dy, dgamma, dbeta), _ = executed(
        target, lambda: bn_backward(operands.arriving, operands.y, norm, operands.gamma, batch_stats=False)
    )
    g = torch.where(operands.open, operands.g, 0.0)
    assert torch.equal(dy, g * norm.scale.view(1, -1, 1, 1))
    exact = bn_backward_reduce.reference(OutputGrad(g), operands.y, norm)
    assert_as_accurate_as_eager(dbeta, exact[0], exact[0].double())
    assert_as_accurate_as_eager(dgamma, exact[1], exact[1].double())


@each_target
def test_an_empty_batch_sums_to_zero(target: str) -> None:
    y = torch.empty(0, 8, 3, 3)
    norm = Normaliser(*torch.ones(4, 8))
    (dy, dgamma, dbeta), _ = executed(target, lambda: bn_backward(OutputGrad(y), y, norm, None, batch_stats=False))
    assert dy.shape == y.shape
    assert not dgamma.any() and not dbeta.any()
