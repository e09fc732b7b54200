"""fusedres.activation, and every op that takes one: values and gradients against autograd in fp64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from fusedres.activation import (
    IDENTITY,
    NAMED,
    RELU,
    RELU6,
    Activation,
    activation_named,
    activation_of,
    activation_of_function,
    leaky_relu,
)
from fusedres.operands import ConvInput, Geometry, Norm, Normaliser, OutputGrad, PoolGeometry, Producer
from fusedres.ops.act_mask import act_backward, is_bits
from fusedres.ops.add_act import add_act
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import bn_backward
from fusedres.ops.bn_forward import bn_forward
from fusedres.ops.conv_backward import conv_backward, conv_producer_backward
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.input_moments import input_moments
from fusedres.ops.stem_pool import poolable, stem_pool, stem_pool_backward
from tests.comparison import assert_close

MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "a slope that turns": nn.LeakyReLU(-0.3),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "mish": nn.Mish(),
    "elu": nn.ELU(),
    "an elu that falls": nn.ELU(-0.5),
}
each_activation = pytest.mark.parametrize("name", MODULES)
SIZE = (2, 5, 4, 3)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def meant_by(name: str) -> tuple[nn.Module, Activation]:
    act = activation_of(MODULES[name])
    assert act is not None
    return MODULES[name], act


@each_activation
def test_is_the_modules_function_and_derivative(name):
    module, act = meant_by(name)
    ends = [-3.0, -0.0, 0.0, 3.0, 6.0, 7.0, -9.0, float("inf"), float("nan")]
    v = torch.cat([randn(200) * 4, torch.tensor(ends, dtype=torch.float64)]).requires_grad_()
    z = module(v)
    torch.testing.assert_close(act.value(v), z, equal_nan=True)
    assert act.value(v[-1:]).isnan()
    (slope,) = torch.autograd.grad(z.sum(), v)
    finite = v.isfinite()
    torch.testing.assert_close(act.slope(v.detach())[finite], slope[finite])
    g = torch.randn_like(v)
    torch.testing.assert_close(act.gradient(g, v.detach())[finite], (g * slope)[finite])
    if not act.needs_input:
        torch.testing.assert_close(act.gradient(g, z.detach())[finite], (g * slope)[finite])
    assert act.value(torch.zeros(1)) == 0, "kernels read zeros where there are no values"
    assert act.rises == bool((act.value(torch.linspace(-9, 9, 1001)).diff() >= 0).all())


def test_are_values():
    assert leaky_relu(0.2) == leaky_relu(0.2) != leaky_relu(0.1)
    assert len({*NAMED.values(), leaky_relu(0.2), leaky_relu(0.01)}) == len(NAMED) + 1
    assert str(leaky_relu(0.2)) == "leaky_relu(0.2)"
    assert activation_named("relu6") is RELU6
    assert activation_named(None) is IDENTITY
    assert activation_named(RELU) is RELU
    with pytest.raises(ValueError, match=r"act: expected None or one of .identity., .relu., .* got .celu."):
        activation_named("celu")


def test_a_derived_module_may_mean_something_else():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    assert activation_of(Shifted()) is None
    assert activation_of(nn.Sigmoid()) is None, "it is not 0 at 0"


CALLS = {
    "relu": (F.relu, (), {}),
    "relu in place": (F.relu, (True,), {}),
    "torch's relu": (torch.relu, (), {}),
    "torch's relu_": (torch.relu_, (), {}),
    "relu_": (F.relu_, (), {}),
    "relu6": (F.relu6, (), {"inplace": False}),
    "leaky_relu": (F.leaky_relu, (), {}),
    "leaky_relu with a slope": (F.leaky_relu, (0.2,), {"inplace": True}),
    "leaky_relu with a named slope": (F.leaky_relu, (), {"negative_slope": -1}),
    "leaky_relu_": (F.leaky_relu_, (0.3,), {}),
    "silu": (F.silu, (False,), {}),
    "hardswish": (F.hardswish, (), {"inplace": True}),
    "gelu": (F.gelu, (), {}),
    "gelu of tanh": (F.gelu, (), {"approximate": "tanh"}),
    "mish": (F.mish, (), {}),
    "elu": (F.elu, (2,), {}),
    "elu with a named alpha": (F.elu, (), {"alpha": 0.5, "inplace": True}),
    "elu_": (F.elu_, (), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_is_what_a_call_of_a_function_computes(call):
    function, args, kwargs = CALLS[call]
    act, v = activation_of_function(function, args, kwargs), randn(200) * 4
    assert act is not None
    torch.testing.assert_close(act.value(v), function(v.clone(), *args, **kwargs), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["relu", "relu_"])
def test_is_what_a_call_of_a_method_computes(name):
    assert activation_of_function(name) is RELU


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.sigmoid, (), {}),
        ("clamp", (), {}),
        (F.leaky_relu, (torch.tensor(0.1),), {}),
        (F.elu, (), {"alpha": torch.tensor(0.1)}),
        (F.relu, (), {"slope": 0.1}),
        ([], (), {}),
    ],
    ids=["another", "another method", "a slope that is a tensor", "by its name", "no argument of it", "no function"],
)
def test_other_calls_are_no_activation(function, args, kwargs):
    assert activation_of_function(function, args, kwargs) is None


@each_activation
@pytest.mark.parametrize("op", ["bn_act", "bn_forward", "add_act", "conv_bn_act"])
def test_output_and_what_its_mask_gives_back(name, op, each_backend):
    module, act = meant_by(name)
    x, residual, (scale, shift) = randn(*SIZE) * 3, randn(*SIZE), randn(2, SIZE[1])
    wide = scale[:, None, None], shift[:, None, None]
    if op == "bn_act":
        v = x * wide[0] + wide[1] + residual
        z, mask = bn_act(x, scale, shift, residual=residual, act=act, bit_mask=True)
    elif op == "bn_forward":
        v = batch_norm(x, None, None, scale, shift, True) + residual
        z, mask, _ = bn_forward(x, Norm(scale, shift), residual=residual, act=act, bit_mask=True)
    elif op == "add_act":
        v = x + residual
        z, mask = add_act(x, residual, act=act, bit_mask=True)
    else:
        weight = randn(SIZE[1], SIZE[1], 1, 1)
        v = conv2d(x, weight) * wide[0] + wide[1] + residual
        main = Contraction(ConvInput(x), weight, Geometry(), scale, shift)
        z, mask, _ = conv_bn_act(main, residual=residual, act=act, bit_mask=True)
    v.requires_grad_()
    exact = module(v)
    assert_close(z, exact.detach(), 1e-12)
    g = randn(*SIZE)
    if act == IDENTITY:
        assert mask is None
        return
    assert is_bits(mask) != act.needs_input
    (expected,) = torch.autograd.grad(exact, v, g)
    assert_close(act_backward(g, mask, act), expected, 1e-12)
    if not act.needs_input:
        assert_close(act_backward(g, z, act), expected, 1e-12)


@each_activation
def test_backward_of_batch_norm(name, each_backend):
    module, act = meant_by(name)
    y, gamma = randn(*SIZE).requires_grad_(), randn(SIZE[1]).requires_grad_()
    beta, g = randn(SIZE[1]).requires_grad_(), randn(*SIZE)
    _, mask, norm = bn_forward(y.detach(), Norm(gamma.detach(), beta.detach()), act=act, bit_mask=True)
    exact = torch.autograd.grad(module(batch_norm(y, None, None, gamma, beta, True)), (y, gamma, beta), g)
    ours = bn_backward(OutputGrad(g, mask, act=act), y.detach(), norm, gamma.detach(), batch_stats=True)
    for gradient, expected in zip(ours, exact, strict=True):
        assert_close(gradient, expected, 1e-11)


@each_activation
def test_a_convolution_of_what_is_formed_on_load(name, each_backend):
    module, act = meant_by(name)
    y, weight, (scale, shift) = randn(*SIZE), randn(4, SIZE[1], 3, 3).requires_grad_(), randn(2, SIZE[1])
    v = (y * scale[:, None, None] + shift[:, None, None]).requires_grad_()
    exact = conv2d(module(v), weight, padding=1)
    u, geometry = ConvInput(y, scale, shift, act), Geometry(padding=(1, 1))
    out, _ = conv_forward(u, weight.detach(), geometry)
    assert_close(out, exact.detach(), 1e-12)
    dy, add = torch.randn_like(exact), randn(*SIZE)
    dweight, dv = torch.autograd.grad((exact, module(v)), (weight, v), (dy, add))
    producer = Producer(y, Normaliser(*torch.zeros(2, SIZE[1]).double(), scale, shift), act=act)
    dw, at_producer = conv_producer_backward(
        OutputGrad(dy), u, weight.detach(), geometry, producer, add=OutputGrad(add)
    )  # fmt: skip
    assert_close(dw, dweight, 1e-12)
    assert_close(at_producer.g, dv, 1e-12)
    assert_close(at_producer.sums.sum_g, dv.sum((0, 2, 3)), 1e-11)


@each_activation
def test_a_convolution_behind_the_end_of_a_block(name, each_backend):
    """Gradients masked on load on both sides, and a producer that a shortcut was added to."""
    module, act = meant_by(name)
    v, weight, after = randn(*SIZE).requires_grad_(), randn(4, SIZE[1], 1, 1), randn(2, 4, 4, 3).requires_grad_()
    u = module(v)
    y = conv2d(u, weight)
    g, add = torch.randn_like(y), randn(*SIZE)
    (behind,) = torch.autograd.grad(module(after), after, g)
    (expected,) = torch.autograd.grad((u, y), v, (add, behind))
    _, mask = bn_act(after.detach(), torch.ones(4).double(), torch.zeros(4).double(), act=act, bit_mask=True)
    dy = OutputGrad(g, mask, act=act)
    out, above = bn_act(v.detach(), *torch.stack((torch.ones(5), torch.zeros(5))).double(), act=act, bit_mask=True)
    raw, norm = randn(*SIZE), Normaliser(*randn(4, SIZE[1]))
    producer = Producer(raw, norm, out, above, act)
    found = conv_producer_backward(dy, producer.output, weight, Geometry(), producer, add=OutputGrad(add))[1]
    assert_close(found.g, expected, 1e-12)
    _, du = conv_backward(dy, ConvInput(out), weight, Geometry(), add=OutputGrad(add, above, act=act))
    exact = conv2d(behind, weight.transpose(0, 1)) + torch.autograd.grad(module(v), v, add)[0]
    assert_close(du, exact, 1e-12)


@each_activation
def test_moments_of_what_is_formed_on_load(name, each_backend):
    module, act = meant_by(name)
    x, (scale, shift) = randn(*SIZE), randn(2, SIZE[1])
    rows = module(x * scale[:, None, None] + shift[:, None, None]).permute(1, 0, 2, 3).flatten(1)
    moments = input_moments(ConvInput(x, scale, shift, act))
    assert_close(moments.mean, rows.mean(1), 1e-12)
    assert_close(moments.m2, rows.cov(correction=0) * rows.shape[1], 1e-12)


@each_activation
@pytest.mark.parametrize("compact", [True, False])
def test_the_end_of_the_stem(name, compact, each_backend):
    module, act = meant_by(name)
    y, (scale, shift), pool = randn(2, 5, 8, 7) * 3, randn(2, 5), PoolGeometry()
    if not poolable(act, compact=compact):
        with pytest.raises(ValueError, match="act: expected one that never falls"):
            stem_pool(y, scale, shift, pool, compact=compact, act=act)
        return
    v = (y * scale[:, None, None] + shift[:, None, None]).requires_grad_()
    exact = max_pool2d(module(v), *pool)
    z, index = stem_pool(y, scale, shift, pool, compact=compact, act=act)
    assert_close(z, exact.detach(), 1e-12)
    dz = torch.randn_like(exact)
    arriving = OutputGrad(dz, None if compact else z, act=act)
    (expected,) = torch.autograd.grad(exact, v, dz)
    assert_close(stem_pool_backward(arriving, index, tuple(y.shape), pool), expected, 1e-12)


def test_a_producers_input_is_asked_for_where_its_output_does_not_tell(each_backend):
    act, x = NAMED["silu"], randn(*SIZE)
    producer = Producer(x, Normaliser(*randn(4, SIZE[1])), x, None, act)
    with pytest.raises(ValueError, match=r"producer\.mask: expected the input of silu beside producer\.out, got None"):
        conv_producer_backward(OutputGrad(x), producer.output, randn(5, 5, 1, 1), Geometry(), producer)
