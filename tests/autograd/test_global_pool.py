"""fusedres.autograd.global_pool: PyTorch's own pooling, with a gradient that takes no memory."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from fusedres.autograd import GlobalPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 7, 5), (1, 4, 1, 1), (3, 8, 4, 4)], ids=str)
def test_bit_by_bit_as_pytorch(size, dtype):
    ours = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    pooled, expected = GlobalPool.apply(ours), adaptive_avg_pool2d(theirs, 1)
    assert torch.equal(pooled, expected)
    dz = torch.randn_like(expected)
    pooled.backward(dz)
    expected.backward(dz)
    assert torch.equal(ours.grad, theirs.grad)


def test_derivatives_of_any_order():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GlobalPool.apply, x)
    assert torch.autograd.gradgradcheck(GlobalPool.apply, x)


def test_the_gradient_has_a_value_per_image_and_channel():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    seen = []
    y = x * 1
    y.register_hook(lambda grad: seen.append(grad.stride()))
    GlobalPool.apply(y).sum().backward()
    assert seen[0][2:] == (0, 0)
