"""fusedres.kernels.moments and what runs on it: a 1x1 convolution and its batch norm without the output, both ways."""

import pytest
import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Moments, Norm, Normaliser, NormNumbers, OutputGrad, Producer
from fusedres.ops.act_mask import pack_relu_mask, unpack_relu_mask
from fusedres.ops.conv_input_grad import input_grad
from fusedres.ops.conv_weight_grad import weight_grad
from fusedres.ops.input_moments import measured_input, moments_statistics
from fusedres.ops.moments_backward import (
    InputGradMatrices,
    MomentsGrad,
    moments_backward,
    moments_input_grad,
    moments_producer_grad,
)
from tests.comparison import LOW, assert_close, relative_error
from tests.kernels.convolutions import as_tf32
from tests.kernels.executed import TESTED, activation, covering, executed

# (N, C, H, W), K, stride
CASES = {
    "a bottleneck's end": ((1, 64, 9, 9), 256, (1, 1)),
    "tails of pixels, K and C": ((2, 40, 7, 5), 88, (1, 1)),
    "strided": ((2, 32, 7, 8), 64, (2, 2)),
    "odd channels": ((2, 17, 5, 5), 35, (1, 1)),
    "several tiles of C": ((1, 160, 5, 5), 64, (1, 1)),
    "one channel": ((2, 1, 3, 3), 4, (1, 1)),
}
FORMS = ("producer", "added", "producer, added", "alone", "frozen", "a large mean", "compact")


class Setting:
    """A 1x1 convolution, its batch norm and the gradient that arrives, with the step in any dtype."""

    def __init__(self, case: str, dtype: torch.dtype, form: str) -> None:
        size, k, stride = CASES[case]
        self.form, self.dtype, self.geometry = form, dtype, Geometry(stride)
        self.y = activation(size, dtype)
        shift = torch.randn(size[1]) + (5.0 if form == "a large mean" else 0.0)
        self.below = Normaliser(torch.randn(size[1]), torch.rand(size[1]) + 0.5, torch.rand(size[1]) + 0.5, shift)
        self.weight = (torch.randn(k, size[1], 1, 1) / size[1] ** 0.5).to(dtype)
        self.gamma, self.beta = torch.randn(2, k)
        self.counted = torch.tensor(3)
        self.running = (torch.randn(k), torch.rand(k) + 0.5)
        p, q = self.geometry.output_size(*size[2:], (1, 1))
        z = torch.relu(activation((size[0], k, p, q), dtype))
        self.g = OutputGrad(activation((size[0], k, p, q), dtype), pack_relu_mask(z))
        self.add = OutputGrad(activation(size, dtype)) if "added" in form else None

    def step(self) -> tuple[Tensor, ...]:
        """By the ops of whichever backend is chosen: dW, dgamma, dbeta, du and the producer's two sums."""
        u = ConvInput(self.y, self.below.scale, self.below.shift)
        if self.form == "frozen":
            invstd = (self.running[1] + 1e-5) ** -0.5
            scale = self.gamma * invstd
            moments, norm = None, Normaliser(self.running[0], invstd, scale, self.beta - self.running[0] * scale)
        else:
            norm = Norm(self.gamma, self.beta, counted=self.counted)
            moments, norm = measured_input(u, self.weight, norm, self.geometry.stride)
        small, matrices = moments_backward(self.g, u, moments, self.weight, norm, self.geometry)
        if self.form.startswith("producer"):
            producer = Producer(self.y, self.below)
            du, sums = moments_producer_grad(self.g, matrices, self.geometry, producer, add=self.add)
            return *small, du, sums.sum_g, sums.sum_gy
        compact = self.form == "compact"
        return *small, moments_input_grad(self.g, matrices, u, self.geometry, add=self.add, compact=compact)

    def autograd(self, dtype: torch.dtype, *, tf32: bool = False) -> tuple[Tensor, ...]:
        """By separate operations, each rounding to ``dtype``; those of the backward pass from factors in TF32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def numbers(vector: Tensor) -> Tensor:
            return vector.to(wide).view(1, -1, 1, 1)

        formed = torch.relu(self.y.float() * numbers(self.below.scale).float() + numbers(self.below.shift).float())
        u = formed.to(self.dtype).to(dtype)
        weight = self.weight.to(dtype)
        gamma, beta = (vector.to(wide).requires_grad_() for vector in (self.gamma, self.beta))
        y = torch.nn.functional.conv2d(u, weight, None, *self.geometry).requires_grad_()
        running = [vector.to(wide) for vector in self.running] if self.form == "frozen" else [None, None]
        out = torch.nn.functional.batch_norm(y, *running, gamma, beta, self.form != "frozen", 0.1, 1e-5)
        open_ = unpack_relu_mask(self.g.mask, out.shape[1]).to(dtype)
        dy, dgamma, dbeta = torch.autograd.grad(out, (y, gamma, beta), self.g.g.to(dtype) * open_)
        factors = [tensor.detach() for tensor in (dy, u, weight)]
        if tf32:
            factors = [as_tf32(tensor.float()).to(dtype) for tensor in factors]
        dweight = weight_grad(*factors[:2], (1, 1), self.geometry)
        du = input_grad(factors[0], factors[2], tuple(u.shape), self.geometry)
        if self.add is not None:
            du = du + self.add.g.to(dtype)
        if self.form == "compact":
            du = du[:, :, :: self.geometry.stride[0], :: self.geometry.stride[1]]
        if not self.form.startswith("producer"):
            return dweight, dgamma, dbeta, du
        du = torch.where(u > 0, du, 0)
        return dweight, dgamma, dbeta, du, *(terms.sum((0, 2, 3)) for terms in self.terms(du))

    def terms(self, du: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the producer's two sums."""
        wide = torch.promote_types(du.dtype, torch.float32)
        mean, invstd = (vector.to(wide).view(1, -1, 1, 1) for vector in self.below[:2])
        return du, du.to(wide) * (self.y.to(wide) - mean) * invstd


