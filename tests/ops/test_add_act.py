"""fusedres.ops.add_act: add and rectify, with one rounding."""

import pytest
import torch

from fusedres.activation import IDENTITY, RELU
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.add_act import add_act
from tests.comparison import STORAGE, assert_as_accurate_as_eager

SIZES = {"even": (2, 8, 4, 4), "C not a multiple of 8": (3, 5, 7, 3), "one pixel": (1, 6, 1, 1), "empty": (0, 8, 2, 2)}


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_is_the_formula(case, act, dtype, each_backend):
    x, residual = (torch.randn(SIZES[case]).to(dtype) for _ in range(2))
    copies = x.clone(), residual.clone()
    z, mask = add_act(x, residual, act=act, bit_mask=True)
    exact, eager = act.value(x.double() + residual.double()), act.value(x + residual)
    assert_as_accurate_as_eager(z, eager, exact)
    assert mask is None if act == IDENTITY else torch.equal(mask, pack_relu_mask(z))
    assert torch.equal(x, copies[0]) and torch.equal(residual, copies[1])


def test_no_mask_unless_asked_for(each_backend):
    assert add_act(torch.ones(1, 8, 1, 1), torch.ones(1, 8, 1, 1))[1] is None


@pytest.mark.parametrize("dtype", STORAGE[1:])
def test_the_wider_dtype_wins(dtype, each_backend):
    x, residual = torch.randn(2, 1, 8, 3, 3)
    for pair in ((x, residual.to(dtype)), (x.to(dtype), residual)):
        z, _ = add_act(*pair)
        assert z.dtype == torch.float32
        assert_as_accurate_as_eager(z, (pair[0] + pair[1]).relu(), (pair[0].double() + pair[1].double()).relu())


def test_not_a_number_stays_one(each_backend):
    x = torch.tensor([float("nan"), -float("inf"), float("inf"), 1.0]).view(1, 4, 1, 1)
    z, mask = add_act(x, torch.zeros(1, 4, 1, 1), bit_mask=True)
    assert z.flatten().nan_to_num(7.0, posinf=9.0).tolist() == [7.0, 0.0, 9.0, 1.0]
    assert mask.item() == 0b1100


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), ValueError, r"x: expected a 4-D tensor"),
        ((torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 1)), ValueError, r"residual: expected the shape of x"),
        ((torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1).int()), TypeError, r"residual: expected a floating-point"),
    ],
)
def test_impossible_operands_are_refused(arguments, error, message, each_backend):
    with pytest.raises(error, match=message):
        add_act(*arguments)


def test_an_unknown_activation_is_refused(each_backend):
    with pytest.raises(TypeError, match="act: expected an Activation, got 'celu'"):
        add_act(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), act="celu")
