"""fusedres.autograd.global_pool: against the library's adaptive pooling."""

import pytest
import torch
from torch import nn

from fusedres.autograd import GlobalPool
from tests.comparison import STORAGE


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("size", [(3, 5, 7, 6), (2, 4, 1, 1), (1, 3, 8, 8)])
def test_is_adaptive_pooling_to_the_bit(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    z, plain = GlobalPool.apply(ours), nn.AdaptiveAvgPool2d(1)(theirs)
    assert torch.equal(z, plain)
    dz = torch.randn(size[:2]).to(dtype)[:, :, None, None]
    z.backward(dz)
    plain.backward(dz)
    assert torch.equal(ours.grad, theirs.grad)


def test_its_gradient_is_not_written_out() -> None:
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    strides = []
    y = x * 1
    y.register_hook(lambda g: strides.append(g.stride()))
    GlobalPool.apply(y).sum().backward()
    assert strides[0][2:] == (0, 0)


def test_second_derivatives() -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: GlobalPool.apply(x) ** 3, x)
