"""fusedres.kernels.conv_backward, compiled and executed: both gradients of one pass, with what is joined to them."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, Producer
from fusedres.ops.act_mask import is_bits, pack_relu_mask
from fusedres.ops.bn_backward import added_gradient, bn_backward_apply, bn_backward_reduce
from fusedres.ops.conv_backward import conv_backward, conv_producer_backward
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_input_grad import input_grad
from fusedres.ops.conv_weight_grad import weight_grad
from fusedres.plan.backward_tiles import backward_tile
from fusedres.plan.shapes import ConvVariant
from tests.comparison import LOW
from tests.kernels.convolutions import Conv, assert_as_accurate
from tests.kernels.executed import TESTED, activation, executed
from tests.kernels.random_convolutions import ON_TARGETS, reproducible
from tests.kernels.test_conv_input_grad import FORMS, JOINS, gradient, zero_padded_grad

SAME = Geometry(padding=(1, 1))
CASES = {
    "3x3 of a narrow network": Conv((2, 16, 8, 8), 16, (3, 3), SAME),
    "several parts and pieces": Conv((3, 32, 16, 16), 32, (3, 3), SAME),
    "the widest 3x3": Conv((2, 64, 8, 8), 64, (3, 3), SAME),
    "1x1 that narrows": Conv((2, 256, 7, 9), 64, (1, 1)),
    "1x1 that widens": Conv((2, 64, 8, 8), 256, (1, 1)),
    "1x1, several pieces": Conv((1, 320, 7, 7), 128, (1, 1)),
    "tails of pixels, K and C": Conv((1, 24, 9, 7), 40, (3, 3), SAME),
    "odd channels": Conv((1, 17, 5, 5), 33, (3, 3), SAME),
    "dilated": Conv((1, 16, 9, 9), 32, (3, 3), Geometry(padding=(2, 2), dilation=(2, 2))),
    "smaller than its input": Conv((1, 16, 9, 6), 16, (3, 3), Geometry()),
    "larger than its input": Conv((1, 16, 4, 5), 16, (3, 3), Geometry(padding=(2, 2))),
    "a window in the padding": Conv((1, 16, 4, 4), 16, (1, 1), Geometry(padding=(1, 1))),
    "nothing square": Conv((1, 16, 11, 8), 16, (5, 2), Geometry(padding=(2, 0), dilation=(1, 3))),
    "one pixel": Conv((1, 16, 1, 1), 16, (3, 3), SAME),
    "one channel": Conv((2, 1, 6, 6), 16, (3, 3), SAME),
}
SMALL = "tails of pixels, K and C"


def targets_of(cases, offset=0, *, everywhere=False):
    """As `covering`, of 16 bits and the targets that the kernel is offered for, or of all."""
    turns = [(target, dtype) for target in TESTED if everywhere or target.startswith("sm") for dtype in LOW]
    parameters = []
    for i, case in enumerate(cases):
        # 5 shares no divisor with their number, so that each has its turn.
        chosen = turns[(5 * i + offset) % len(turns)]
        for turn in turns:
            marks = () if turn == chosen else (pytest.mark.slow,)
            parameters.append(pytest.param(case, *turn, marks=marks, id=f"{case}-{turn[0]}-{str(turn[1])[6:]}"))
    return parameters


class Operands:
    def __init__(self, conv: Conv, dtype: torch.dtype, form: str, join: str) -> None:
        self.conv, self.dtype = conv, dtype
        p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
        self.dy = gradient((conv.size[0], conv.k, p, q), dtype, form)
        self.weight = conv.weight(dtype)
        self.x, self.producer, self.add = activation(conv.size, dtype, -0.5), None, None
        self.u = ConvInput(self.x)
        c = conv.size[1]
        if "producer" in join:
            mean, invstd, scale, shift = torch.rand(4, c) + 0.1
            self.producer = Producer(self.x, Normaliser(mean, invstd, scale, shift - 0.3))
        elif "end" in join:
            out = torch.relu(self.x)
            self.producer = Producer(activation(conv.size, dtype, -0.5), Normaliser(*torch.rand(4, c)), out)
        if self.producer is not None:
            self.u = self.producer.output
        elif join == "u formed":
            self.u = ConvInput(self.x, torch.rand(c) + 0.5, torch.randn(c))
        if join not in ("nothing", "u formed", "producer", "end"):
            size = (*conv.size[:2], 1, 1) if join == "pooled" else conv.size
            other = activation(size, torch.float32 if join == "wide" else dtype).expand(conv.size)
            z = torch.relu(activation(conv.size, dtype))
            masks = {"bits": pack_relu_mask(z), "output": z, "producer, bits": pack_relu_mask(z)}
            masks["end, bits"] = masks["bits"]
            self.add = OutputGrad(other, masks.get(join))
        if "zero-padded" in join:
            self.add = zero_padded_grad(conv.size, dtype, join)

    def launched(self):
        operands = (self.dy, self.u, self.weight, self.conv.geometry)
        if self.producer is not None:
            return conv_producer_backward(*operands, self.producer, add=self.add)
        return conv_backward(*operands, add=self.add)

    def computed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """By the library, dy and results rounded to ``dtype``: the gradients of weight and input."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def to(tensor: Tensor | None) -> Tensor | None:
            vector = tensor is not None and tensor.dim() == 1
            return tensor if tensor is None or is_bits(tensor) else tensor.to(wide if vector else dtype)

        grad = bn_backward_apply.reference(OutputGrad(*(to(part) for part in self.dy[:7])))
        source = conv_operand(ConvInput(*(to(part) for part in self.u[:3])))
        dw = weight_grad(grad, source, self.conv.window, self.conv.geometry)
        du = input_grad(grad, to(self.weight), self.conv.size, self.conv.geometry)
        if self.add is not None:
            du = du.to(torch.promote_types(self.add.g.dtype, dtype)) + added_gradient(self.add)
        if self.producer is not None:
            du = torch.where(conv_operand(self.u) > 0, du, 0.0)
        return dw, du