NAMES = ("dweight", "dgamma", "dbeta", "du", "sum(g) of the producer", "sum(g y_hat) of the producer")


def check(target: str, case: str, dtype: torch.dtype, form: str) -> None:
    setting = Setting(case, dtype, form)
    ours, trace = executed(target, setting.step, [setting.counted])
    assert setting.counted.item() == 3 + (form != "frozen")
    assert trace.by_kernel()["conv_input_grad_kernel"] == trace.by_kernel()["moments_centre_kernel"] == 1
    assert trace.by_kernel()["moments_matrices_kernel"] == (form != "frozen")
    assert "sum_parts_kernel" not in trace.by_kernel()
    eager, exact = setting.autograd(dtype), setting.autograd(torch.float64)
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        eager = setting.autograd(torch.float64, tf32=True)
    floor = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    # Eager's sums can be more accurate than their terms: few errors cancel by chance, and TF32, which cuts digits off,
    # makes errors of one sign, which cancel as the terms do. Here a part of each term is in fp32. What is owed is the
    # error of sums of independent errors of eager's size.
    owed = [0.0] * len(NAMES)
    if form.startswith("producer"):
        pairs = zip(setting.terms(eager[3]), setting.terms(exact[3]), exact[4:], strict=True)
        owed[4:] = [relative_error(theirs, truth, float(total.norm())) for theirs, truth, total in pairs]
        for total, terms in zip(ours[4:], setting.terms(ours[3].double()), strict=True):
            # Of the gradient as stored: nothing but the order of the sum differs.
            assert_close(total, terms.sum((0, 2, 3)), 1e-5, scale=float(terms.abs().sum((0, 2, 3)).norm()))
    for name, mine, theirs, truth, other in zip(NAMES, ours, eager, exact, owed, strict=False):
        error = relative_error(mine.view_as(truth), truth)
        allowed = max(1.5 * relative_error(theirs, truth), 1.5 * other, floor)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, case, dtype, "producer")


@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS, offset=4, contraction=True))
def test_every_form(form: str, target: str, dtype: torch.dtype) -> None:
    check(target, "strided" if form == "compact" else "tails of pixels, K and C", dtype, form)


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("dtype", LOW)
def test_weights_of_16_bits_meet_all_digits_of_fp32(dtype: torch.dtype, target: str) -> None:
    """Statistics and small matrices against fp64: nothing but the stored Q is rounded, in two terms."""
    u = ConvInput(activation((1, 96, 9, 9), dtype, mean=1.0))
    weight = (torch.randn(136, 96, 1, 1) / 10).to(dtype)
    z = torch.relu(activation((1, 136, 9, 9), dtype))
    g = OutputGrad(activation((1, 136, 9, 9), dtype), pack_relu_mask(z))

    def ours() -> tuple[Moments, Normaliser, MomentsGrad, InputGradMatrices]:
        moments, norm = measured_input(u, weight, Norm(numbers=NormNumbers(0.0)))
        return moments, norm, *moments_backward(g, u, moments, weight, norm, Geometry())

    (moments, norm, small, matrices), _ = executed(target, ours)
    exactly = [tuple(part.double() for part in given) for given in (moments[1:], norm.vectors.values())]
    statistics = moments_statistics(Moments(81, *exactly[0]), weight.double())
    assert_close(norm.mean, statistics.mean[0], 1e-6)
    assert_close(norm.invstd, (statistics.m2[0] / 81).rsqrt(), 1e-6)
    wide = OutputGrad((g.g * (z > 0)).double()), ConvInput(u.tensor.double()), Moments(81, *exactly[0]), weight.double()
    exact, of_input = moments_backward.reference(*wide, Normaliser(*exactly[1]), Geometry())
    assert_close(small.dweight, exact.dweight, 1e-6)
    assert_close(small.dgamma, exact.dgamma, 1e-6)
    digits = max(torch.finfo(dtype).eps ** 2, 2e-6)
    quadratic = matrices.quadratic.double().sum(1)
    assert_close(quadratic, of_input.quadratic[:, 0], digits)
    assert_close(matrices.constants.sum(0), of_input.constants[0], 2 * digits)
    assert relative_error(quadratic, quadratic.T) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS, contraction=True))
def test_every_form_of_every_case(case: str, form: str, target: str, dtype: torch.dtype) -> None:
    check(target, case, dtype, form)
