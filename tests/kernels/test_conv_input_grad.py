"""fusedres.kernels.conv_input_grad, compiled and executed: dy given or formed, with what is joined to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedres.compiler.targets import TARGETS
from fusedres.operands import Geometry, Normaliser, OutputGrad, Producer
from fusedres.ops.act_mask import is_bits, pack_relu_mask
from fusedres.ops.bn_backward import added_gradient, bn_backward_apply, bn_backward_reduce
from fusedres.ops.conv_input_grad import conv_input_grad, conv_producer_grad, input_grad
from fusedres.ops.input_gradients import gradient_shape
from fusedres.ops.zero_pad_shortcut import ZeroPaddedGrad, zero_pad_size
from fusedres.plan.conv_tiles import conv_tiles, pinned
from tests.comparison import LOW
from tests.kernels import random_convolutions
from tests.kernels.convolutions import NETWORKS, Conv, as_tf32, assert_as_accurate, convolutions_of
from tests.kernels.executed import TESTED, activation, covering, executed
from tests.kernels.random_convolutions import reproducible

CASES = {
    "1x1": Conv((1, 64, 9, 9), 128, (1, 1)),
    "1x1, several tiles of channels": Conv((1, 200, 7, 9), 64, (1, 1)),
    "strided 1x1": Conv((2, 64, 7, 8), 64, (1, 1), Geometry((2, 2))),
    "3x3": Conv((1, 64, 7, 9), 64, (3, 3), Geometry(padding=(1, 1))),
    "strided 3x3, tails of pixels, K and C": Conv((1, 24, 9, 7), 40, (3, 3), Geometry((2, 2), (1, 1))),
    "odd channels": Conv((1, 17, 5, 5), 33, (3, 3), Geometry(padding=(1, 1))),
    "dilated": Conv((1, 16, 9, 9), 32, (3, 3), Geometry(padding=(2, 2), dilation=(2, 2))),
    "stride and dilation share a divisor": Conv((1, 16, 9, 10), 16, (3, 3), Geometry((2, 2), (2, 2), (2, 2))),
    "nothing square": Conv((1, 16, 11, 8), 16, (5, 2), Geometry((3, 2), (2, 0), (1, 3))),
    "a window in the padding": Conv((1, 16, 4, 4), 16, (1, 1), Geometry(padding=(1, 1))),
    "last row unread": Conv((1, 16, 8, 8), 16, (3, 3), Geometry((2, 2))),
    "wide": Conv((1, 256, 5, 5), 192, (1, 1)),
    "the stem": Conv((1, 3, 21, 18), 64, (7, 7), Geometry((2, 2), (3, 3))),
    "one pixel": Conv((1, 16, 1, 1), 16, (3, 3), Geometry((2, 2), (1, 1))),
    "groups of 4": Conv((1, 128, 6, 6), 128, (3, 3), Geometry(padding=(1, 1), groups=32)),
    "two wide groups": Conv((1, 64, 6, 6), 128, (3, 3), Geometry(padding=(1, 1), groups=2)),
    "groups of 3 and 5 channels": Conv((1, 15, 6, 6), 25, (3, 3), Geometry((2, 2), (1, 1), groups=5)),
}
FORMS = ("plain", "bits, dy formed", "output, dy formed", "bits", "dy formed", "scaled", "pooled, bits", "pooled")
SMALL = "strided 3x3, tails of pixels, K and C"


def gradient(size: tuple[int, ...], dtype: torch.dtype, form: str) -> OutputGrad:
    z = torch.relu(activation(size, dtype))
    g = activation(size, dtype)
    if form.startswith("pooled"):
        g = activation((size[0], size[1], 1, 1), dtype).expand(size)
    dy = OutputGrad(g)
    if "bits" in form:
        dy = dy._replace(mask=pack_relu_mask(z))
    if "output" in form:
        dy = dy._replace(mask=z)
    if "dy formed" in form:
        p, q, r, mean = torch.randn(4, size[1])
        dy = dy._replace(y=activation(size, dtype), p=p, q=q, r=r, mean=mean)
    if form == "scaled":
        dy = dy._replace(p=torch.randn(size[1]))
    return dy


class Operands:
    def __init__(self, conv: Conv, dtype: torch.dtype, form: str) -> None:
        self.conv, self.dtype = conv, dtype
        p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
        self.dy = gradient((conv.size[0], conv.k, p, q), dtype, form)
        self.weight = conv.weight(dtype)

    def computed(self, dtype: torch.dtype, *, tf32: bool = False) -> Tensor:
        """By the library, dy and result rounded to ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def to(tensor: Tensor | None) -> Tensor | None:
            vector = tensor is not None and tensor.dim() == 1
            return tensor if tensor is None or is_bits(tensor) else tensor.to(wide if vector else dtype)

        grad, weight = bn_backward_apply.reference(OutputGrad(*(to(part) for part in self.dy[:7]))), to(self.weight)
        if tf32:
            grad, weight = as_tf32(grad.float()).double(), as_tf32(weight.float()).double()
        return input_grad(grad, weight, self.conv.size, self.conv.geometry)


def zero_padded_grad(size: tuple[int, ...], dtype: torch.dtype, form: str) -> ZeroPaddedGrad:
    """What comes by the parameter-free shortcut of an input of this size."""
    n, c, *_ = size
    stride = (2, 1) if "pooled" in form else (2, 2)
    size_at_end = zero_pad_size(size, 2 * c + 7 if "odd" in form else c + 16, stride)
    z = torch.relu(activation(size_at_end, dtype))
    g = activation((n, size_at_end[1], 1, 1) if "pooled" in form else size_at_end, dtype).expand(size_at_end)
    mask = pack_relu_mask(z) if "bits" in form else z if "output" in form else None
    return ZeroPaddedGrad(OutputGrad(g, mask), size, stride)


