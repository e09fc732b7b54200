"""fusedres.kernels.rows: kernels executed on slices of wider rows, read and written where they lie.

What lies between the slices is NaN beforehand, and has the same bits afterwards.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import fusedres
from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import bn_backward_apply, bn_backward_reduce
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward, conv_operand
from fusedres.ops.conv_input_grad import Producer, conv_input_grad, conv_producer_grad, input_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad, weight_grad
from fusedres.ops.features import FeatureGrads
from fusedres.ops.rows import pitch_of
from fusedres.runtime.launch import Trace
from tests.comparison import assert_as_accurate_as_eager
from tests.kernels.convolutions import Conv, as_tf32, assert_as_accurate
from tests.kernels.executed import activation, covering, executed
from tests.kernels.on_device import emulated_only
from tests.kernels.test_conv_backward import targets_of
from tests.kernels.test_conv_forward import check_statistics

PADDED = Geometry(padding=(1, 1))
# Beside the convolution: channels of a row before its input and behind it, and before its output and behind it.
CASES = {
    "a layer of DenseNet-121": (Conv((2, 96, 7, 9), 128, (1, 1)), (0, 64), (96, 32)),
    "several tiles of channels": (Conv((1, 192, 5, 7), 32, (1, 1)), (64, 0), (0, 32)),
    "3x3": (Conv((1, 64, 7, 9), 32, (3, 3), PADDED), (0, 32), (64, 0)),
    "4 divides rows, 16 divides C": (Conv((1, 48, 6, 5), 16, (3, 3), PADDED), (0, 12), (4, 8)),
    "a growth of 12": (Conv((2, 28, 5, 5), 12, (3, 3), PADDED), (0, 24), (28, 12)),
    "an odd beginning": (Conv((1, 16, 5, 6), 16, (1, 1)), (3, 5), (1, 2)),
    "odd channels": (Conv((1, 33, 5, 5), 17, (3, 3), PADDED), (2, 1), (0, 5)),
    "few channels": (Conv((1, 3, 9, 7), 8, (3, 3), PADDED), (0, 1), (0, 8)),
    "one pixel an image": (Conv((3, 32, 1, 1), 16, (1, 1)), (0, 16), (32, 16)),
    "strided": (Conv((1, 32, 8, 7), 32, (3, 3), Geometry((2, 2), (1, 1))), (0, 16), (16, 0)),
    "groups": (Conv((1, 64, 6, 6), 64, (3, 3), PADDED._replace(groups=4)), (16, 16), (0, 64)),
}


def cases(*fast: str, offset: int = 0) -> pytest.MarkDecorator:
    """All of them; all but a few are slow."""
    parameters = [
        parameter if parameter.values[0] in fast else pytest.param(*parameter.values, marks=pytest.mark.slow)
        for parameter in covering(CASES, offset, contraction=True)
    ]
    return pytest.mark.parametrize(("case", "target", "dtype"), parameters)


def sliced(tensor: Tensor, around: tuple[int, int]) -> Tensor:
    """The same numbers as a slice of a wider channels_last tensor's channels, the others NaN."""
    before, behind = around
    n, channels, h, w = tensor.shape
    buffer = torch.full((n, before + channels + behind, h, w), float("nan"), dtype=tensor.dtype)
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    view = buffer[:, before : before + channels]
    view.copy_(tensor)
    assert pitch_of(view) == buffer.shape[1]
    return view


def assert_untouched(view: Tensor, around: tuple[int, int]) -> None:
    """The channels beside a slice are what `sliced` made them."""
    rows = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).view(-1, pitch_of(view))
    assert rows[:, : around[0]].isnan().all() and rows[:, around[0] + view.shape[1] :].isnan().all()


def tf32_of(target: str, dtype: torch.dtype, product: Tensor) -> Tensor | None:
    """A product of what tensor cores see, where the library would use them too."""
    return product if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm") else None


def seen(tensor: Tensor) -> Tensor:
    return as_tf32(tensor.float()).double()


def assert_one_launch(trace: Trace, kernel: str) -> None:
    """Nothing was copied by a kernel of ours, nor run by another."""
    assert trace.by_kernel()[kernel] == 1


