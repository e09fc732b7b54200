"""fusedres.kernels.conv_bn_act, compiled and executed: the single pass, with every shortcut."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry, Norm, NormNumbers
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.contractions import conv_shape
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.zero_pad_shortcut import ZeroPadded, shortcut_tensor
from fusedres.plan.conv_tiles import conv_tiles, pinned
from tests.comparison import LOW
from tests.kernels.convolutions import NETWORKS, Conv, as_tf32, assert_as_accurate, convolutions_of
from tests.kernels.executed import TESTED, activation, covering, executed
from tests.kernels.test_conv_forward import check_statistics

CASES = {
    "3x3": Conv((1, 64, 7, 9), 64, (3, 3), Geometry(padding=(1, 1))),
    "1x1, several tiles of channels": Conv((1, 64, 9, 9), 200, (1, 1)),
    "tails of pixels, K and C": Conv((1, 40, 9, 7), 24, (3, 3), Geometry((2, 2), (1, 1))),
    "odd channels": Conv((1, 33, 5, 5), 17, (3, 3), Geometry(padding=(1, 1))),
    "the stem": Conv((1, 3, 21, 18), 64, (7, 7), Geometry((2, 2), (3, 3))),
    "groups of 4": Conv((1, 64, 6, 6), 64, (3, 3), Geometry(padding=(1, 1), groups=16)),
    "two wide groups": Conv((1, 64, 5, 5), 144, (3, 3), Geometry(padding=(1, 1), groups=2)),
    "one pixel": Conv((1, 16, 1, 1), 16, (1, 1)),
}
SHORTCUTS = (
    "none", "plain", "normalised", "projection", "projection of a formed input", "3x3 projection", "zero-padded",
)  # fmt: skip


class Operands:
    """A convolution with the numbers of its batch norm, and a shortcut of one kind."""

    def __init__(self, conv: Conv, dtype: torch.dtype, shortcut: str, *, prologue: bool) -> None:
        channels = conv.size[1]
        numbers = (torch.rand(channels) + 0.5, torch.randn(channels)) if prologue else (None, None)
        scale, shift, other_scale, other_shift = torch.randn(4, conv.k)
        self.main = Contraction(ConvInput(conv.input(dtype), *numbers), conv.weight(dtype), conv.geometry, scale, shift)
        p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
        self.residual = self.residual_scale = self.residual_shift = self.second = None
        if shortcut in ("plain", "normalised"):
            self.residual = activation((conv.size[0], conv.k, p, q), dtype)
        if shortcut == "zero-padded":
            x = activation((conv.size[0], (conv.k + 1) // 2, 2 * p, 2 * q - 1), dtype)
            self.residual = ZeroPadded(x, conv.k, (2, 2))
        if shortcut == "normalised":
            self.residual_scale, self.residual_shift = other_scale, other_shift
        if "projection" in shortcut:
            window, padding = ((3, 3), (1, 1)) if shortcut.startswith("3x3") else ((1, 1), (0, 0))
            other = Conv((conv.size[0], 48, 2 * p, 2 * q - 1), conv.k, window, Geometry((2, 2), padding))
            formed = (torch.rand(48) + 0.5, torch.randn(48)) if "formed" in shortcut else (None, None)
            u = ConvInput(other.input(dtype), *formed)
            self.second = Contraction(u, other.weight(dtype), other.geometry, other_scale, other_shift)

    def evaluated(self, *, biased: bool) -> tuple[Contraction, Contraction | None]:
        """Both convolutions with a batch norm in evaluation that comes to their numbers."""

        def stored(branch: Contraction) -> Contraction:
            dtype, k = branch.weight.dtype, branch.weight.shape[0]
            mean, gamma, beta, bias = torch.randn(4, k).to(dtype)
            var = (torch.rand(k) + 0.5).to(dtype)
            norm = Norm(gamma, beta, mean, var, bias if biased else None, numbers=NormNumbers(1e-3))
            return Contraction(*branch[:3], running=norm)

        main, second = stored(self.main), self.second and stored(self.second)
        self.main = Contraction(*main[:3], *main.numbers)
        self.second = second and Contraction(*second[:3], *second.numbers)
        return main, second

    @property
    def keywords(self) -> dict[str, object]:
        names = ("residual", "residual_scale", "residual_shift", "second")
        return {name: getattr(self, name) for name in names}

    def computed(self, dtype: torch.dtype, *, tf32: bool = False, act: Activation = RELU) -> Tensor:
        """By separate operations, each rounding to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)

        def numbers(vector: Tensor) -> Tensor:
            return vector.to(wide).view(1, -1, 1, 1)

        def branch(of: Contraction) -> Tensor:
            u, weight = of.u.tensor.to(dtype), of.weight.to(dtype)
            if of.u.scale is not None and of.u.shift is not None:
                u = torch.relu(u.to(wide) * numbers(of.u.scale) + numbers(of.u.shift)).to(dtype)
            if tf32:
                u, weight = as_tf32(u.float()).to(dtype), as_tf32(weight.float()).to(dtype)
            y = conv2d(u, weight, None, *of.geometry)
            return y if of.scale is None else (y.to(wide) * numbers(of.scale) + numbers(of.shift)).to(dtype)

        z = branch(self.main)
        if self.second is not None:
            z = z + branch(self.second)
        elif self.residual is not None and self.residual_scale is not None:
            z = z + (self.residual.to(wide) * numbers(self.residual_scale) + numbers(self.residual_shift)).to(dtype)
        elif self.residual is not None:
            z = z + shortcut_tensor(self.residual).to(dtype)
        return act.value(z)


