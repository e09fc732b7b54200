"""fusedres.ops.zero_pad_shortcut: subsampled pixels, new channels zero, and the way back."""

import pytest
import torch

from fusedres.operands import ConvInput, Geometry, Norm, Normaliser, OutputGrad
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import added_gradient, bn_backward_apply, masked_gradient
from fusedres.ops.bn_forward import bn_forward
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_input_grad import Producer, conv_input_grad, conv_producer_grad
from fusedres.ops.moments_backward import InputGradMatrices, moments_input_grad
from fusedres.ops.zero_pad_shortcut import (
    ZeroPadded,
    ZeroPaddedGrad,
    zero_pad_shortcut,
    zero_pad_shortcut_grad,
    zero_pad_size,
)
from tests.comparison import assert_close

# (N, C, H, W), channels, stride, where the first channel of x goes
CASES = {
    "CIFAR's": ((2, 4, 8, 8), 8, (2, 2), 2),
    "odd size": ((2, 4, 7, 5), 8, (2, 2), 2),
    "odd difference": ((2, 4, 6, 6), 7, (2, 2), 1),
    "one channel more": ((1, 3, 4, 4), 4, (1, 1), 0),
    "channels alone": ((2, 3, 4, 4), 9, (1, 1), 3),
    "stride alone": ((2, 3, 5, 4), 3, (2, 2), 0),
    "strides differ": ((1, 2, 7, 8), 4, (3, 1), 1),
    "one pixel": ((1, 2, 1, 1), 4, (2, 2), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_channels_go_where_they_should(case):
    size, channels, stride, first = CASES[case]
    x = torch.randn(size)
    z = zero_pad_shortcut(x, channels, stride)
    n, c, _, _ = size
    assert z.shape == zero_pad_size(size, channels, stride)
    assert z.is_contiguous(memory_format=torch.channels_last)
    for k in range(channels):
        for i in range(z.shape[2]):
            for j in range(z.shape[3]):
                inside = first <= k < first + c
                expected = x[:, k - first, i * stride[0], j * stride[1]] if inside else torch.zeros(n)
                assert torch.equal(z[:, k, i, j], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_autograds(case, dtype):
    size, channels, stride, _ = CASES[case]
    x = torch.randn(size).to(dtype).requires_grad_()
    z = zero_pad_shortcut(x, channels, stride)
    g = torch.randn(z.shape).to(dtype)
    (exact,) = torch.autograd.grad(z, x, g)
    dx = zero_pad_shortcut_grad(g, size, stride)
    assert dx.dtype == dtype
    assert torch.equal(dx, exact)


OPERAND = ((2, 3, 5, 4), 8, (2, 1))


def test_as_an_operand_of_the_blocks_end(each_backend):
    size, channels, stride = OPERAND
    operand = ZeroPadded(torch.randn(size, dtype=torch.float64), channels, stride)
    tensor = zero_pad_shortcut(*operand)
    assert operand.shape == tensor.shape
    y = torch.randn(tensor.shape, dtype=torch.float64)
    scale, shift, other_scale, other_shift = torch.randn(4, channels, dtype=torch.float64)
    running = {"residual_scale": other_scale, "residual_shift": other_shift}
    for numbers in ({}, running):
        ours, exact = (bn_act(y, scale, shift, residual=given, **numbers)[0] for given in (operand, tensor))
        torch.testing.assert_close(ours, exact)
    ours, exact = (bn_forward(y, Norm(scale, shift), residual=given)[0] for given in (operand, tensor))
    torch.testing.assert_close(ours, exact)
    weight = torch.randn(channels, channels, 1, 1, dtype=torch.float64)
    main = Contraction(ConvInput(y), weight, Geometry(), scale, shift)
    ours, exact = (conv_bn_act(main, residual=given).z for given in (operand, tensor))
    torch.testing.assert_close(ours, exact)
    with pytest.raises(ValueError, match="residual: expected"):
        bn_act(y[:, :, 1:], scale, shift, residual=operand)


@pytest.mark.parametrize("mask", [False, True])
def test_its_gradient_as_an_operand_of_the_input_gradient(mask, each_backend):
    size, _, stride = OPERAND
    g, y = torch.randn(zero_pad_size(*OPERAND), dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    grad = OutputGrad(g, torch.randn_like(g) if mask else None)
    add = ZeroPaddedGrad(grad, size, stride)
    tensor = OutputGrad(zero_pad_shortcut_grad(masked_gradient(grad), size, stride))
    torch.testing.assert_close(added_gradient(add), tensor.g)
    weight, geometry = torch.randn(6, size[1], 3, 3, dtype=torch.float64), Geometry((2, 2), (1, 1))
    dy = OutputGrad(torch.randn(2, 6, 3, 2, dtype=torch.float64))
    ours, exact = (conv_input_grad(dy, weight, size, geometry, add=given) for given in (add, tensor))
    torch.testing.assert_close(ours, exact)
    numbers = Normaliser(*torch.rand(4, size[1], dtype=torch.float64))
    producer = Producer(y, numbers)
    ours, exact = (conv_producer_grad(dy, weight, geometry, producer, add=given).g for given in (add, tensor))
    torch.testing.assert_close(ours, exact)
    behind = OutputGrad(torch.randn_like(y), None, y, *torch.randn(4, size[1], dtype=torch.float64))
    ours, exact = (bn_backward_apply(behind, add=given) for given in (add, tensor))
    torch.testing.assert_close(ours, exact)
    point = torch.randn(6, size[1], dtype=torch.float64)
    matrices = InputGradMatrices(point, torch.randn(6, dtype=torch.float64), None, None)
    dy = OutputGrad(torch.randn(2, 6, *size[2:], dtype=torch.float64))
    ours, exact = (moments_input_grad(dy, matrices, ConvInput(y), Geometry(), add=given) for given in (add, tensor))
    torch.testing.assert_close(ours, exact)


def test_its_gradient_keeps_a_wider_dtype(each_backend):
    size, _, stride = OPERAND
    add = ZeroPaddedGrad(OutputGrad(torch.randn(zero_pad_size(*OPERAND))), size, stride)
    dy, weight = OutputGrad(torch.randn(2, 6, 3, 2).bfloat16()), torch.randn(6, size[1], 3, 3).bfloat16()
    du = conv_input_grad(dy, weight, size, Geometry((2, 2), (1, 1)), add=add)
    assert du.dtype == torch.float32
    alone = conv_input_grad(dy, weight, size, Geometry((2, 2), (1, 1)))
    # Rows that the shortcut leaves out, rounded to 16 bits or not.
    assert_close(du[:, :, 1::2], alone[:, :, 1::2].float(), torch.finfo(torch.bfloat16).eps)


def test_fewer_channels_are_refused():
    with pytest.raises(ValueError, match="channels: expected at least the 4 of x, got 3"):
        zero_pad_shortcut(torch.zeros(1, 4, 2, 2), 3, (1, 1))
    with pytest.raises(ValueError, match="channels: expected at least the 4 of x, got 3"):
        zero_pad_size((1, 4, 2, 2), 3, (1, 1))


def test_refused_by_name():
    with pytest.raises(ValueError, match="x: expected a 4-D tensor"):
        zero_pad_shortcut(torch.zeros(4, 2, 2), 8, (1, 1))