class Operands:
    def __init__(self, case: str, dtype: torch.dtype) -> None:
        self.conv, self.around_x, self.around_y = CASES[case]
        conv = self.conv
        self.u = ConvInput(
            sliced(conv.input(dtype), self.around_x), torch.rand(conv.size[1]) + 0.5, torch.randn(conv.size[1])
        )
        self.weight = conv.weight(dtype)
        p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
        self.size = (conv.size[0], conv.k, p, q)

    def formed(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        numbers = (vector.to(wide).view(1, -1, 1, 1) for vector in (self.u.scale, self.u.shift))
        scale, shift = numbers
        return torch.relu(self.u.tensor.to(wide) * scale + shift).to(dtype)

    def convolved(self, u: Tensor, weight: Tensor) -> Tensor:
        return conv2d(u, weight, None, *self.conv.geometry)


@pytest.mark.parametrize("prologue", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["prologue", "plain"])
@cases("a layer of DenseNet-121", "a growth of 12", "one pixel an image", "few channels")
def test_forward(case: str, target: str, dtype: torch.dtype, prologue: bool) -> None:
    operands = Operands(case, dtype)
    conv, weight = operands.conv, operands.weight
    u = operands.u if prologue else ConvInput(operands.u.tensor)
    out = sliced(torch.full(operands.size, float("nan"), dtype=dtype), operands.around_y)
    call = lambda: conv_forward(u, weight, conv.geometry, statistics=True, out=out)  # noqa: E731
    (y, partials), trace = executed(target, call, [out])
    assert_one_launch(trace, "conv_forward_kernel")
    source = operands.formed if prologue else u.tensor.to
    tf32 = tf32_of(target, dtype, operands.convolved(seen(source(dtype)), seen(weight)))
    exact = operands.convolved(source(torch.float64), weight.double())
    assert_as_accurate(y, operands.convolved(source(dtype), weight), exact, tf32, conv.depth)
    assert torch.equal(out, y)
    assert_untouched(out, operands.around_y)
    check_statistics(y, partials)


@cases("a layer of DenseNet-121", offset=1)
def test_single_pass(case: str, target: str, dtype: torch.dtype) -> None:
    operands = Operands(case, dtype)
    conv, weight = operands.conv, operands.weight
    scale, shift = torch.randn(2, conv.k)
    z, trace = executed(target, lambda: conv_bn_act(Contraction(operands.u, weight, conv.geometry, scale, shift)).z)
    assert_one_launch(trace, "conv_bn_act_kernel")

    def computed(u: Tensor, weight: Tensor) -> Tensor:
        y = operands.convolved(u, weight)
        wide = torch.promote_types(y.dtype, torch.float32)
        z = y.to(wide) * scale.to(wide).view(1, -1, 1, 1) + shift.to(wide).view(1, -1, 1, 1)
        return torch.relu(z.to(y.dtype))

    tf32 = tf32_of(target, dtype, computed(seen(operands.formed(dtype)), seen(weight)))
    exact = computed(operands.formed(torch.float64), weight.double())
    assert_as_accurate(z, computed(operands.formed(dtype), weight), exact, tf32, conv.depth)


def gradient(size: tuple[int, ...], dtype: torch.dtype) -> OutputGrad:
    p, q, r, mean = torch.randn(4, size[1])
    return OutputGrad(activation(size, dtype), y=activation(size, dtype), p=p, q=q, r=r, mean=mean)


def widened(dy: OutputGrad) -> OutputGrad:
    return OutputGrad(*(part.double() if torch.is_tensor(part) else part for part in dy))


@cases("a layer of DenseNet-121", "an odd beginning", "3x3", offset=2)
def test_weight_gradient(case: str, target: str, dtype: torch.dtype) -> None:
    operands = Operands(case, dtype)
    conv, dy = operands.conv, gradient(operands.size, dtype)
    dw, trace = executed(target, lambda: conv_weight_grad(dy, operands.u, conv.window, conv.geometry))
    assert_one_launch(trace, "conv_weight_grad_kernel")
    rounded, whole = bn_backward_apply.reference(dy), bn_backward_apply.reference(widened(dy))
    u = operands.formed(dtype)
    eager = weight_grad(rounded, u, conv.window, conv.geometry).float()
    exact = weight_grad(whole, operands.formed(torch.float64), conv.window, conv.geometry)
    tf32 = tf32_of(target, dtype, weight_grad(seen(rounded), seen(u), conv.window, conv.geometry))
    assert_as_accurate(dw, eager, exact, tf32, dy.g[:, 0].numel())


def check_added(target: str, case: str, dtype: torch.dtype, *, in_place: bool, together: bool) -> None:
    """The input's gradient behind the producer's ReLU, added to that of the features; with the weight's or alone."""
    operands = Operands(case, dtype)
    conv, weight, dy = operands.conv, operands.weight, gradient(operands.size, dtype)
    mean, invstd, scale, shift = torch.rand(4, conv.size[1]) + 0.1
    producer = Producer(operands.u.tensor, Normaliser(mean, invstd, scale, shift - 0.5))
    before = sliced(conv.input(dtype), operands.around_x)
    into = before if in_place else sliced(torch.full(conv.size, float("nan"), dtype=dtype), operands.around_x)
    given, features = before.clone(), FeatureGrads(before, into)
    rounded, whole = bn_backward_apply.reference(dy), bn_backward_apply.reference(widened(dy))
    if together:
        operands.u = producer.output
        forms = dy, operands.u, weight, conv.geometry
        call = lambda: conv_producer_backward(*forms, producer, features=features)  # noqa: E731
        (dw, (g, sums)), trace = executed(target, call, [into])
        exact = weight_grad(whole, operands.formed(torch.float64), conv.window, conv.geometry)
        eager = weight_grad(rounded, operands.formed(dtype), conv.window, conv.geometry)
        assert_as_accurate(dw, eager, exact, None, dy.g[:, 0].numel(), "dw")
    else:
        call = lambda: conv_producer_grad(dy, weight, conv.geometry, producer, features=features)  # noqa: E731
        (g, sums), trace = executed(target, call, [into])
    assert_one_launch(trace, "conv_backward_kernel" if together else "conv_input_grad_kernel")
    assert_untouched(into, operands.around_x)
    assert torch.equal(g, into)

    u = (producer.y.float() * scale.view(1, -1, 1, 1) + producer.norm.shift.view(1, -1, 1, 1)).to(dtype)

    def added(part: Tensor) -> Tensor:
        wide = torch.promote_types(part.dtype, torch.float32)
        part = torch.where(u > 0, part, 0.0)
        return (given.to(wide) + part.to(wide) * scale.to(wide).view(1, -1, 1, 1)).to(part.dtype)

    exact = input_grad(whole, weight.double(), conv.size, conv.geometry)
    eager = added(input_grad(rounded, weight, conv.size, conv.geometry))
    tf32 = tf32_of(target, dtype, added(input_grad(seen(rounded), seen(weight), conv.size, conv.geometry)))
    assert_as_accurate(into, eager, added(exact), tf32, conv.k * conv.window[0] * conv.window[1], "into")

    # Of the same gradient written out: sums differ by its rounding there, and by their order.
    written, _ = executed(target, lambda: conv_input_grad(dy, weight, conv.size, conv.geometry))
    wide = Normaliser(*(vector.double() for vector in producer.norm.vectors.values()))
    behind = torch.where(u > 0, written, 0.0).double()
    expected = bn_backward_reduce.reference(OutputGrad(behind), producer.y.double(), wide)
    sizes = behind.abs().sum((0, 2, 3)).max() * torch.tensor([1.0, 4.0, 4.0, 1.0]) * max(1.0, float(scale.max()))
    for ours, theirs, size in zip(sums, expected, sizes, strict=True):
        assert float((ours.double() - theirs).abs().max()) <= torch.finfo(dtype).eps * float(size) + 1e-5


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in place", "first"])
@cases("a layer of DenseNet-121", "4 divides rows, 16 divides C", "one pixel an image", "odd channels", offset=3)
def test_input_gradient_is_added_to_that_of_the_features(
    case: str, target: str, dtype: torch.dtype, in_place: bool
) -> None:
    check_added(target, case, dtype, in_place=in_place, together=False)


NARROW = ("a layer of DenseNet-121", "one pixel an image", "3x3", "a growth of 12", "odd channels")


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in place", "first"])
@pytest.mark.parametrize(("case", "target", "dtype"), targets_of(NARROW))
def test_both_gradients_at_once(case: str, target: str, dtype: torch.dtype, in_place: bool) -> None:
    check_added(target, case, dtype, in_place=in_place, together=True)


ROWS = {
    "a layer of DenseNet-121": ((2, 32, 7, 9), (64, 32)),
    "a growth of 12": ((2, 12, 5, 5), (28, 24)),
    "an odd beginning": ((1, 16, 5, 6), (3, 2)),
    "odd channels": ((2, 33, 5, 5), (0, 4)),
    "one pixel an image": ((5, 64, 1, 1), (0, 64)),
    "a row is several pieces": ((1, 256, 7, 7), (64, 0)),
}


@pytest.mark.parametrize(("case", "target", "dtype"), covering(ROWS))
def test_batch_norm_and_its_gradient(case: str, target: str, dtype: torch.dtype) -> None:
    size, around = ROWS[case]
    y, g = sliced(activation(size, dtype), around), sliced(activation(size, dtype), (around[1], around[0] + 16))
    scale, shift, q, r = torch.randn(4, size[1])
    (z, _), trace = executed(target, lambda: bn_act(y, scale, shift))
    assert_one_launch(trace, "bn_act_kernel")
    exact, _ = bn_act.reference(y.double(), scale.double(), shift.double())
    assert_as_accurate_as_eager(z, bn_act.reference(y, scale, shift)[0], exact)
    dy = OutputGrad(g, y=y, p=scale, q=q, r=r, mean=shift)
    dx, trace = executed(target, lambda: bn_backward_apply(dy))
    assert_one_launch(trace, "bn_backward_apply_kernel")
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_eager(dx, bn_backward_apply.reference(dy), bn_backward_apply.reference(widened(dy)))


@emulated_only
def test_a_slice_is_told_from_its_rows() -> None:
    """One binary for every pitch; the ordinary one has no argument for it."""
    conv = Conv((1, 64, 6, 6), 64, (1, 1))
    weight, binaries = conv.weight(torch.bfloat16), []
    for around in ((0, 64), (0, 192), (0, 0)):
        x = conv.input(torch.bfloat16)
        u = ConvInput(sliced(x, around) if any(around) else x, torch.ones(64), torch.zeros(64))
        with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
            conv_forward(u, weight, conv.geometry)
        binaries.append(trace.launches[0].binary)
        assert trace.launches[0].read["x_ptr"] == x.nbytes
    assert binaries[0] == binaries[1] != binaries[2]
    assert dict(binaries[2].specialisation.signature)["x_row"] == "constexpr"


@emulated_only
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(1, 8, 4, 4), r"out: expected \(1, 16, 4, 4\) in torch.float32, got \(1, 8, 4, 4\)"),
        (torch.empty(1, 16, 4, 4).half(), "out: expected .* in torch.float32, got .* in torch.float16"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out: Tensor, message: str) -> None:
    with fusedres.backend("vgpu:sm_90"), pytest.raises(ValueError, match=message):
        conv_forward(ConvInput(torch.ones(1, 16, 4, 4)), torch.ones(16, 16, 1, 1), Geometry(), out=out)


@emulated_only
def test_an_output_whose_channels_are_apart_is_written_all_the_same() -> None:
    """By a copy: kernels write rows."""
    conv = Conv((1, 16, 4, 5), 16, (1, 1))
    u, weight = ConvInput(conv.input(torch.float32), torch.ones(16), torch.zeros(16)), conv.weight(torch.float32)
    out = torch.empty(1, 16, 4, 5)
    with fusedres.backend("vgpu:sm_90"):
        y, _ = conv_forward(u, weight, Geometry(), out=out)
    assert y is out
    torch.testing.assert_close(out, conv2d(conv_operand(u), weight))
