"""fusedres.ops.bn_act: normalise, add, rectify, with one rounding."""

import pytest
import torch

from fusedres.activation import IDENTITY, RELU
from fusedres.bench.eager import normalised
from fusedres.ops.act_mask import unpack_relu_mask
from fusedres.ops.bn_act import bn_act
from tests.comparison import LOW, STORAGE, assert_as_accurate_as_eager, assert_close

SIZES = {
    "even": (2, 8, 4, 4),
    "C not a multiple of 8": (3, 5, 7, 3),
    "one pixel": (1, 6, 1, 1),
    "one channel": (2, 1, 3, 3),
    "wide": (1, 70, 2, 3),
}
RESIDUALS = ("none", "plain", "normalised")


def operands(size, dtype, residual, residual_dtype=None):
    """(y, scale, shift) and the keywords of a kind of residual."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randn(size, dtype=wide).to(dtype)
    scale, shift, scale2, shift2 = torch.randn(4, size[1], dtype=wide)
    keywords = {}
    if residual != "none":
        keywords["residual"] = torch.randn(size, dtype=wide).to(residual_dtype or dtype)
    if residual == "normalised":
        keywords |= {"residual_scale": scale2, "residual_shift": shift2}
    return (y, scale, shift), keywords


def formula(y, scale, shift, residual=None, residual_scale=None, residual_shift=None, *, act=RELU):
    y, scale, shift = y.double(), scale.double(), shift.double()
    z = torch.einsum("nchw,c->nchw", y, scale) + shift.reshape(1, -1, 1, 1)
    if residual is not None:
        branch = residual.double()
        if residual_scale is not None:
            branch = torch.einsum("nchw,c->nchw", branch, residual_scale.double())
            branch = branch + residual_shift.double().reshape(1, -1, 1, 1)
        z = z + branch
    return act.value(z)


@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("case", SIZES)
def test_is_the_formula(case, residual, act, each_backend):
    operand, keywords = operands(SIZES[case], torch.float64, residual)
    copies = [tensor.clone() for tensor in (*operand, *keywords.values())]
    z, mask = bn_act(*operand, **keywords, act=act)
    assert mask is None
    assert_close(z, formula(*operand, **keywords, act=act), 1e-14)
    for tensor, copy in zip((*operand, *keywords.values()), copies, strict=True):
        assert torch.equal(tensor, copy), "an operand was written to"


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("case", SIZES)
def test_mask_is_where_the_output_is_positive(case, residual, dtype, each_backend):
    operand, keywords = operands(SIZES[case], dtype, residual)
    z, mask = bn_act(*operand, **keywords, bit_mask=True)
    assert torch.equal(unpack_relu_mask(mask, z.shape[1]), z > 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_may_differ(layout, each_backend):
    operand, keywords = operands((2, 5, 4, 6), torch.float64, "normalised")
    exact = formula(*operand, **keywords)
    y = operand[0].contiguous(memory_format=layout)
    keywords["residual"] = keywords["residual"].contiguous(memory_format=torch.channels_last)
    assert_close(bn_act(y, *operand[1:], **keywords)[0], exact, 1e-14)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_rounds_no_more_than_eager(residual, act, dtype, each_backend):
    (y, scale, shift), keywords = operands((4, 19, 7, 9), dtype, residual)
    z, _ = bn_act(y, scale, shift, **keywords, act=act)
    eager = normalised(y, scale, shift)
    if residual == "plain":
        eager = eager + keywords["residual"]
    elif residual == "normalised":
        eager = eager + normalised(keywords["residual"], keywords["residual_scale"], keywords["residual_shift"])
    eager = act.value(eager)
    assert_as_accurate_as_eager(z, eager, formula(y, scale, shift, **keywords, act=act))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_sixteen_bits_are_rounded_once(residual, dtype, each_backend):
    operand, keywords = operands((4, 19, 7, 9), dtype, residual)
    z, _ = bn_act(*operand, **keywords)
    exact = formula(*operand, **keywords)
    # Half a unit in the last place, and the fp32 error before it.
    allowed = exact * (torch.finfo(dtype).eps / 2 + 1e-5) + 1e-6
    assert ((z.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("dtype", "residual", "residual_dtype", "expected"),
    [
        (torch.bfloat16, "plain", torch.float32, torch.float32),
        (torch.float16, "plain", torch.float32, torch.float32),
        (torch.float32, "plain", torch.bfloat16, torch.float32),
        (torch.bfloat16, "plain", torch.bfloat16, torch.bfloat16),
        (torch.float32, "plain", torch.float64, torch.float64),
        (torch.bfloat16, "normalised", torch.bfloat16, torch.bfloat16),
    ],
)
def test_sum_is_promoted_as_eagers(dtype, residual, residual_dtype, expected, each_backend):
    operand, keywords = operands((2, 5, 3, 3), dtype, residual, residual_dtype)
    z, _ = bn_act(*operand, **keywords)
    assert z.dtype == expected
    narrowest = torch.bfloat16 if expected == torch.bfloat16 else torch.float32
    assert_close(z, formula(*operand, **keywords), torch.finfo(narrowest).eps)


@pytest.mark.parametrize("case", ["gamma = 0", "gamma < 0", "shift = 0 and y = 0"])
def test_special_numbers(case, each_backend):
    (y, scale, shift), _ = operands((2, 5, 4, 4), torch.float64, "none")
    if case == "gamma = 0":
        scale = torch.zeros_like(scale)
    elif case == "gamma < 0":
        scale = -scale.abs()
    else:
        y, shift = torch.zeros_like(y), torch.zeros_like(shift)
    z, mask = bn_act(y, scale, shift, bit_mask=True)
    assert_close(z, formula(y, scale, shift), 1e-14)
    if case == "shift = 0 and y = 0":
        assert not mask.any(), "the derivative of ReLU at zero is zero"


Y, V = torch.zeros(2, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((Y[0], V, V), {}, "y: expected a 4-D tensor"),
        ((Y, V[:3], V), {}, r"scale: expected shape \(4,\), got \(3,\)"),
        ((Y, V, V[:3]), {}, r"shift: expected shape \(4,\), got \(3,\)"),
        ((Y, V, V), {"residual": Y[:1]}, r"residual: expected the shape of y, \(2, 4, 3, 3\), got \(1, 4, 3, 3\)"),
    ],
)
def test_refused_by_name(arguments, keywords, message, each_backend):
    with pytest.raises(ValueError, match=message):
        bn_act(*arguments, **keywords)


def test_a_name_is_no_activation(each_backend):
    with pytest.raises(TypeError, match="act: expected an Activation, got 'tanh'"):
        bn_act(Y, V, V, act="tanh")