TOGETHER = ("conv_backward_kernel",)
APART = ("conv_input_grad_kernel", "conv_weight_grad_kernel")


def check(
    target: str, conv: Conv, dtype: torch.dtype, form: str, join: str, kernels: tuple[str, ...] = TOGETHER
) -> None:
    operands = Operands(conv, dtype, form, join)
    (dw, du), trace = executed(target, operands.launched)
    looked_at = (*TOGETHER, *APART, "bn_backward_apply_kernel")
    assert {name: trace.by_kernel()[name] for name in looked_at if name in trace.by_kernel()} == dict.fromkeys(
        kernels, 1
    )
    if operands.producer is not None:
        du, sums = du
        producer = operands.producer
        wide = Normaliser(*(vector.double() for vector in producer.norm.vectors.values()))
        of_stored = bn_backward_reduce.reference(OutputGrad(du.double()), producer.y.double(), wide)
        for ours, theirs, scale in zip(sums, of_stored, (1.0, 1.0, *2 * [float(wide.scale.max())]), strict=True):
            # Nothing but the order of the sum differs.
            size = float(du.double().abs().sum()) / conv.size[1] * scale
            assert float((ours.double() - theirs).abs().max()) <= 1e-5 * max(size, 1.0)
    assert dw.dtype == torch.float32
    assert dw.shape == operands.weight.shape
    assert du.is_contiguous(memory_format=torch.channels_last)
    (eager_dw, eager_du), (exact_dw, exact_du) = operands.computed(dtype), operands.computed(torch.float64)
    assert du.dtype == eager_du.dtype
    taps = conv.window[0] * conv.window[1]
    assert_as_accurate(du, eager_du, exact_du, None, conv.k * taps)
    pixels = operands.dy.g.shape[0] * operands.dy.g.shape[2] * operands.dy.g.shape[3]
    assert_as_accurate(dw, eager_dw, exact_dw, None, pixels)


