"""fusedres.ops.zero_pad_shortcut: subsampled pixels, new channels zero, and the way back."""

import pytest
import torch

from fusedres.ops.zero_pad_shortcut import zero_pad_shortcut, zero_pad_shortcut_grad, zero_pad_size

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


def test_fewer_channels_are_refused():
    with pytest.raises(ValueError, match="channels: expected at least the 4 of x, got 3"):
        zero_pad_shortcut(torch.zeros(1, 4, 2, 2), 3, (1, 1))
    with pytest.raises(ValueError, match="channels: expected at least the 4 of x, got 3"):
        zero_pad_size((1, 4, 2, 2), 3, (1, 1))


def test_refused_by_name():
    with pytest.raises(ValueError, match="x: expected a 4-D tensor"):
        zero_pad_shortcut(torch.zeros(4, 2, 2), 8, (1, 1))
