"""fusedres.kernels.bn_act, compiled and executed: normalise, add, rectify."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.bench.eager import normalised
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.add_act import add_act
from fusedres.ops.bn_act import bn_act
from fusedres.ops.zero_pad_shortcut import ZeroPadded, shortcut_tensor
from fusedres.plan.tiles import pinned, row_tiles
from tests.comparison import STORAGE, assert_as_accurate_as_eager
from tests.kernels.executed import SIZES, TESTED, Size, activation, channels_last, covering, executed

FORMS = ("alone", "plain residual", "normalised residual", "zero-padded residual")


def operands(size: Size, dtype: torch.dtype, form: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(y, scale, shift) and the keywords of the residual."""
    scale, shift, other_scale, other_shift = torch.randn(4, size[1])
    keywords = {} if form == "alone" else {"residual": activation(size, dtype)}
    if form == "zero-padded residual":
        n, c, h, w = size
        keywords["residual"] = ZeroPadded(activation((n, (c + 1) // 2, 2 * h - 1, 2 * w), dtype), c, (2, 2))
    if form == "normalised residual":
        keywords |= {"residual_scale": other_scale, "residual_shift": other_shift}
    return (activation(size, dtype), scale, shift), keywords


def eager(
    y: Tensor, scale: Tensor, shift: Tensor, act: Activation = RELU,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None, residual_shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What separate modules compute, each rounding to the storage dtype."""
    z = normalised(y, scale, shift)
    if residual is not None:
        residual = shortcut_tensor(residual)
        z = z + (residual if residual_scale is None else normalised(residual, residual_scale, residual_shift))
    return act.value(z)


def given(operand: Tensor | ZeroPadded, dtype: torch.dtype) -> Tensor | ZeroPadded:
    """The same numbers in another dtype."""
    return operand._replace(x=operand.x.to(dtype)) if isinstance(operand, ZeroPadded) else operand.to(dtype)


def check(target: str, size: Size, dtype: torch.dtype, form: str, *, act: Activation = RELU) -> Tensor:
    (y, scale, shift), keywords = operands(size, dtype, form)
    (z, mask), trace = executed(target, lambda: bn_act(y, scale, shift, **keywords, act=act, bit_mask=True))
    assert trace.by_kernel() == {"bn_act_kernel": 1}
    wide = {name: given(tensor, torch.float64) for name, tensor in keywords.items()}
    exact = eager(y.double(), scale.double(), shift.double(), act, **wide)
    assert_as_accurate_as_eager(z, eager(y, scale, shift, act, **keywords), exact)
    assert torch.equal(mask, pack_relu_mask(z))
    assert z.is_contiguous(memory_format=torch.channels_last)
    return z


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("case", "target", "dtype"), covering(SIZES))
def test_agrees(case: str, target: str, dtype: torch.dtype, form: str) -> None:
    check(target, SIZES[case], dtype, form)


@pytest.mark.parametrize(("act", "target", "dtype"), covering([RELU, IDENTITY]))
def test_without_mask(act: Activation, target: str, dtype: torch.dtype) -> None:
    (y, scale, shift), keywords = operands((2, 40, 5, 7), dtype, "plain residual")
    (z, mask), trace = executed(target, lambda: bn_act(y, scale, shift, **keywords, act=act))
    assert mask is None
    assert "mask_ptr" not in trace.launches[0].written
    assert trace.launches[0].flops == (4 if act == RELU else 3) * z.numel()
    exact = eager(y.double(), scale.double(), shift.double(), act, keywords["residual"].double())
    assert_as_accurate_as_eager(z, eager(y, scale, shift, act, **keywords), exact)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(SIZES, offset=2))
def test_addition_alone(case: str, target: str, dtype: torch.dtype) -> None:
    x, residual = activation(SIZES[case], dtype), activation(SIZES[case], dtype)
    (z, mask), _ = executed(target, lambda: add_act(x, residual, bit_mask=True))
    assert_as_accurate_as_eager(z, torch.relu(x + residual), torch.relu(x.double() + residual.double()))
    assert torch.equal(mask, pack_relu_mask(z))


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "a row is several pieces", "odd C"]))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    size = SIZES[case]
    for tile in row_tiles(size[0] * size[2] * size[3], size[1], dtype.itemsize):
        with pinned(tile):
            check(target, size, dtype, "plain residual")


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("dtype", STORAGE[1:])
def test_a_wide_shortcut_promotes_the_sum(target: str, dtype: torch.dtype) -> None:
    (y, scale, shift), _ = operands((1, 40, 3, 3), dtype, "alone")
    residual = activation((1, 40, 3, 3), torch.float32)
    (z, _), _ = executed(target, lambda: bn_act(y, scale, shift, residual=residual))
    assert z.dtype == torch.float32
    exact = eager(y.double(), scale.double(), shift.double(), residual=residual.double())
    assert_as_accurate_as_eager(z, eager(y, scale, shift, residual=residual), exact)


@pytest.mark.parametrize("target", TESTED)
def test_what_is_not_finite_comes_out_where_it_went_in(target: str) -> None:
    y = activation((1, 8, 2, 4), torch.bfloat16)
    y[0, :, 0, 0] = float("nan")
    y[0, :, 1, 1] = float("inf")
    y[0, :, 1, 2] = -float("inf")
    scale, shift = torch.tensor([1.0, -1.0, 0.0, 2.0] * 2), torch.randn(8)
    (z, mask), _ = executed(target, lambda: bn_act(y, scale, shift, bit_mask=True))
    expected = eager(y.float(), scale, shift)
    assert torch.equal(z.isnan(), expected.isnan())
    assert torch.equal(z.isinf(), expected.isinf())
    assert torch.equal(mask, pack_relu_mask(z))


@pytest.mark.parametrize("target", TESTED)
def test_other_layouts_are_laid_out_first(target: str) -> None:
    (y, scale, shift), _ = operands((2, 16, 6, 5), torch.float32, "alone")
    (expected, _), _ = executed(target, lambda: bn_act(y, scale, shift))
    wide = torch.full((2, 20, 6, 5), float("nan"))
    wide[:, 2:18] = y
    for other in (y.contiguous(), channels_last(wide)[:, 2:18]):
        (z, _), _ = executed(target, lambda other=other: bn_act(other, scale, shift))
        assert torch.equal(z, expected)