def check(target: str, conv: Conv, dtype: torch.dtype, form: str, join: str = "nothing") -> None:
    operands = Operands(conv, dtype, form)
    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = operands.computed(torch.float64, tf32=True)
    eager, exact = operands.computed(dtype), operands.computed(torch.float64)
    depth = conv.k // conv.geometry.groups * conv.window[0] * conv.window[1]
    if join in ("producer", "end", "end, bits"):
        mean, invstd, scale, shift = torch.rand(4, conv.size[1]) + 0.1
        producer = Producer(activation(conv.size, dtype, -0.5), Normaliser(mean, invstd, scale, shift - 0.3))
        u = torch.relu(producer.y.float() * scale.view(1, -1, 1, 1) + producer.norm.shift.view(1, -1, 1, 1)).to(dtype)
        add = None
        if join != "producer":
            u = torch.relu(activation(conv.size, dtype))
            producer = producer._replace(out=u, mask=pack_relu_mask(u) if join == "end, bits" else None)
            add = OutputGrad(activation(conv.size, dtype))
            eager, exact, tf32 = eager + add.g, exact + add.g, None if tf32 is None else tf32 + add.g
        call = lambda: conv_producer_grad(operands.dy, operands.weight, conv.geometry, producer, add=add)  # noqa: E731
        (g, sums), trace = executed(target, call)
        assert trace.by_kernel()["bn_backward_finish_kernel"] == 1
        eager, exact = torch.where(u > 0, eager, 0.0), torch.where(u > 0, exact, 0.0)
        tf32 = None if tf32 is None else torch.where(u > 0, tf32, 0.0)
        wide = Normaliser(*(vector.double() for vector in producer.norm.vectors.values()))
        sums_exact = bn_backward_reduce.reference(OutputGrad(g.double()), producer.y.double(), wide)
        for ours, theirs, scale_ in zip(sums, sums_exact, (1.0, 1.0, *2 * [scale.abs().max()]), strict=True):
            # Of the gradient as stored: nothing but the order of the sum differs.
            size = float(g.double().abs().sum()) / conv.size[1] * float(scale_)
            assert float((ours.double() - theirs).abs().max()) <= 1e-5 * max(size, 1.0)
    else:
        add = None
        if join != "nothing":
            size = (*conv.size[:2], 1, 1) if join == "pooled" else conv.size
            other = activation(size, torch.float32 if join == "wide" else dtype).expand(conv.size)
            z = torch.relu(activation(conv.size, dtype))
            add = OutputGrad(other, {"bits": pack_relu_mask(z), "output": z}.get(join))
            if join.startswith("zero-padded"):
                add = zero_padded_grad(conv.size, dtype, join)
            eager = eager.to(other.dtype) + added_gradient(add)
            exact, tf32 = exact + added_gradient(add), None if tf32 is None else tf32 + added_gradient(add)
        call = lambda: conv_input_grad(operands.dy, operands.weight, conv.size, conv.geometry, add=add)  # noqa: E731
        g, trace = executed(target, call)
    assert trace.by_kernel()["conv_input_grad_kernel"] == 1
    assert g.dtype == eager.dtype
    assert g.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(g, eager, exact, tf32, depth)


JOINS = (
    "nothing", "producer", "plain", "bits", "output", "pooled", "wide", "zero-padded", "zero-padded, bits",
    "zero-padded, bits of an odd difference", "zero-padded, output", "zero-padded, pooled, bits", "end", "end, bits",
)  # fmt: skip


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, "bits, dy formed", "producer")


@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS, offset=2, contraction=True))
def test_every_form(form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[SMALL], dtype, form)


@pytest.mark.parametrize(("join", "target", "dtype"), covering(JOINS, offset=3, contraction=True))
def test_every_epilogue(join: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[SMALL], dtype, "dy formed", join)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS, contraction=True))
def test_every_form_of_every_case(case: str, form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, form, JOINS[(FORMS.index(form) + list(CASES).index(case)) % len(JOINS)])


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TESTED)
def test_every_shape_of_every_network(network: str, target: str) -> None:
    for i, conv in enumerate(convolutions_of(network)):
        check(target, conv.smaller(8_000_000), LOW[i % 2], FORMS[i % 5], JOINS[i % 4])


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["3x3", "wide"], offset=5, contraction=True))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    operands = Operands(CASES[case], dtype, "bits, dy formed")
    shape = gradient_shape(operands.dy, operands.weight, operands.conv.size, operands.conv.geometry)
    for tile in conv_tiles(shape, TARGETS[target]):
        with pinned(tile):
            check(target, operands.conv, dtype, "bits, dy formed", "producer")


RANDOM = {**random_convolutions.ON_TARGETS, "form": st.sampled_from(FORMS), "join": st.sampled_from(JOINS)}


@settings(reproducible, max_examples=4)
@given(**RANDOM)
def test_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str, join: str) -> None:
    check(target, conv, dtype, form, join)


@pytest.mark.slow
@settings(reproducible, max_examples=300)
@given(**RANDOM)
def test_many_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str, join: str) -> None:
    check(target, conv, dtype, form, join)
