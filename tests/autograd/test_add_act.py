"""fusedres.autograd.ends, AddAct: the end of a block without a batch norm, against autograd of plain PyTorch."""

import pytest
import torch

from fusedres.functional import add_act
from tests.comparison import STORAGE, assert_close


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
def test_agrees_with_autograd(dtype, wanted, act, each_backend):
    ours = [torch.randn(2, 5, 4, 3).to(dtype).requires_grad_(need) for need in wanted]
    theirs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in ours]
    dz = torch.randn(2, 5, 4, 3).to(dtype)
    z = add_act(*ours, act=act)
    expected = theirs[0] + theirs[1]
    expected = torch.relu(expected) if act else expected
    z.backward(dz)
    expected.backward(dz)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, expected)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.grad is None) == (their.grad is None)
        if our.grad is not None:
            assert torch.equal(our.grad, their.grad)


def test_gradients_arrive_in_the_dtypes_of_the_operands(each_backend):
    x = torch.randn(1, 8, 2, 2).bfloat16().requires_grad_()
    residual = torch.randn(1, 8, 2, 2).requires_grad_()
    z = add_act(x, residual)
    assert z.dtype == torch.float32
    z.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32
    assert_close(residual.grad, (z > 0).double(), 0.0)
    assert_close(x.grad, (z > 0).double(), 0.0)


def test_one_bit_per_value_is_kept(each_backend):
    x, residual = torch.randn(2, 2, 16, 4, 4).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        add_act(x, residual)
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.uint8, x.numel() // 8)]


@pytest.mark.parametrize("act", ["relu", None])
def test_second_derivatives(act, each_backend):
    x, residual = torch.randn(2, 1, 2, 3, 2, dtype=torch.float64).requires_grad_()
    z = add_act(x, residual, act=act)
    dx, dresidual = torch.autograd.grad((z**3).sum(), (x, residual), create_graph=True)
    (second,) = torch.autograd.grad(dx.sum() + 2 * dresidual.sum(), x)
    opened = z.detach() > 0 if act else torch.ones_like(z)
    torch.testing.assert_close(second, 18 * z.detach() * opened)


def test_impossible_operands_are_refused():
    with pytest.raises(ValueError, match="residual: expected the shape of x"):
        add_act(torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 1))
