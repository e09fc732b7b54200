"""fusedres.functional: the formulas of torch.nn.functional, and errors before anything has changed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.functional import add_act, bn_add_act, conv_bn_act
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import tensor

VECTORS = ("gamma", "beta", "running_mean", "running_var")


def vectors(channels: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    """gamma, beta, running_mean, running_var."""
    values = [tensor(channels, seed=seed + i, dtype=dtype) for i in range(4)]
    values[3] = values[3].square() + 0.5
    return dict(zip(VECTORS, values, strict=True))


def operands(weight: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "x": tensor(*size, seed=1, dtype=dtype),
        "weight": tensor(*weight, seed=2, dtype=dtype),
    } | vectors(weight[0], 10, dtype)


def eager_conv_bn_act(
    x, weight, gamma, beta, running_mean, running_var, *, training, bias=None, residual=None, stride=1,
    padding=0, dilation=1, groups=1, momentum=0.1, eps=1e-5, act="relu",
):  # fmt: skip
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    training = training or running_mean is None
    z = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if act == "relu" else z


def eager_bn_add_act(
    y, gamma, beta, running_mean, running_var, residual, *, training, residual_norm=None, momentum=0.1,
    eps=1e-5, act="relu",
):  # fmt: skip
    def norm(y, gamma, beta, mean, var):
        return F.batch_norm(y, mean, var, gamma, beta, training or mean is None, momentum, eps)

    z = norm(y, gamma, beta, running_mean, running_var)
    if residual is not None:
        z = z + (residual if residual_norm is None else norm(residual, *residual_norm))
    return torch.relu(z) if act == "relu" else z


def called(function, arguments: dict[str, Any], **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and under their names the gradients and the running statistics after it."""
    named: dict[str, Tensor] = {}

    def fresh(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
            return tuple(fresh(f"{name}.{field}", v) for field, v in zip(VECTORS, value, strict=True))
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        named[name] = value
        return value if "running" in name else value.requires_grad_()

    z = function(**{name: fresh(name, value) for name, value in arguments.items()}, **keywords)
    z.backward(tensor(*z.shape, seed=5, dtype=z.dtype))
    return z.detach(), {name: v if "running" in name else v.grad for name, v in named.items()}


def assert_same_call(ours, eager, arguments: dict[str, Any], **keywords: Any) -> None:
    schedule = {"schedule": keywords.pop("schedule")} if "schedule" in keywords else {}
    (z, left), (exact, expected) = (
        called(ours, arguments, **keywords, **schedule),
        called(eager, arguments, **keywords),
    )
    assert relative_error(z, exact) <= 1e-10
    assert z.is_contiguous(memory_format=torch.channels_last)
    scale = 1e-3 * max(float(v.norm()) for v in expected.values())
    for name, value in expected.items():
        assert relative_error(left[name], value, max(float(value.norm()), scale)) <= 1e-10, name


CONVOLUTIONS = {
    "1x1 with room for moments": ((16, 4, 1, 1), {}),
    "1x1 that narrows": ((4, 12, 1, 1), {}),
    "strided 1x1": ((16, 4, 1, 1), {"stride": 2}),
    "3x3": ((6, 5, 3, 3), {"padding": 1}),
    "pairs, each part its own": (
        (6, 5, 3, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)}
    ),
    "groups": ((9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((6, 1, 3, 3), {"groups": 6, "padding": (1, 1)}),
}  # fmt: skip
convolutions = pytest.mark.parametrize(("weight", "window"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "residual": {"residual": True},
    "no activation": {"act": None},
    "bias, residual, no activation": {"bias": True, "residual": True, "act": None},
    "no gamma": {"gamma": None},
    "no beta": {"beta": None},
    "not affine": {"gamma": None, "beta": None, "residual": True},
    "no running statistics": {"running_mean": None, "running_var": None, "bias": True},
    "momentum 0.3 and a large eps": {"momentum": 0.3, "eps": 0.5},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0, "bias": True},
}


def with_options(weight: tuple[int, ...], window: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    arguments = operands(weight, (3, weight[1] * window.get("groups", 1), 8, 7)) | window | options
    if arguments.pop("bias", False):
        arguments["bias"] = tensor(weight[0], seed=20)
    if arguments.pop("residual", False):
        shape = F.conv2d(arguments["x"], arguments["weight"], **window).shape
        arguments["residual"] = tensor(*shape, seed=21)
    return arguments


@convolutions
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_act(weight, window, options, training):
    assert_same_call(conv_bn_act, eager_conv_bn_act, with_options(weight, window, options), training=training)


@convolutions
@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_act_on_every_schedule(weight, window, schedule, training):
    arguments = with_options(weight, window, {"bias": True, "residual": True})
    assert_same_call(conv_bn_act, eager_conv_bn_act, arguments, training=training, schedule=schedule)


ENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alone": {"residual": None},
    "alone, no activation": {"residual": None, "act": None},
    "no activation": {"act": None},
    "normalised shortcut": {"residual_norm": tuple(vectors(6, 30).values())},
    "shortcut normalised without parameters": {"residual_norm": (None, None, tensor(6), tensor(6) ** 2 + 1)},
    "shortcut normalised by its own statistics only": {"residual_norm": (tensor(6), tensor(6), None, None)},
    "not affine": {"gamma": None, "beta": None},
    "no running statistics": {"running_mean": None, "running_var": None},
    "momentum 0.3 and a large eps": {
        "momentum": 0.3, "eps": 0.5, "residual_norm": tuple(vectors(6, 30).values())
    },
}  # fmt: skip


@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("training", [True, False])
def test_bn_add_act(options, training):
    arguments = {"y": tensor(3, 6, 5, 4), **vectors(6, 10), "residual": tensor(3, 6, 5, 4, seed=2)} | options
    assert_same_call(bn_add_act, eager_bn_add_act, arguments, training=training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_storage_dtypes(dtype, training):
    """Statistics and parameters in fp32, as mixed precision keeps them."""
    arguments = {"x": tensor(3, 4, 8, 7, dtype=dtype), "weight": tensor(16, 4, 1, 1, seed=2, dtype=dtype)}
    arguments |= vectors(16, 10, torch.float32)
    exact = {name: value.double() for name, value in arguments.items()}
    for schedule in (AUTO, "moments"):
        z, left = called(conv_bn_act, arguments, training=training, schedule=schedule)
        eager, _ = called(eager_conv_bn_act, arguments, training=training)
        truth, _ = called(eager_conv_bn_act, exact, training=training)
        assert_as_accurate_as_eager(z, eager, truth, floor=2 * torch.finfo(dtype).eps)
        assert left["weight"].dtype == dtype and left["gamma"].dtype == torch.float32


def test_nothing_is_recorded_without_grad():
    arguments = operands((16, 4, 1, 1), (3, 4, 8, 7))
    expected = eager_conv_bn_act(**{k: v.clone() for k, v in arguments.items()}, training=True)
    with torch.no_grad():
        z = conv_bn_act(**arguments, training=True)
    assert not z.requires_grad and relative_error(z, expected) <= 1e-10


def test_running_statistics_need_a_gradient_from_nobody():
    arguments = operands((16, 4, 1, 1), (3, 4, 8, 7))
    arguments["weight"].requires_grad_()
    conv_bn_act(**arguments, training=True).sum().backward()
    assert all(arguments[name].grad is None for name in ("running_mean", "running_var", "x", "gamma"))


NAN = float("nan")
BAD_CONV = {
    "activation by another name": ({"act": "celu"}, ValueError, "act: .*'celu'"),
    "activation as a function": ({"act": torch.relu}, ValueError, "act: "),
    "unknown schedule": ({"schedule": "fast"}, ValueError, "schedule: .*'fast'"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, r"stride: .*\(1, 1, 1\)"),
    "a list": ({"padding": [1, 1]}, ValueError, r"padding: .*\[1, 1\]"),
    "padding by name": ({"padding": "same"}, ValueError, "padding: .*'same'"),
    "dilation of 0": ({"dilation": 0}, ValueError, "dilation"),
    "stride of 0": ({"stride": 0}, ValueError, "stride"),
    "negative padding": ({"padding": -1}, ValueError, "padding"),
    "groups that do not divide": ({"groups": 3}, ValueError, "groups: .*16.*3"),
    "no groups": ({"groups": 0}, ValueError, "groups: .*0"),
    "mean without variance": ({"running_var": None}, ValueError, "running_mean, running_var: .*both"),
    "variance without mean": ({"running_mean": None}, ValueError, "running_mean, running_var: .*both"),
    "gamma of another length": ({"gamma": tensor(15)}, ValueError, r"gamma: .*\(16,\).*\(15,\)"),
    "beta as a matrix": ({"beta": tensor(16, 1)}, ValueError, r"beta: .*\(16,\).*\(16, 1\)"),
    "running mean of another length": ({"running_mean": tensor(4)}, ValueError, r"running_mean: .*\(16,\)"),
    "running variance of another length": ({"running_var": tensor(1)}, ValueError, r"running_var: .*\(16,\)"),
    "bias of another length": ({"bias": tensor(4)}, ValueError, r"bias: .*\(16,\).*\(4,\)"),
    "residual elsewhere": (
        {"residual": tensor(3, 16, 8, 7).to("meta")}, ValueError, "residual: expected it on cpu, got meta"
    ),
    "gamma elsewhere": ({"gamma": tensor(16).to("meta")}, ValueError, "gamma: expected it on cpu, got meta"),
    "running variance elsewhere": (
        {"running_var": tensor(16).to("meta")}, ValueError, "running_var: expected it on cpu, got meta"
    ),
    "bias elsewhere": ({"bias": tensor(16).to("meta")}, ValueError, "bias: expected it on cpu, got meta"),
    "weight elsewhere": (
        {"weight": tensor(16, 4, 1, 1).to("meta")}, ValueError, "weight of x: expected it on cpu, got meta"
    ),
    "NaN momentum": ({"momentum": NAN}, ValueError, "momentum.*nan"),
    "momentum as text": ({"momentum": "0.1"}, TypeError, "momentum of x: expected a number, got '0.1'"),
    "eps as text": ({"eps": "1e-5"}, TypeError, "eps of x: expected a number, got '1e-5'"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps of x: .*at least 0, got -1e-05"),
    "NaN eps": ({"eps": NAN}, ValueError, "eps.*nan"),
    "infinite momentum": ({"momentum": float("inf")}, ValueError, "momentum.*inf"),
    "residual of the input's shape": (
        {"residual": tensor(3, 4, 8, 7)}, ValueError, r"residual: .*\(3, 16, 8, 7\)"
    ),
    "residual that would broadcast": ({"residual": tensor(1, 16, 1, 1)}, ValueError, "residual: .*"),
    "residual of integers": (
        {"residual": torch.ones(3, 16, 8, 7, dtype=torch.int64)}, TypeError, "residual: .*floating"
    ),
    "3-D input": ({"x": tensor(4, 8, 7)}, ValueError, "x: .*4-D"),
    "wrong channels": ({"x": tensor(3, 5, 8, 7)}, ValueError, "x: .*4 channels.*5"),
    "integers": ({"x": torch.ones(3, 4, 8, 7, dtype=torch.int32)}, TypeError, "x: .*int32"),
    "weight of another dtype": (
        {"weight": tensor(16, 4, 1, 1).float()}, TypeError, "weight.*float64.*float32"
    ),
    "weight as a matrix": ({"weight": tensor(16, 4)}, ValueError, r"weight: .*\(16, 4\)"),
    "one value per channel": ({"x": tensor(1, 4, 1, 1)}, ValueError, "x: .*more than 1 value"),
    "image smaller than the kernel": ({"weight": tensor(16, 4, 9, 9)}, ValueError, "x: .*8 x 7.*9 x 9"),
}  # fmt: skip


def assert_unchanged(arguments: dict[str, Any], kept: dict[str, Tensor]) -> None:
    assert all(value.is_meta or torch.equal(arguments[name], value) for name, value in kept.items())


@pytest.mark.parametrize(("change", "error", "names"), BAD_CONV.values(), ids=BAD_CONV)
def test_conv_bn_act_refuses(change, error, names):
    arguments = operands((16, 4, 1, 1), (3, 4, 8, 7)) | {"training": True} | change
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=names):
        conv_bn_act(**arguments)
    assert_unchanged(arguments, kept)


BAD_END = {
    "activation by another name": ({"act": "celu"}, ValueError, "act: .*'celu'"),
    "residual of another shape": (
        {"residual": tensor(3, 6, 5, 5)}, ValueError, r"residual: .*\(3, 6, 5, 4\).*\(3, 6, 5, 5\)"
    ),
    "residual that would broadcast": ({"residual": tensor(1, 6, 1, 1)}, ValueError, "residual: .*"),
    "residual of integers": (
        {"residual": torch.ones(3, 6, 5, 4, dtype=torch.int64)}, TypeError, "residual: .*floating"
    ),
    "norm without a residual": (
        {"residual": None, "residual_norm": tuple(vectors(6, 1).values())},
        ValueError,
        "residual_norm: .*None",
    ),
    "norm of another length": (
        {"residual_norm": tuple(vectors(5, 1).values())}, ValueError, r"\(6,\).*\(5,\)"
    ),
    "norm of two vectors": ({"residual_norm": (tensor(6), tensor(6))}, ValueError, "residual_norm"),
    "half of the running statistics": (
        {"running_var": None}, ValueError, "running_mean, running_var: .*both"
    ),
    "half of the residual's": (
        {"residual_norm": (None, None, tensor(6), None)}, ValueError, "running_mean, running_var: .*both"
    ),
    "gamma of another length": ({"gamma": tensor(5)}, ValueError, r"gamma: .*\(6,\).*\(5,\)"),
    "residual elsewhere": (
        {"residual": tensor(3, 6, 5, 4).to("meta")}, ValueError, "residual: expected it on cpu, got meta"
    ),
    "running mean elsewhere": (
        {"running_mean": tensor(6).to("meta")}, ValueError, "running_mean: expected it on cpu, got meta"
    ),
    "the residual's beta elsewhere": (
        {"residual_norm": (tensor(6), tensor(6).to("meta"), None, None)},
        ValueError,
        "beta of residual_norm: expected it on cpu, got meta",
    ),
    "negative eps": ({"eps": -1.0}, ValueError, "eps of y: .*at least 0, got -1"),
    "NaN momentum": ({"momentum": NAN}, ValueError, "momentum.*nan"),
    "3-D": ({"y": tensor(6, 5, 4)}, ValueError, "y: .*4-D"),
    "integers": ({"y": torch.ones(3, 6, 5, 4, dtype=torch.int64)}, TypeError, "y: .*floating"),
    "one value per channel": (
        {"y": tensor(1, 6, 1, 1), "residual": None}, ValueError, "y: .*more than 1 value"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "names"), BAD_END.values(), ids=BAD_END)
def test_bn_add_act_refuses(change, error, names):
    arguments = {"y": tensor(3, 6, 5, 4), **vectors(6, 10), "residual": tensor(3, 6, 5, 4, seed=2)}
    arguments |= {"training": True} | change
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=names):
        bn_add_act(**arguments)
    assert_unchanged(arguments, kept)


def test_add_act_refuses_a_residual_elsewhere():
    with pytest.raises(ValueError, match="residual: expected it on cpu, got meta"):
        add_act(tensor(3, 6, 5, 4), tensor(3, 6, 5, 4).to("meta"))
