"""Activations inside of every kernel that is given one, compiled and executed, against the formulas in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres.activation import GELU, GELU_TANH, HARDSWISH, IDENTITY, MISH, RELU6, SILU, Activation, elu, leaky_relu
from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, PoolGeometry, Producer
from fusedres.ops.act_mask import act_backward
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import bn_backward_apply, bn_backward_reduce
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import conv_input_grad, conv_producer_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.input_moments import input_moments
from fusedres.ops.op import Op
from fusedres.ops.stem_pool import poolable, stem_pool
from fusedres.ops.zero_pad_shortcut import ZeroPaddedGrad
from tests.comparison import relative_error
from tests.kernels.convolutions import Conv, assert_as_accurate
from tests.kernels.executed import activation, covering, executed
from tests.kernels.on_device import mapped

ACTS = (leaky_relu(0.1), leaky_relu(-0.3), RELU6, SILU, HARDSWISH, IDENTITY, GELU, GELU_TANH, MISH, elu(0.5))
CONV = Conv((1, 32, 6, 7), 24, (3, 3), Geometry(padding=(1, 1)))


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors keep all their digits."""
    monkeypatch.setattr("fusedres.runtime.launch.tf32_allowed", lambda: False)


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [leaf for part in result or () for leaf in leaves(part)] if isinstance(result, tuple) else []


