"""fusedres.ops.conv_bn_act: the single pass against its parts, with every kind of shortcut."""

import pytest
import torch
from torch.nn.functional import conv2d

from fusedres.activation import IDENTITY, RELU
from fusedres.bench.eager import normalised
from fusedres.operands import ConvInput, Geometry, Norm, NormNumbers
from fusedres.ops.act_mask import unpack_relu_mask
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from tests.comparison import LOW, STORAGE, assert_as_accurate_as_eager, assert_close, naive_conv
from tests.ops.test_conv_forward import on_load

# (N, C, H, W), (K, R, S), geometry
CASES = {
    "1x1": ((2, 5, 6, 4), (16, 1, 1), Geometry()),
    "1x1 strided, odd size": ((2, 6, 7, 5), (9, 1, 1), Geometry((2, 2))),
    "3x3": ((2, 5, 6, 6), (7, 3, 3), Geometry(padding=(1, 1))),
    "3x3 strided": ((2, 5, 9, 7), (6, 3, 3), Geometry((2, 2), (1, 1))),
    "3x3 dilated": ((2, 4, 9, 8), (6, 3, 3), Geometry((1, 1), (2, 2), (2, 2))),
    "3x3 grouped": ((2, 6, 5, 5), (9, 3, 3), Geometry(padding=(1, 1), groups=3)),
    "7x7 on three channels": ((2, 3, 16, 15), (8, 7, 7), Geometry((2, 2), (3, 3))),
    "nothing square": ((1, 4, 11, 8), (6, 5, 2), Geometry((3, 2), (2, 0), (1, 3))),
    "one pixel": ((1, 3, 1, 1), (4, 3, 3), Geometry(padding=(1, 1))),
}
SHORTCUTS = ("none", "residual", "normalised residual", "second")


def made(shape, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=wide).to(dtype)


