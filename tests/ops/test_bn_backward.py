"""fusedres.ops.bn_backward: its sums, coefficients and gradient, against autograd of batch norm."""

import pytest
import torch
from torch.nn.functional import batch_norm

from fusedres.operands import Norm, Normaliser, NormNumbers, OutputGrad
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.bn_backward import bn_backward, bn_backward_apply, bn_backward_reduce, masked_gradient, output_grad
from fusedres.ops.bn_finalize import bn_from_running
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close

EPS = 1e-3
SIZES = {
    "even": (2, 8, 4, 4),
    "odd": (3, 5, 7, 3),
    "one image": (1, 3, 5, 5),
    "two pixels": (2, 6, 1, 1),
    "one channel": (2, 1, 3, 3),
}
MASKS = ("none", "bits", "output")


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def normaliser(y, gamma, running):
    """Independently of the library, in the statistics dtype of y."""
    wide = wide_of(y.dtype)
    if running is None:
        mean, var = y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)
    else:
        mean, var = (r.double() for r in running)
    invstd = (var + EPS) ** -0.5
    scale = invstd if gamma is None else invstd * gamma.double()
    return Normaliser(*(v.to(wide) for v in (mean, invstd, scale, -mean * scale)))


def setting(size, dtype, mask, frozen, affine=True):
    """y, gamma, running statistics, and the gradient with its mask."""
    wide, channels = wide_of(dtype), size[1]
    y = (torch.randn(size, dtype=wide) * 2 + 1).to(dtype)
    gamma = torch.randn(channels, dtype=wide) if affine else None
    running = (torch.randn(channels, dtype=wide), torch.rand(channels, dtype=wide) + 0.5) if frozen else None
    g = torch.randn(size, dtype=wide).to(dtype)
    z = torch.randn(size, dtype=wide).to(dtype).relu()
    return y, gamma, running, OutputGrad(g, {"none": None, "bits": pack_relu_mask(z), "output": z}[mask]), z > 0


def autograd_of_batch_norm(y, gamma, running, g):
    y = y.clone().requires_grad_()
    ones = torch.ones(y.shape[1], dtype=wide_of(y.dtype))
    gamma = (ones if gamma is None else gamma).clone().requires_grad_()
    beta = torch.zeros_like(gamma).requires_grad_()
    running = (None, None) if running is None else running
    z = batch_norm(y, *running, gamma, beta, running[0] is None, 0.1, EPS)
    return torch.autograd.grad(z, (y, gamma, beta), g)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", SIZES)
def test_is_autograd_of_batch_norm(case, mask, frozen, affine, each_backend):
    y, gamma, running, g, open_ = setting(SIZES[case], torch.float64, mask, frozen, affine)
    behind = g.g if mask == "none" else g.g * open_
    exact = autograd_of_batch_norm(y, gamma, running, behind)
    norm = normaliser(y, gamma, running)
    dy, dgamma, dbeta = bn_backward(g, y, norm, gamma, batch_stats=not frozen)
    # With two pixels y_hat is +1 and -1, and dy is nearly nothing.
    scale = float((behind * norm.scale[:, None, None]).norm())
    assert_close(dy, exact[0], scale=scale, name="dy")
    assert_close(dgamma, exact[1], scale=float(behind.norm()), name="dgamma")
    assert_close(dbeta, exact[2], name="dbeta")


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("mask", MASKS)
def test_reduce_coefficients_and_apply_are_the_same_in_parts(mask, frozen, each_backend):
    y, gamma, running, g, open_ = setting(SIZES["odd"], torch.float64, mask, frozen)
    behind = g.g if mask == "none" else g.g * open_
    exact = autograd_of_batch_norm(y, gamma, running, behind)
    norm = normaliser(y, gamma, running)
    sums = bn_backward_reduce(g, y, norm)
    assert_close(sums.sum_g, behind.sum((0, 2, 3)))
    normalised = (y - norm.mean[:, None, None]) * norm.invstd[:, None, None]
    assert_close(sums.sum_gy, (behind * normalised).sum((0, 2, 3)))
    dy = output_grad(g, None if frozen else sums, y, norm)
    if frozen:
        assert dy.q is dy.r is None
    else:
        centred = y - norm.mean[:, None, None]
        assert_close(dy.p[:, None, None] * behind + dy.q[:, None, None] * centred + dy.r[:, None, None], exact[0])
    assert_close(bn_backward_apply(dy), exact[0])


@pytest.mark.parametrize("mask", MASKS)
def test_apply_without_coefficients_masks_alone(mask, each_backend):
    _, _, _, g, open_ = setting(SIZES["odd"], torch.float64, mask, False)
    exact = g.g if mask == "none" else g.g * open_
    assert torch.equal(bn_backward_apply(g), exact)
    assert torch.equal(masked_gradient(g), exact)