def check(
    target: str, conv: Conv, dtype: torch.dtype, shortcut: str = "none", *, prologue: bool = False,
    act: Activation = RELU, bit_mask: bool = True, statistics: bool = False, bare: bool = False,
) -> None:  # fmt: skip
    operands = Operands(conv, dtype, shortcut, prologue=prologue)
    if bare:
        operands.main = Contraction(*operands.main[:3])
        operands.second = operands.second and Contraction(*operands.second[:3])
    asked = {"act": act, "bit_mask": bit_mask, "statistics": statistics}
    (z, mask, partials), trace = executed(target, lambda: conv_bn_act(operands.main, **operands.keywords, **asked))
    assert trace.by_kernel()["conv_bn_act_kernel"] == 1
    packing = sum(launch.kernel.__name__.startswith("space_to_depth") for launch in trace.launches)
    assert len(trace.launches) == 1 + (shortcut == "3x3 projection") + packing
    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = operands.computed(torch.float64, tf32=True, act=act)
    eager, exact = operands.computed(dtype, act=act), operands.computed(torch.float64, act=act)
    assert_as_accurate(z, eager, exact, tf32, conv.depth)
    assert z.is_contiguous(memory_format=torch.channels_last)
    if bit_mask and act != IDENTITY:
        assert torch.equal(mask, pack_relu_mask(z))
    else:
        assert mask is None
    if statistics:
        check_statistics(z, partials)
    else:
        assert partials is None


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, "plain")