def check(target: str, kernel: str, op: Op[..., Any], terms: int, *operands: Any, **keywords: Any) -> Any:
    """What an op gives on the kernels of a target, held against its reference."""
    result, trace = executed(target, lambda: op(*operands, **keywords))
    assert kernel in trace.by_kernel()

    def exactly(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    eager = op.reference(*operands, **keywords)
    exact = op.reference(*mapped(operands, exactly), **mapped(keywords, exactly))
    # Sums of what was rounded to 16 bits are as exact as half a unit of these, whatever luck eager's had.
    stored = [leaf.dtype for leaf in leaves(result) if leaf.is_floating_point() and leaf.dtype != torch.float32]
    rounding = 0.5 * torch.finfo(stored[0]).eps if stored else 0.0
    for ours, theirs, truth in zip(*map(leaves, (result, eager, exact)), strict=True):
        if not ours.is_floating_point():
            assert (ours != theirs).float().mean() < 0.01, "bits differ where rounding does alone"
        elif not (ours.dtype == torch.float32 and relative_error(ours, truth) <= rounding):
            assert_as_accurate(ours, theirs, truth, None, terms)
    return result


def numbers(channels: int) -> tuple[Tensor, Tensor]:
    """A scale and a shift behind which values lie on both sides of every bend."""
    return 3 * torch.rand(channels) + 0.5, 2 * torch.randn(channels)


def mask_for(act: Activation, size: tuple[int, ...], dtype: torch.dtype, *, bits: bool) -> Tensor | None:
    z, mask = bn_act.reference(activation(size, dtype), *numbers(size[1]), act=act, bit_mask=True)
    return mask if bits or act.needs_input else z


each_act = pytest.mark.parametrize(("act", "target", "dtype"), covering(ACTS, contraction=True))
each_other = pytest.mark.parametrize(("act", "target", "dtype"), covering(ACTS, offset=4, contraction=True))


@each_act
def test_the_end_of_a_block(act: Activation, target: str, dtype: torch.dtype) -> None:
    size = (2, 40, 5, 3)
    operands = activation(size, dtype), *numbers(40)
    keywords = {"residual": activation(size, dtype), "act": act, "bit_mask": True}
    z, mask = check(target, "bn_act_kernel", bn_act, 1, *operands, **keywords)
    operands[0][0, 3, 0, 0] = float("nan")
    (spoilt, _), _ = executed(target, lambda: bn_act(*operands, **keywords))
    assert spoilt.isnan().sum() == 1 and spoilt[0, 3, 0, 0].isnan()
    if mask is not None:
        g = activation(size, dtype)
        check(target, "act_backward_kernel", act_backward, 1, g, mask, act)
        if not act.needs_input:
            check(target, "act_backward_kernel", act_backward, 1, g, z, act)


@pytest.mark.parametrize(("act", "target", "dtype"), covering(ACTS, offset=2))
def test_far_from_zero(act: Activation, target: str, dtype: torch.dtype) -> None:
    """Where an exponential is 0 or infinite."""
    far = torch.tensor([6.0, 14.0, 30.0, 90.0, 100.0, 3e4])
    v = torch.cat((far, -far)).reshape(1, 12, 1, 1).to(dtype)
    one, zero = torch.ones(12), torch.zeros(12)
    z, mask = check(target, "bn_act_kernel", bn_act, 1, v, one, zero, act=act, bit_mask=True)
    assert z.isfinite().all()
    if mask is not None:
        g = check(target, "act_backward_kernel", act_backward, 1, torch.ones_like(v), mask, act)
        assert g.isfinite().all()


@each_act
def test_a_single_pass(act: Activation, target: str, dtype: torch.dtype) -> None:
    u = ConvInput(CONV.input(dtype), *numbers(32), act)
    main = Contraction(u, CONV.weight(dtype), CONV.geometry, *numbers(24))
    residual = activation((1, 24, 6, 7), dtype)
    keywords = {"residual": residual, "act": act, "bit_mask": True}
    check(target, "conv_bn_act_kernel", conv_bn_act, CONV.depth, main, **keywords)


@each_other
def test_a_prologue(act: Activation, target: str, dtype: torch.dtype) -> None:
    u = ConvInput(CONV.input(dtype), *numbers(32), act)
    check(target, "conv_forward_kernel", conv_forward, CONV.depth, u, CONV.weight(dtype), CONV.geometry)
    dy = OutputGrad(activation((1, 24, 6, 7), dtype), mask_for(act, (1, 24, 6, 7), dtype, bits=False), act=act)
    check(target, "conv_weight_grad_kernel", conv_weight_grad, 42, dy, u, CONV.window, CONV.geometry)


def parts_of(dy: OutputGrad) -> OutputGrad:
    k = dy.g.shape[1]
    p, q, r, mean = torch.randn(4, k)
    return dy._replace(y=activation(tuple(dy.g.shape), dy.g.dtype), p=p, q=q, r=r, mean=mean)


@each_act
def test_an_input_gradient(act: Activation, target: str, dtype: torch.dtype) -> None:
    size = (1, 24, 6, 7)
    dy = parts_of(OutputGrad(activation(size, dtype), mask_for(act, size, dtype, bits=True), act=act))
    add = OutputGrad(activation(CONV.size, dtype), mask_for(act, CONV.size, dtype, bits=True), act=act)
    args = dy, CONV.weight(dtype), CONV.size, CONV.geometry
    check(target, "conv_input_grad_kernel", conv_input_grad, 24 * 9, *args, add=add)


@each_other
def test_an_input_gradient_of_a_zero_padded_shortcut(act: Activation, target: str, dtype: torch.dtype) -> None:
    size, wide = (1, 24, 6, 7), (1, 48, 3, 4)
    dy = OutputGrad(activation(size, dtype), mask_for(act, size, dtype, bits=False), act=act)
    grad = OutputGrad(activation(wide, dtype), mask_for(act, wide, dtype, bits=False), act=act)
    add = ZeroPaddedGrad(grad, CONV.size, (2, 2))
    args = dy, CONV.weight(dtype), CONV.size, CONV.geometry
    check(target, "conv_input_grad_kernel", conv_input_grad, 24 * 9, *args, add=add)


def producer_of(act: Activation, dtype: torch.dtype, *, shortcut: bool, channels: int = 32) -> Producer:
    size = (1, channels, 6, 7)
    y, (scale, shift) = activation(size, dtype), numbers(channels)
    norm = Normaliser(torch.randn(channels), torch.rand(channels) + 0.5, scale, shift)
    if not shortcut:
        return Producer(y, norm, act=act)
    out, mask = bn_act.reference(y, scale, shift, residual=activation(size, dtype), act=act, bit_mask=True)
    return Producer(y, norm, out, mask, act)


@each_other
@pytest.mark.parametrize("shortcut", [False, True], ids=["formed", "the end of a block"])
def test_a_gradient_at_its_producer(act: Activation, target: str, dtype: torch.dtype, shortcut: bool) -> None:
    producer = producer_of(act, dtype, shortcut=shortcut)
    args = OutputGrad(activation((1, 24, 6, 7), dtype)), CONV.weight(dtype), CONV.geometry, producer
    check(target, "conv_input_grad_kernel", conv_producer_grad, 24 * 9, *args)


@pytest.mark.parametrize(
    ("target", "dtype"), [("sm_90", torch.bfloat16), pytest.param("sm_80", torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("shortcut", [False, True], ids=["formed", "the end of a block"])
def test_both_gradients_of_a_narrow_convolution(
    act: Activation, target: str, dtype: torch.dtype, shortcut: bool
) -> None:
    conv = Conv((1, 16, 6, 7), 16, (3, 3), Geometry(padding=(1, 1)))
    producer = producer_of(act, dtype, shortcut=shortcut, channels=16)
    dy = parts_of(OutputGrad(activation(conv.size, dtype), mask_for(act, conv.size, dtype, bits=True), act=act))
    add = OutputGrad(activation(conv.size, dtype), mask_for(act, conv.size, dtype, bits=True), act=act)
    kernel = "conv_input_grad_kernel" if shortcut and act.needs_input else "conv_backward_kernel"
    args = dy, producer.output, conv.weight(dtype), conv.geometry, producer
    check(target, kernel, conv_producer_backward, 16 * 9, *args, add=add)


@each_act
def test_batch_norms_gradient(act: Activation, target: str, dtype: torch.dtype) -> None:
    size = (2, 40, 5, 3)
    dy = OutputGrad(activation(size, dtype), mask_for(act, size, dtype, bits=True), act=act)
    norm = producer_of(act, dtype, shortcut=False, channels=40).norm
    check(target, "bn_backward_reduce_kernel", bn_backward_reduce, 30, dy, activation(size, dtype), norm)
    check(target, "bn_backward_apply_kernel", bn_backward_apply, 1, parts_of(dy))


@each_other
def test_moments(act: Activation, target: str, dtype: torch.dtype) -> None:
    u = ConvInput(activation((1, 32, 6, 7), dtype), *numbers(32), act)
    check(target, "input_moments_kernel", input_moments, 42, u)


@pytest.mark.parametrize(("act", "target", "dtype"), covering([act for act in ACTS if poolable(act)]))
def test_the_end_of_the_stem(act: Activation, target: str, dtype: torch.dtype) -> None:
    args = activation((1, 16, 9, 8), dtype), *numbers(16), PoolGeometry()
    check(target, "stem_pool_kernel", stem_pool, 1, *args, act=act)