@pytest.mark.parametrize("gamma", ["zero", "negative", "one channel zero"])
def test_special_gammas(gamma, each_backend):
    y, value, _, g, open_ = setting(SIZES["odd"], torch.float64, "bits", False)
    if gamma == "zero":
        value = torch.zeros_like(value)
    elif gamma == "negative":
        value = -value.abs()
    else:
        value[2] = 0
    exact = autograd_of_batch_norm(y, value, None, g.g * open_)
    for ours, theirs in zip(bn_backward(g, y, normaliser(y, value, None), value, batch_stats=True), exact, strict=True):
        assert_close(ours, theirs)
        assert ours.isfinite().all()


def test_constant_input_has_no_normalised_part(each_backend):
    """Zero variance: y_hat = 0, dgamma = 0 and dy = a (g - mean of g)."""
    _, gamma, _, g, _ = setting(SIZES["odd"], torch.float64, "none", False)
    y = torch.full(SIZES["odd"], 2.0, dtype=torch.float64)
    norm = normaliser(y, gamma, None)
    dy, dgamma, dbeta = bn_backward(g, y, norm, gamma, batch_stats=True)
    centred = g.g - g.g.mean((0, 2, 3), keepdim=True)
    assert_close(dy, centred * (gamma * EPS**-0.5)[:, None, None])
    assert dgamma.abs().max() < 1e-10
    assert_close(dbeta, g.g.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("mask", ["bits", "output"])
def test_rounds_no_more_than_eager(mask, frozen, dtype, each_backend):
    y, gamma, running, g, open_ = setting((4, 19, 7, 9), dtype, mask, frozen)
    behind = g.g * open_
    eager = autograd_of_batch_norm(y, gamma, running, behind)
    running = None if running is None else tuple(r.double() for r in running)
    exact = autograd_of_batch_norm(y.double(), gamma.double(), running, behind.double())
    ours = bn_backward(g, y, normaliser(y, gamma, running), gamma, batch_stats=not frozen)
    for name, *three in zip(("dy", "dgamma", "dbeta"), ours, eager, exact, strict=True):
        # The sums of some hundred values are fp32 in both; which is nearer is chance.
        floor = 1e-6 if name != "dy" else None
        assert_as_accurate_as_eager(*three, floor=floor, name=name)


@pytest.mark.parametrize("dtype", STORAGE)
def test_reduce_keeps_its_accuracy_with_a_large_mean(dtype, each_backend):
    """|mean| / std = 100: sum(g y) - mean sum(g) would cancel, centring first does not."""
    y = (torch.randn(4, 6, 16, 16) + 100).to(dtype)
    g = torch.randn(4, 6, 16, 16).to(dtype) + 1
    norm = normaliser(y, None, None)
    sum_gy = bn_backward_reduce(OutputGrad(g), y, norm).sum_gy
    exact = (g.double() * (y.double() - y.double().mean((0, 2, 3), keepdim=True))).sum((0, 2, 3))
    assert_close(sum_gy, exact * normaliser(y.double(), None, None).invstd, 1e-4)


@pytest.mark.parametrize("dtype", STORAGE)
def test_output_dtypes(dtype, each_backend):
    y, gamma, _, g, _ = setting(SIZES["even"], dtype, "bits", False)
    dy, dgamma, dbeta = bn_backward(g, y, normaliser(y, gamma, None), gamma, batch_stats=True)
    assert (dy.dtype, dgamma.dtype, dbeta.dtype) == (dtype, torch.float32, torch.float32)


def test_bias_of_the_convolution_under_frozen_statistics(each_backend):
    """The Normaliser of a biased convolution is about its raw output, without the bias."""
    y, gamma, running, g, _ = setting(SIZES["odd"], torch.float64, "none", True)
    bias = torch.randn(5, dtype=torch.float64)
    norm = bn_from_running(Norm(gamma, None, *running, bias, numbers=NormNumbers(EPS)), torch.float64)
    exact = autograd_of_batch_norm(y + bias[:, None, None], gamma, running, g.g)
    for ours, theirs in zip(bn_backward(g, y, norm, gamma, batch_stats=False), exact, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("masked_add", [False, True])
def test_apply_joins_a_gradient_from_elsewhere(masked_add, each_backend):
    """dx of a pre-activation block: batch norm's part and the shortcut's, in the wider dtype."""
    shape = (2, 5, 3, 4)
    g, y, shortcut, open_ = torch.randn(4, *shape, dtype=torch.float64)
    p, q, r, mean = torch.randn(4, 5, dtype=torch.float64)
    dy = OutputGrad(g, None, y, p, q, r, mean)
    add = OutputGrad(shortcut, open_ if masked_add else None)
    expected = bn_backward_apply(dy) + (torch.where(open_ > 0, shortcut, 0.0) if masked_add else shortcut)
    torch.testing.assert_close(bn_backward_apply(dy, add=add), expected)
    narrow = OutputGrad(g.bfloat16(), None, y.bfloat16(), *(v.float() for v in (p, q, r, mean)))
    assert bn_backward_apply(narrow, add=OutputGrad(shortcut.float())).dtype == torch.float32
    assert bn_backward_apply(narrow, add=OutputGrad(shortcut.bfloat16())).dtype == torch.bfloat16