@pytest.mark.parametrize("prologue", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "prologue"])
@pytest.mark.parametrize(("shortcut", "target", "dtype"), covering(SHORTCUTS, offset=3, contraction=True))
def test_every_shortcut(shortcut: str, target: str, dtype: torch.dtype, prologue: bool) -> None:
    check(target, CASES["tails of pixels, K and C"], dtype, shortcut, prologue=prologue)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("shortcut", "target", "dtype"), covering(("plain", "projection", "3x3 projection"), offset=1, contraction=True)
)
def test_running_statistics(shortcut: str, target: str, dtype: torch.dtype, biased: bool) -> None:
    """Scale and shift are formed in the pass, as accurately as if they had been formed before it."""
    conv = CASES["tails of pixels, K and C"]
    operands = Operands(conv, dtype, shortcut, prologue=False)
    main, second = operands.evaluated(biased=biased)
    keywords = {**operands.keywords, "second": second}
    (z, _, _), trace = executed(target, lambda: conv_bn_act(main, **keywords))
    apart = {"conv_forward_kernel": 1, "bn_running_kernel": 1} if shortcut == "3x3 projection" else {}
    assert trace.by_kernel() == {"conv_bn_act_kernel": 1, **apart}
    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = operands.computed(torch.float64, tf32=True)
    assert_as_accurate(z, operands.computed(dtype), operands.computed(torch.float64), tf32, conv.depth)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["tails of pixels, K and C"], contraction=True))
def test_a_shift_alone(case: str, target: str, dtype: torch.dtype) -> None:
    """A convolution with a bias, as a frozen model has it."""
    operands = Operands(CASES[case], dtype, "plain", prologue=False)
    operands.main = operands.main._replace(scale=torch.ones_like(operands.main.shift))
    (z, _, _), _ = executed(target, lambda: conv_bn_act(operands.main._replace(scale=None), **operands.keywords))
    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = operands.computed(torch.float64, tf32=True)
    assert_as_accurate(z, operands.computed(dtype), operands.computed(torch.float64), tf32, CASES[case].depth)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shortcut", "target", "dtype"), covering(SHORTCUTS, contraction=True))
def test_every_shortcut_of_every_case(case: str, shortcut: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, shortcut, prologue=True)


@pytest.mark.parametrize(("act", "target", "dtype"), covering([RELU, IDENTITY], offset=7, contraction=True))
def test_without_mask(act: Activation, target: str, dtype: torch.dtype) -> None:
    check(target, CASES["3x3"], dtype, "plain", act=act, bit_mask=False)


@pytest.mark.parametrize(
    ("case", "target", "dtype"), covering(["3x3", "tails of pixels, K and C", "groups of 4"], contraction=True)
)
def test_statistics_of_the_output(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, "plain", statistics=True)


@pytest.mark.parametrize(
    ("shortcut", "target", "dtype"), covering(["plain", "projection of a formed input"], offset=4, contraction=True)
)
def test_without_numbers(shortcut: str, target: str, dtype: torch.dtype) -> None:
    case = CASES["tails of pixels, K and C"]
    check(target, case, dtype, shortcut, prologue=True, act=IDENTITY, bit_mask=False, statistics=True, bare=True)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TESTED)
def test_every_shape_of_every_network(network: str, target: str) -> None:
    for i, conv in enumerate(convolutions_of(network)):
        check(target, conv.smaller(8_000_000), LOW[i % 2], SHORTCUTS[i % 4])


@pytest.mark.parametrize(
    ("case", "target", "dtype"), covering(["3x3", "1x1, several tiles of channels"], offset=5, contraction=True)
)
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    conv = CASES[case]
    shape = conv_shape(ConvInput(conv.input(dtype)), conv.weight(dtype), conv.geometry)
    for tile in conv_tiles(shape, TARGETS[target]):
        with pinned(tile):
            check(target, conv, dtype, "projection", prologue=True)


@pytest.mark.parametrize("case", ["3x3", "tails of pixels, K and C", "groups of 4"])
@pytest.mark.parametrize("target", TESTED)
def test_a_wide_shortcut_promotes_the_sum(case: str, target: str) -> None:
    conv = CASES[case]
    operands = Operands(conv, torch.bfloat16, "plain", prologue=False)
    operands.residual = activation(tuple(operands.residual.shape), torch.float32)
    (z, *_), _ = executed(target, lambda: conv_bn_act(operands.main, residual=operands.residual))
    assert z.dtype == torch.float32
    assert_as_accurate(z, operands.computed(torch.bfloat16).float(), operands.computed(torch.float64), None, conv.depth)