JOINED = (*JOINS, "u formed", "producer, bits", "producer, zero-padded")


@pytest.mark.parametrize(("case", "target", "dtype"), targets_of(CASES))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, "bits, dy formed", "producer")


@pytest.mark.parametrize(("form", "target", "dtype"), targets_of(FORMS, offset=2))
def test_every_form(form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[SMALL], dtype, form, "nothing")


@pytest.mark.parametrize(("join", "target", "dtype"), targets_of(JOINED, offset=3))
def test_every_epilogue(join: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[SMALL], dtype, "dy formed", join)


WINDOWS = {
    "128 channels": Conv((1, 32, 6, 5), 128, (3, 3), Geometry(padding=(1, 1))),
    "strided": Conv((2, 64, 7, 6), 64, (3, 3), Geometry((2, 2), (1, 1))),
    "groups": Conv((1, 64, 5, 6), 64, (3, 3), Geometry(padding=(1, 1), groups=2)),
    "a window that is not square": Conv((1, 40, 6, 9), 136, (1, 5), Geometry(padding=(0, 2))),
}


@pytest.mark.parametrize("join", ["producer", pytest.param("u formed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "target", "dtype"), targets_of(WINDOWS, everywhere=True))
def test_a_gradient_that_is_written_first(case: str, target: str, dtype: torch.dtype, join: str) -> None:
    """As where a GPU forms it more slowly, at every tap, than it writes it."""
    with patch("fusedres.ops.conv_backward.writing_pays", return_value=True):
        check(target, WINDOWS[case], dtype, "bits, dy formed", join, (*APART, "bn_backward_apply_kernel"))


@pytest.mark.parametrize("target", TESTED)
def test_what_the_library_convolves_is_formed_once(target: str) -> None:
    """Depthwise, for which there is no kernel of ours."""
    depthwise = Conv((1, 24, 6, 5), 24, (3, 3), Geometry(padding=(1, 1), groups=24))
    check(target, depthwise, torch.float16, "bits, dy formed", "producer", ("bn_backward_apply_kernel",))


@pytest.mark.skipif("sm_90" not in TESTED, reason="wgmma is sm_90's")
@pytest.mark.parametrize("case", ["1x1 that narrows", "1x1 that widens"])
def test_no_copy_overwrites_what_wgmma_still_reads(case: str) -> None:
    """A race in what Triton 3.8 makes of a plain dy, were it to go from shared memory into both products."""
    check("sm_90", CASES[case], torch.bfloat16, "plain", "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "target", "dtype"), targets_of(FORMS))
def test_every_form_of_every_case(case: str, form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, form, JOINED[(FORMS.index(form) + list(CASES).index(case)) % len(JOINED)])


def of_stride_one(conv: Conv) -> Conv:
    return conv._replace(geometry=conv.geometry._replace(stride=(1, 1), groups=1))


RANDOM = {
    "conv": ON_TARGETS["conv"].map(of_stride_one),
    "target": st.sampled_from([target for target in TESTED if target.startswith("sm")]),
    "dtype": st.sampled_from(LOW), "form": st.sampled_from(FORMS), "join": st.sampled_from(JOINED),
}  # fmt: skip


def check_any(conv: Conv, target: str, dtype: torch.dtype, form: str, join: str) -> None:
    pixels, (k, c) = conv.size[0] * conv.size[2] * conv.size[3], (conv.k, conv.size[1])
    shape = ConvVariant(pixels, c, k, 1, *conv.window, 2, operands=3, prologue=join.startswith(("producer", "end")))
    assume(backward_tile(shape, TARGETS[target], bits=True) is not None)
    check(target, conv, dtype, form, join)


@settings(reproducible, max_examples=3)
@given(**RANDOM)
def test_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str, join: str) -> None:
    check_any(conv, target, dtype, form, join)


@pytest.mark.slow
@settings(reproducible, max_examples=200)
@given(**RANDOM)
def test_many_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str, join: str) -> None:
    check_any(conv, target, dtype, form, join)
