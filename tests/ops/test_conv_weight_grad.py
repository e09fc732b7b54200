"""fusedres.ops.conv_weight_grad: against autograd of a convolution, both operands formed on load."""

import pytest
import torch
from torch.nn.functional import conv2d

from fusedres.bench.eager import normalised
from fusedres.operands import ConvInput, OutputGrad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close, naive_conv
from tests.ops.test_conv_input_grad import CASES, FORMS, output_grad


def setting(case, dtype, form, prologue):
    size, (k, r, s), geometry = CASES[case]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u = ConvInput(torch.randn(size, dtype=wide).to(dtype))
    if prologue:
        scale, shift = torch.rand(2, size[1], dtype=wide) + 0.1
        u = u._replace(scale=scale, shift=shift)
    out_size = (size[0], k, *geometry.output_size(*size[2:], (r, s)))
    dy, exact_dy = output_grad(out_size, dtype, form)
    loaded = u.tensor.double()
    if prologue:
        loaded = (loaded * u.scale.double()[:, None, None] + u.shift.double()[:, None, None]).clamp(min=0)
    weight = torch.zeros(k, size[1] // geometry.groups, r, s, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(naive_conv(loaded, weight, *geometry), weight, exact_dy)
    return dy, u, (r, s), geometry, exact_dy, exact


@pytest.mark.parametrize("prologue", [False, True], ids=["plain input", "prologue"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_is_autograd_of_the_convolution(case, form, prologue, each_backend):
    dy, u, kernel, geometry, _, exact = setting(case, torch.float64, form, prologue)
    assert_close(conv_weight_grad(dy, u, kernel, geometry), exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ["3x3", "1x1", "1x1 strided, odd size"])
def test_layout_does_not_matter(case, layout, each_backend):
    dy, u, kernel, geometry, _, exact = setting(case, torch.float64, "plain", True)
    dy = OutputGrad(dy.g.contiguous(memory_format=layout))
    u = u._replace(tensor=u.tensor.contiguous(memory_format=layout))
    assert_close(conv_weight_grad(dy, u, kernel, geometry), exact)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain input", "prologue"])
@pytest.mark.parametrize("case", ["3x3", "3x3 strided, odd size", "3x3 grouped", "1x1", "1x1 strided, odd size"])
def test_rounds_no_more_than_eager(case, prologue, form, dtype, each_backend):
    dy, u, kernel, geometry, exact_dy, exact = setting(case, dtype, form, prologue)
    loaded = u.tensor
    if prologue:
        loaded = normalised(loaded, u.scale, u.shift).relu()
    weight = torch.zeros(exact.shape, dtype=dtype, requires_grad=True)
    (eager,) = torch.autograd.grad(conv2d(loaded, weight, None, *geometry), weight, exact_dy.to(dtype))
    dw = conv_weight_grad(dy, u, kernel, geometry)
    assert dw.dtype == torch.float32
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert_as_accurate_as_eager(dw, eager.float(), exact, floor=floor)


def test_refused_by_name(each_backend):
    image = torch.zeros(2, 4, 5, 5)
    with pytest.raises(ValueError, match="dy: expected a 4-D tensor"):
        conv_weight_grad(OutputGrad(image[0]), ConvInput(image), (1, 1), CASES["1x1"][2])
    with pytest.raises(ValueError, match="u: expected a 4-D tensor"):
        conv_weight_grad(OutputGrad(image), ConvInput(image[0]), (1, 1), CASES["1x1"][2])
