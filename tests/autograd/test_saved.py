"""fusedres.autograd.saved: nested tuples and inputs through saved-tensor hooks, the forward pass's backend."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.autograd.composed import Composed
from fusedres.autograd.function import fused_or_composed
from fusedres.autograd.saved import (
    attached,
    keep,
    kept_with_anchors,
    pack,
    saved_pack,
    unpack,
)
from fusedres.context import snapshot
from fusedres.runtime.autocast import no_autocast
from fusedres.runtime.backends import backend, current
from tests.runtime.replays import TIMES


class Pair(NamedTuple):
    left: Tensor | None
    right: Tensor | int


class Square(torch.autograd.Function):
    """x^2, keeping x in a nest."""

    seen = None

    @staticmethod
    def forward(ctx, x, nest):
        ctx.context = snapshot()
        keep(ctx, pack((Pair(x, 7), (nest, Pair(None, x + 1)), "text")))
        return x * x

    @staticmethod
    @fused_or_composed
    def backward(ctx, dz):
        Square.seen = unpack(saved_pack(ctx)), current(), torch.is_autocast_enabled("cpu")
        (pair, _, _) = Square.seen[0]
        return 2 * pair.left * dz, None

    @staticmethod
    def composed(ctx, dz):
        Square.seen = kept_with_anchors(ctx)[0], current(), torch.is_autocast_enabled("cpu")
        (pair, _, _) = Square.seen[0]
        return Composed((pair.left, None), lambda x, _: x * x)


class CubeOfCopy(torch.autograd.Function):
    """x^3, keeping a copy of x in bf16."""

    @staticmethod
    def forward(ctx, x):
        ctx.context = snapshot()
        keep(ctx, pack((x.bfloat16(),)), x)
        return x**3

    @staticmethod
    @fused_or_composed
    def backward(ctx, dz):
        (copy,) = unpack(saved_pack(ctx))
        return (3 * copy.to(dz.dtype) ** 2 * dz,)

    @staticmethod
    def composed(ctx, dz):
        (copy,), (anchor,) = kept_with_anchors(ctx)
        return Composed((attached(copy, anchor),), lambda x: x**3)


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
        return pack(nested).structure

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


def test_second_and_third_derivatives():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x, ()).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    (dddx,) = torch.autograd.grad(ddx.sum(), x)
    torch.testing.assert_close((dx, ddx, dddx), (4 * x**3, 12 * x**2, 24 * x))


@pytest.mark.parametrize("hooked", [False, True])
def test_an_input_of_which_a_copy_is_kept_is_part_of_its_graph(hooked):
    root = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.clone(), lambda t: t):
        z = CubeOfCopy.apply(2 * root if hooked else root)
    of_copy, of_anchor = saved[-2:]
    assert of_copy.dtype == torch.bfloat16
    assert of_anchor.shape == (3,) and of_anchor.untyped_storage().nbytes() == of_anchor.element_size()
    (first,) = torch.autograd.grad(z.sum(), root, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), root)
    factor = 8 if hooked else 1
    torch.testing.assert_close((first, second), (3 * factor * root**2, 6 * factor * root))


def test_an_input_that_needs_no_gradient_is_not_anchored():
    kept_tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_tensors.append(t) or t, lambda t: t):
        Square.apply(torch.randn(3, requires_grad=True), ())
    assert len(kept_tensors) == 2


def test_batches_of_gradients_are_composed():
    x = torch.randn(3, requires_grad=True)
    dz = torch.randn(4, 3)
    (dx,) = torch.autograd.grad(Square.apply(x, ()), x, dz, is_grads_batched=True)
    torch.testing.assert_close(dx, 2 * x.detach() * dz)


def test_first_derivative_under_create_graph_has_the_value():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x, ()).sum(), x, create_graph=True)
    assert torch.equal(dx.detach(), 2 * x.detach())


def test_without_create_graph_gradients_are_plain():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x, ()).square().sum(), x)
    assert not dx.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_backward_runs_on_the_forward_backend_outside_autocast(name, create_graph):
    x = torch.randn(3, requires_grad=True)
    with backend(name):
        z = Square.apply(x, ())
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.grad(z.sum(), x, create_graph=create_graph)
    assert Square.seen[1:] == (name, False)


def test_no_autocast_is_left_as_it_was_entered():
    with torch.autocast("cpu", torch.bfloat16):
        with no_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_a_retained_graph_keeps_what_a_replayed_pass_saved():
    torch.manual_seed(0)
    block, x = fusedres.nn.BasicBlock(4, 4), torch.randn(2, 4, 5, 5, requires_grad=True)
    for _ in range(TIMES):
        z = block(x)
        first, second = (torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        (third,) = torch.autograd.grad(z, x, torch.ones_like(z))
        assert torch.equal(first, third)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(z, x, torch.ones_like(z))
