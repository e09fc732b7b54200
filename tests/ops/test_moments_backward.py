"""fusedres.ops.moments_backward: a backward pass without y, against autograd with it."""

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d

from fusedres.operands import ConvInput, Geometry, Moments, Normaliser, OutputGrad
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.moments_backward import moments_backward, moments_contraction, moments_input_grad
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close, naive_conv

EPS = 1e-3
# (N, C, H, W), K, stride
CASES = {
    "bottleneck": ((2, 3, 5, 4), 12, (1, 1)),
    "strided": ((2, 4, 6, 8), 9, (2, 2)),
    "strided, odd size": ((3, 4, 7, 5), 9, (2, 2)),
    "strides differ": ((2, 4, 5, 7), 6, (1, 3)),
    "one channel": ((2, 1, 3, 3), 4, (1, 1)),
    "C > K": ((2, 7, 3, 3), 4, (1, 1)),
    "two pixels": ((2, 3, 1, 1), 5, (1, 1)),
}


class Setting:
    """A 1x1 convolution and its batch norm, everything that the backward pass is given, and autograd's answer."""

    def __init__(self, case, *, dtype=torch.float64, frozen=False, prologue=True, mask="bits", gamma=None, mean=0.0):
        size, k, self.stride = CASES[case] if isinstance(case, str) else case
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.geometry, c = Geometry(self.stride), size[1]
        self.u = ConvInput((torch.randn(size, dtype=wide) + mean).to(dtype))
        if prologue:
            scale, shift = torch.rand(2, c, dtype=wide) + 0.2
            self.u = self.u._replace(scale=scale, shift=shift)
        self.weight = torch.randn(k, c, 1, 1, dtype=wide).to(dtype)
        self.gamma = torch.randn(k, dtype=wide) if gamma is None else torch.full((k,), gamma, dtype=wide)
        self.running = (torch.randn(k, dtype=wide), torch.rand(k, dtype=wide) + 0.5) if frozen else None
        n = size[0]
        p, q = self.geometry.output_size(*size[2:], (1, 1))
        g = torch.randn(n, k, p, q, dtype=wide).to(dtype)
        z = torch.randn(n, k, p, q, dtype=wide).to(dtype).relu()
        self.g = OutputGrad(g, {"none": None, "bits": pack_relu_mask(z), "output": z}[mask])
        self.behind = g if mask == "none" else g * (z > 0)
        self._forward()

    def _forward(self):
        """Moments and normaliser in fp64, stored as the library would."""
        x = self.formed(torch.float64)
        wide = torch.float64 if self.u.tensor.dtype == torch.float64 else torch.float32
        rows = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1).flatten(0, 2)
        centred = rows - rows.mean(0)
        self.moments = None
        y = rows @ self.weight.flatten(1).double().t()
        if self.running is None:
            self.moments = Moments(len(rows), rows.mean(0).to(wide), (centred.t() @ centred).to(wide))
            mean, var = y.mean(0), y.var(0, correction=0)
        else:
            mean, var = (r.double() for r in self.running)
        invstd = (var + EPS) ** -0.5
        scale = invstd * self.gamma.double()
        self.norm = Normaliser(*(v.to(wide) for v in (mean, invstd, scale, -mean * scale)))

    def formed(self, dtype):
        x = self.u.tensor.double()
        if self.u.scale is not None:
            x = (x * self.u.scale.double()[:, None, None] + self.u.shift.double()[:, None, None]).clamp(min=0)
        return x.to(self.u.tensor.dtype).to(dtype)

    def autograd(self, dtype, convolve=conv2d):
        """(dW, dgamma, dbeta, du) with y in memory, in ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        u = self.formed(dtype).clone().requires_grad_()
        weight = self.weight.to(dtype).clone().requires_grad_()
        gamma = self.gamma.to(wide).clone().requires_grad_()
        beta = torch.zeros_like(gamma).requires_grad_()
        y = conv2d(u, weight, None, self.stride) if convolve is conv2d else naive_conv(u, weight, self.stride)
        running = (None, None) if self.running is None else [r.to(wide) for r in self.running]
        z = batch_norm(y, *running, gamma, beta, self.running is None, 0.1, EPS)
        return torch.autograd.grad(z, (weight, gamma, beta, u), self.behind.to(dtype))

    def ours(self, add=None):
        small, matrices = moments_backward(self.g, self.u, self.moments, self.weight, self.norm, self.geometry)
        du = moments_input_grad(self.g, matrices, self.u, self.geometry, add=add)
        return small.dweight.view(self.weight.shape), small.dgamma, small.dbeta, du


NAMES = ("dweight", "dgamma", "dbeta", "du")


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("mask", ["none", "bits", "output"])
@pytest.mark.parametrize("case", CASES)
def test_is_autograd_of_convolution_and_batch_norm(case, mask, prologue, frozen, each_backend):
    setting = Setting(case, frozen=frozen, prologue=prologue, mask=mask)
    exact = setting.autograd(torch.float64, naive_conv)
    # With two pixels batch norm's gradient nearly vanishes; the parts it is the difference of do not.
    scale = [None] * 4
    if case == "two pixels":
        frozen_size = float(setting.behind.norm()) * float(setting.norm.scale.norm())
        scale = [frozen_size * float(setting.formed(torch.float64).norm()), float(setting.behind.norm()), None]
        scale.append(frozen_size * float(setting.weight.norm()))
    for name, ours, theirs, size in zip(NAMES, setting.ours(), exact, scale, strict=True):
        assert_close(ours, theirs, 1e-11, scale=size, name=name)


@pytest.mark.parametrize("case", ["bottleneck", "strided"])
def test_contraction_is_the_sum_of_outer_products(case, each_backend):
    setting = Setting(case)
    d, sum_g = moments_contraction(setting.g, setting.u, (1, 1), setting.geometry)
    u = setting.formed(torch.float64)[:, :, :: setting.stride[0], :: setting.stride[1]]
    assert_close(d, torch.einsum("nkpq,ncpq->kc", setting.behind, u))
    assert_close(sum_g, setting.behind.sum((0, 2, 3)))


def test_contraction_with_the_windows_of_a_larger_kernel(each_backend):
    """Rows of D are in the order of a flattened weight."""
    u, g = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    geometry = Geometry((2, 2), (1, 1))
    d, sum_g = moments_contraction(OutputGrad(g), ConvInput(u), (3, 3), geometry)
    windows = torch.nn.functional.unfold(u, 3, stride=2, padding=1)
    assert_close(d, torch.einsum("nkp,nwp->kw", g.flatten(2), windows))
    assert_close(sum_g, g.sum((0, 2, 3)))


@pytest.mark.parametrize("mask", ["none", "bits", "output"])
@pytest.mark.parametrize("case", CASES)
def test_another_gradient_joins(case, mask, each_backend):
    setting = Setting(case)
    alone = setting.ours()[3]
    other = torch.randn(setting.u.tensor.shape, dtype=torch.float64)
    z = torch.randn(other.shape, dtype=torch.float64).relu()
    add = OutputGrad(other, {"none": None, "bits": pack_relu_mask(z), "output": z}[mask])
    copy = other.clone()
    assert_close(setting.ours(add)[3], alone + (other if mask == "none" else other * (z > 0)))
    assert torch.equal(other, copy), "the shortcut's gradient was written to"


@pytest.mark.parametrize("case", ["strided", "strided, odd size", "strides differ"])
def test_pixels_that_a_stride_skips_get_nothing(case, each_backend):
    setting = Setting(case)
    du = setting.ours()[3].clone()
    du[:, :, :: setting.stride[0], :: setting.stride[1]] = 0
    assert not du.any()


@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_special_gammas(gamma, each_backend):
    setting = Setting("bottleneck", gamma=gamma)
    for name, ours, theirs in zip(NAMES, setting.ours(), setting.autograd(torch.float64), strict=True):
        assert_close(ours, theirs, 1e-11, name=name)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_rounds_no_more_than_eager(prologue, frozen, dtype, each_backend):
    setting = Setting(((4, 16, 9, 7), 64, (1, 1)), dtype=dtype, frozen=frozen, prologue=prologue)
    exact = setting.autograd(torch.float64)
    eager = setting.autograd(dtype)
    for name, ours, theirs, true in zip(NAMES, setting.ours(), eager, exact, strict=True):
        floor = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert_as_accurate_as_eager(ours, theirs.to(ours.dtype), true, floor=floor, name=name)


def test_large_mean_of_the_input_in_fp32(each_backend):
    """|mean| / std = 500 in u: every product with u is centred, so none cancels."""
    setting = Setting(((4, 16, 9, 7), 64, (1, 1)), dtype=torch.float32, prologue=False, mean=500.0)
    exact, eager = setting.autograd(torch.float64), setting.autograd(torch.float32)
    for name, ours, theirs, true in zip(NAMES, setting.ours(), eager, exact, strict=True):
        assert_as_accurate_as_eager(ours, theirs, true, factor=3.0, floor=1e-4, name=name)


@pytest.mark.parametrize("offset", [1.0, 4.0])
@pytest.mark.parametrize("dtype", STORAGE)
def test_large_mean_of_the_gradient(dtype, offset, each_backend):
    """sum(g) mean^T is then most of D, and a D rounded to 16 bits before it is centred loses the gradient."""
    setting = Setting(((8, 32, 14, 14), 128, (1, 1)), dtype=dtype, mask="none")
    setting.behind = setting.behind + offset
    setting.g = OutputGrad(setting.behind)
    exact, eager = setting.autograd(torch.float64), setting.autograd(dtype)
    for name, ours, theirs, true in zip(NAMES, setting.ours(), eager, exact, strict=True):
        # In fp32 the cancellation costs digits that nobody misses.
        floor = 1e-4 if dtype == torch.float32 else None
        assert_as_accurate_as_eager(ours, theirs.to(ours.dtype), true, floor=floor, name=name)


@pytest.mark.parametrize("dtype", STORAGE)
def test_output_dtypes(dtype, each_backend):
    setting = Setting("bottleneck", dtype=dtype)
    dweight, dgamma, dbeta, du = setting.ours()
    assert {dweight.dtype, dgamma.dtype, dbeta.dtype} == {torch.float32}
    assert du.dtype == dtype
    wide = OutputGrad(torch.zeros(setting.u.tensor.shape))
    assert setting.ours(wide)[3].dtype == torch.float32