def contraction_of(size, kernel, geometry, dtype, prologue):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u = ConvInput(made(size, dtype))
    if prologue:
        u = u._replace(scale=torch.rand(size[1], dtype=wide) + 0.2, shift=torch.rand(size[1], dtype=wide))
    k, r, s = kernel
    weight = made((k, size[1] // geometry.groups, r, s), dtype)
    return Contraction(u, weight, geometry, *torch.randn(2, k, dtype=wide))


def setting(case, dtype, shortcut, prologue):
    size, kernel, geometry = CASES[case]
    main = contraction_of(size, kernel, geometry, dtype, prologue)
    n, k = size[0], kernel[0]
    p, q = geometry.output_size(*size[2:], kernel[1:])
    wide = main.scale.dtype
    keywords = {}
    if "residual" in shortcut:
        keywords["residual"] = made((n, k, p, q), dtype)
    if shortcut == "normalised residual":
        keywords["residual_scale"], keywords["residual_shift"] = torch.randn(2, k, dtype=wide)
    if shortcut == "second":
        keywords["second"] = contraction_of((n, 3, 2 * p, 2 * q), (k, 1, 1), Geometry((2, 2)), dtype, not prologue)
    return main, keywords


def wide_branch(branch: Contraction):
    """conv * scale + shift in fp64, from operands as stored."""
    u = ConvInput(*(None if part is None else part.double() for part in branch.u[:3]))
    loaded = on_load(u).to(branch.u.tensor.dtype).double()
    y = naive_conv(loaded, branch.weight.double(), *branch.geometry)
    return y * branch.scale.double()[:, None, None] + branch.shift.double()[:, None, None]


def exactly(main, residual=None, residual_scale=None, residual_shift=None, second=None, act=RELU):
    z = wide_branch(main)
    if second is not None:
        z = z + wide_branch(second)
    if residual is not None:
        residual = residual.double()
        if residual_scale is not None:
            residual = residual * residual_scale.double()[:, None, None]
            residual = residual + residual_shift.double()[:, None, None]
        z = z + residual
    return act.value(z)


def eager_branch(branch: Contraction):
    u = branch.u.tensor
    if branch.u.scale is not None:
        u = normalised(u, branch.u.scale, branch.u.shift).relu()
    return normalised(conv2d(u, branch.weight, None, *branch.geometry), branch.scale, branch.shift)


def eagerly(main, residual=None, residual_scale=None, residual_shift=None, second=None, act=RELU):
    z = eager_branch(main)
    if second is not None:
        z = z + eager_branch(second)
    if residual is not None and residual_scale is not None:
        residual = normalised(residual, residual_scale, residual_shift)
    if residual is not None:
        z = z + residual
    return act.value(z)


@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_sum_of_its_parts(case, shortcut, prologue, act, each_backend):
    main, keywords = setting(case, torch.float64, shortcut, prologue)
    z, mask, _ = conv_bn_act(main, **keywords, act=act)
    assert mask is None
    assert_close(z, exactly(main, **keywords, act=act))


@pytest.mark.parametrize("shortcut", ["none", "residual", "second"])
def test_a_contraction_without_numbers_joins_as_it_is(shortcut, each_backend):
    main, keywords = setting("3x3 strided", torch.float64, shortcut, True)

    def with_numbers(branch, *numbers):
        return branch._replace(scale=numbers[0], shift=numbers[1]) if numbers else Contraction(*branch[:3])

    ones, zeros = torch.ones_like(main.scale), torch.zeros_like(main.shift)
    results = []
    for numbers in ((), (ones, zeros)):
        given = {name: with_numbers(v, *numbers) if name == "second" else v for name, v in keywords.items()}
        results.append(conv_bn_act(with_numbers(main, *numbers), **given, act=IDENTITY).z)
    assert_close(*results)


def test_numbers_come_together():
    main, _ = setting("3x3", torch.float64, "none", False)
    with pytest.raises(ValueError, match="shift: expected one beside a scale, got None"):
        conv_bn_act(main._replace(shift=None))
    norm = Norm(running_mean=main.scale, running_var=main.scale)
    with pytest.raises(ValueError, match="running: expected None beside a scale or a shift"):
        conv_bn_act(main._replace(running=norm))
    with pytest.raises(ValueError, match=r"mean: expected shape"):
        conv_bn_act(Contraction(*main[:3], running=Norm(running_mean=main.scale[:1], running_var=main.scale)))


def stored_norms(k: int, dtype: torch.dtype, *, biased: bool) -> Norm:
    mean, gamma, beta, bias = torch.randn(4, k).to(dtype)
    var = torch.rand(k).to(dtype) + 0.5
    return Norm(gamma, beta, mean, var, bias if biased else None, numbers=NormNumbers(1e-3))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_running_statistics_stand_in_the_place_of_scale_and_shift(projected, biased, each_backend):
    main, keywords = setting("3x3", torch.float64, "second" if projected else "none", False)
    branches = [main, keywords["second"]] if projected else [main]
    stored = [
        branch._replace(
            scale=None, shift=None, running=stored_norms(branch.weight.shape[0], torch.float64, biased=biased)
        )
        for branch in branches
    ]
    told = [
        branch._replace(**dict(zip(("scale", "shift"), branch.numbers, strict=True)), running=None) for branch in stored
    ]
    calls = [dict(zip(("main", "second"), given, strict=False)) for given in (stored, told)]
    z, expected = (conv_bn_act(call.pop("main"), **call).z for call in calls)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


def test_a_shift_alone_is_a_bias(each_backend):
    main, _ = setting("3x3", torch.float64, "none", False)
    z = conv_bn_act(main._replace(scale=None)).z
    expected = conv_bn_act(main._replace(scale=torch.ones_like(main.scale))).z
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_mask_is_where_the_output_is_positive(shortcut, dtype, each_backend):
    main, keywords = setting("1x1", dtype, shortcut, True)
    z, mask, _ = conv_bn_act(main, **keywords, bit_mask=True)
    assert torch.equal(unpack_relu_mask(mask, z.shape[1]), z > 0)


def test_statistics_are_those_of_the_output(each_backend):
    main, keywords = setting("1x1", torch.float64, "none", True)
    z, _, partials = conv_bn_act(main, **keywords, statistics=True)
    assert_close(partials.mean[0], z.mean((0, 2, 3)))
    assert_close(partials.m2[0], z.var((0, 2, 3), correction=0) * partials.counts)
    assert conv_bn_act(main, **keywords).partials is None


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("prologue", "act"), [(False, IDENTITY), (True, RELU)], ids=["plain", "prologue, relu"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("case", CASES)
def test_rounds_no_more_than_eager(case, shortcut, prologue, act, dtype, each_backend):
    main, keywords = setting(case, dtype, shortcut, prologue)
    copies = [main.u.tensor.clone(), main.weight.clone(), main.scale.clone(), main.shift.clone()]
    residual = keywords.get("residual")
    residual_copy = None if residual is None else residual.clone()
    z, *_ = conv_bn_act(main, **keywords, act=act)
    exact = exactly(main, **keywords, act=act)
    # One pixel and four channels: a handful of roundings, of which either side may be the luckier.
    floor = 4 * torch.finfo(dtype).eps if case == "one pixel" else None
    assert_as_accurate_as_eager(z, eagerly(main, **keywords, act=act), exact, floor=floor)
    for ours, copy in zip((main.u.tensor, main.weight, main.scale, main.shift), copies, strict=True):
        assert torch.equal(ours, copy), "an operand was written to"
    assert residual is None or torch.equal(residual, residual_copy), "the residual was written to"


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_sixteen_bits_are_rounded_once(shortcut, dtype, each_backend):
    main, keywords = setting("1x1", dtype, shortcut, False)
    if "second" in keywords:
        keywords["second"] = keywords["second"]._replace(u=ConvInput(keywords["second"].u.tensor))
    z, *_ = conv_bn_act(main, **keywords)
    exact = exactly(main, **keywords)
    allowed = exact * (torch.finfo(dtype).eps / 2 + 1e-5) + 2e-5
    assert ((z.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_promoted_as_eagers(dtype, residual_dtype, each_backend):
    main, keywords = setting("1x1", dtype, "residual", False)
    keywords["residual"] = keywords["residual"].to(residual_dtype)
    z, *_ = conv_bn_act(main, **keywords)
    assert z.dtype == torch.promote_types(dtype, residual_dtype)
    assert_close(z, exactly(main, **keywords), torch.finfo(z.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shortcut", ["residual", "normalised residual"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual_layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_may_differ(layout, residual_layout, shortcut, dtype, each_backend):
    main, keywords = setting("3x3", dtype, shortcut, True)
    exact = exactly(main, **keywords)
    u = main.u._replace(tensor=main.u.tensor.contiguous(memory_format=layout))
    keywords["residual"] = keywords["residual"].contiguous(memory_format=residual_layout)
    z, *_ = conv_bn_act(main._replace(u=u), **keywords)
    assert_close(z, exact, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["gamma = 0", "gamma < 0"])
def test_special_scales(case, dtype, each_backend):
    main, keywords = setting("3x3", dtype, "residual", True)
    scale = torch.zeros_like(main.scale) if case == "gamma = 0" else -main.scale.abs()
    main = main._replace(scale=scale)
    z, *_ = conv_bn_act(main, **keywords)
    assert_close(z, exactly(main, **keywords), 1e-12 if dtype == torch.float64 else 1e-6)


def refused_calls():
    main, keywords = setting("1x1", torch.float32, "residual", False)
    residual = keywords["residual"]
    second = setting("1x1", torch.float32, "second", False)[1]["second"]
    narrow = second._replace(u=ConvInput(second.u.tensor[:, :, :4]))
    return {
        "act": (main, {"act": "swish"}, TypeError, "act: expected an Activation, got 'swish'"),
        "scale": (main._replace(scale=main.scale[:3]), {}, ValueError, r"scale: expected shape \(16,\), got \(3,\)"),
        "shift": (main._replace(shift=main.shift[:3]), {}, ValueError, r"shift: expected shape \(16,\), got \(3,\)"),
        "channels": (
            main._replace(u=ConvInput(main.u.tensor[:, :3])), {}, ValueError, "u: expected 5 channels .*got 3",
        ),
        "dtype": (main._replace(weight=main.weight.bfloat16()), {}, TypeError, "weight: expected the dtype of u"),
        "residual": (main, {"residual": residual[:1]}, ValueError, r"residual: expected shape \(2, 16, 6, 4\)"),
        "second": (main, {"second": narrow}, ValueError, r"second: expected an output of shape \(2, 16, 6, 4\)"),
        "both": (main, {"residual": residual, "second": second}, ValueError, "second: expected None beside a residual"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused_calls())
def test_refused_by_name(case, each_backend):
    main, keywords, exception, message = refused_calls()[case]
    with pytest.raises(exception, match=message):
        conv_bn_act(main, **keywords)
