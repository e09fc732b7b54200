"""fusedres.autograd.saved: nested tuples through saved-tensor hooks, one derivative, the forward pass's backend."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedres.autograd.saved import (
    differentiable_once,
    keep,
    kept,
    no_autocast,
    on_forward_backend,
    packed,
    unpacked,
)
from fusedres.backends import backend, current


class Pair(NamedTuple):
    left: Tensor | None
    right: Tensor | int


class Square(torch.autograd.Function):
    """x^2, keeping x in a nest."""

    seen = None

    @staticmethod
    def forward(ctx, x, nest):
        ctx.backend = current()
        keep(ctx, packed((Pair(x, 7), (nest, Pair(None, x + 1)), "text")))
        return x * x

    @staticmethod
    @differentiable_once
    @on_forward_backend
    def backward(ctx, dz):
        Square.seen = unpacked(kept(ctx)), current(), torch.is_autocast_enabled("cpu")
        (pair, _, _) = Square.seen[0]
        return 2 * pair.left * dz, None


def test_nest_comes_back_as_it_was():
    x = torch.randn(3, requires_grad=True)
    Square.apply(x, ((), (None, 1.5))).sum().backward()
    (pair, (nest, inner), text), _, _ = Square.seen
    assert isinstance(pair, Pair)
    assert torch.equal(pair.left, x)
    assert (pair.right, nest, text) == (7, ((), (None, 1.5)), "text")
    assert isinstance(inner, Pair)
    assert inner.left is None
    assert torch.equal(inner.right, x + 1)


def test_structures_are_equal_where_constants_and_places_are():
    def structure(*nested):
        return packed(nested).structure

    x, y = torch.randn(2), torch.randn(2)
    same = structure(Pair(x, 7), y), structure(Pair(y, 7), x)
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    for other in (structure(Pair(x, 8), y), structure((x, 7), y), structure(Pair(x, y), 7)):
        assert other != same[0]


def test_saved_tensor_hooks_see_every_tensor():
    x = torch.randn(3, requires_grad=True)
    saved, restored = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.clone()) or t, lambda t: restored.append(t) or t * 2
    ):
        z = Square.apply(x, ())
    assert len(saved) == 2
    assert torch.equal(saved[1], x + 1)
    z.sum().backward()
    assert len(restored) == 2
    assert torch.equal(x.grad, 4 * x.detach()), "what the hook gave back was not used"


def test_tensors_are_freed_with_the_graph():
    x = torch.randn(3, requires_grad=True)
    z = Square.apply(x, ())
    z.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_overwritten_input_is_noticed():
    x = torch.randn(3, requires_grad=True)
    z = Square.apply(x, ())
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()], ids=["sum", "square"])
def test_second_derivative_is_refused(loss):
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(loss(Square.apply(x, ())), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fusedres\.unfuse\(model\)"):
        dx.sum().backward()


def test_first_derivative_under_create_graph_has_the_value():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x, ()).sum(), x, create_graph=True)
    assert torch.equal(dx.detach(), 2 * x.detach())


def test_without_create_graph_gradients_are_plain():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x, ()).square().sum(), x)
    assert not dx.requires_grad


@pytest.mark.parametrize("name", ["native", "reference"])
def test_backward_runs_on_the_forward_backend_outside_autocast(name):
    x = torch.randn(3, requires_grad=True)
    with backend(name):
        z = Square.apply(x, ())
    with torch.autocast("cpu", torch.bfloat16):
        z.sum().backward()
    assert Square.seen[1:] == (name, False)


def test_no_autocast_is_left_as_it_was_entered():
    with torch.autocast("cpu", torch.bfloat16):
        with no_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
