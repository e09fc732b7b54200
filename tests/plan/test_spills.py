"""fusedres.plan.spills: what a row says of a compiler is still so.

Without a row the plan chooses a tile that the row excludes. That is compiled, which takes no GPU, and shows what the
row says was seen: a compiler that has learnt to hold it fails the test. With the row the plan's tile spills nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import pytest

import fusedres
from fusedres.compiler.binary import Binary
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS, Target, triton_version
from fusedres.plan import conv_tiles, spills
from fusedres.plan.spills import CONV_SPILLS, SCALAR, WEIGHT_GRAD_SPILLS, Spill, next_of_kin
from fusedres.plan.tiles import MOST_TILES, listed
from tests.plan.convolutions import BF16, FP32, block_end, forward, input_gradient, two_contractions, weight_gradient

ROWS = {row.name: row for row in (*CONV_SPILLS, *WEIGHT_GRAD_SPILLS)}
X, WIDE, NARROW = (64, 256, 28, 28), (64, 128, 14, 14), (64, 64, 56, 56)
# Channels that 16 does not divide have masks.
ODD, ODD_NARROW = (64, 250, 28, 28), (64, 60, 56, 56)
LAST = MOST_TILES - 1
moments_weight = partial(weight_gradient, WIDE, 256, 1, FP32, formed=False, mask=True, sum_dy=True)


class Example(NamedTuple):
    """A convolution whose tile the row changes on a target; of the tiles that are listed the default or the last."""

    row: str
    target: str
    call: Callable[[], None]
    place: int = 0


EXAMPLES = [
    Example("two contractions by four warps", "sm_100", partial(two_contractions, NARROW, 256, second_formed=True)),
    Example("an operand formed in registers by four warps", "sm_120", partial(forward, X, 256, formed=True)),
    Example(
        "an operand formed in registers by four warps, in long steps", "sm_80",
        partial(forward, ODD, 60, 3, formed=True),
    ),
    Example(
        "a window, fp32 or an fp32 shortcut beside an operand formed by four warps", "sm_80",
        partial(block_end, X, 256, residual=FP32, act=False),
    ),
    Example("an input's gradient by four warps", "sm_90",
        partial(input_gradient, ODD_NARROW, 250, 3, producer=True, add=True),
    ),
    Example("what joins outputs of four warps", "sm_100", partial(block_end, NARROW, 64, residual=FP32)),
    Example(
        "outputs that wait for a second contraction", "sm_100",
        partial(two_contractions, ODD_NARROW, 250, 3, FP32, second_formed=True),
    ),
    Example(
        "what joins an input's gradient in fp32", "sm_100",
        partial(input_gradient, X, 256, 1, FP32, producer=True, add=True),
    ),
    Example(
        "features' gradients that an input's is added to", "sm_90", partial(input_gradient, ODD, 128, features=True)
    ),
    Example("an input's gradient formed in registers", "sm_86", partial(input_gradient, X, 256)),
    Example(
        "outputs that wait beside fp32 operands", "gfx90a",
        partial(two_contractions, ODD_NARROW, 250, 1, FP32, second_formed=True),
    ),
    Example("masks for the rows of an operand", "gfx90a", partial(forward, X, 256, formed=True)),
    Example("a window in TF32", "sm_120", partial(forward, X, 256, 3, FP32, formed=True)),
    Example("what joins outputs, or is contracted second", "sm_100", partial(block_end, X, 256, residual=FP32)),
    Example(
        "what joins the widest tile, or is contracted second", "sm_90",
        partial(block_end, X, 256, residual=BF16, mask=True), place=LAST,
    ),
    Example(
        "an operand formed in fp32 for the widest tile", "sm_90", partial(forward, ODD, 300, 1, FP32, formed=True), LAST
    ),
    Example(
        "three steps of an operand that is formed, or of two contractions", "gfx1100",
        partial(two_contractions, NARROW, 256, second_formed=True),
    ),
    Example("three steps of an input's gradient", "gfx1100", partial(input_gradient, X, 256, formed=False)),
    Example(
        "four steps of an input's gradient", "gfx950", partial(input_gradient, X, 256, formed=False, producer=True)
    ),
    Example("long steps of two contractions", "gfx1100", partial(two_contractions, NARROW, 256, mask=True)),
    Example("long steps of an input's gradient", "gfx1100", partial(input_gradient, X, 256, producer=True, add=True)),
    Example(
        "unrolled products of two operands in fp32", "gfx1100",
        partial(input_gradient, ODD, 250, 3, FP32, mask=True, producer=True, add=True, stride=2),
    ),
    Example("TF32 in long steps", "sm_80", moments_weight),
    Example("TF32 by four warps", "sm_120", moments_weight),
    Example("TF32 of 128 x 128", "sm_120", moments_weight),
    Example("unrolled products of fp32", "gfx1100", moments_weight),
    Example(
        "addresses of packed pixels, or a mask's bits and sums", "gfx1100",
        partial(weight_gradient, (64, 3, 224, 224), 64, 7, formed=False, input_formed=False, stride=2, sum_u=True),
    ),
    Example("fp32 in long steps", "gfx90a",
        partial(weight_gradient, ODD_NARROW, 60, 3, FP32, formed=False, mask=True),
    ),
    Example("128 x 128 by waves of 32 threads", "gfx1100", partial(weight_gradient, X, 256, 3, mask=True)),
    Example("an output's gradient formed in long steps", "gfx1100", partial(weight_gradient, NARROW, 64, 3, mask=True)),
    Example("128 x 128 in long steps, operands in registers", "gfx90a",
        partial(weight_gradient, ODD, 250, 3, formed=False, mask=True),
    ),
]  # fmt: skip
# Each takes a few seconds to compile, and one is enough of every vendor and of every kind of gradient.
QUICK = (
    "an input's gradient formed in registers",
    "masks for the rows of an operand",
    "an output's gradient formed in long steps",
)


def recorded(call: Callable[[], None], target: str) -> Binary:
    with fusedres.record(target) as trace, fusedres.backend("triton"):
        call()
    (launch,) = (launch for launch in trace.launches if launch.name.startswith("conv_"))
    return launch.binary


def forget() -> None:
    conv_tiles._fitting.cache_clear()
    conv_tiles._fitting_weights.cache_clear()


@contextmanager
def without(row: Spill) -> Iterator[None]:
    forget()
    left = {name: tuple(one for one in getattr(spills, name) if one is not row) for name in TABLES}
    with patch.multiple(spills, **left):
        yield
    forget()


TABLES = ("CONV_SPILLS", "WEIGHT_GRAD_SPILLS")


@pytest.mark.parametrize(
    ("name", "target", "call", "place"),
    [
        pytest.param(*one, id=f"{one.row}, {one.target}", marks=[] if one.row in QUICK else pytest.mark.slow)
        for one in EXAMPLES
    ],
)
def test_the_tile_that_a_row_excludes_spills_still(
    name: str, target: str, call: Callable[[], None], place: int
) -> None:
    row = ROWS[name]
    if triton_version() != row.triton:
        pytest.skip(f"seen with Triton {row.triton}, and this is {triton_version()}")
    with listed(place):
        held = recorded(call, target)
        with without(row):
            excluded = recorded(call, target)
    assert excluded != held
    assert violations(held, target, read_figures(compile_binary(held, target), target)) == []
    figures = read_figures(compile_binary(excluded, target), target)
    if row.seen is None:
        assert violations(excluded, target, figures) == [], "it happens again: say in the row what is seen"
    elif row.seen == SCALAR:
        assert figures.spilled_registers
    else:
        assert figures.spill_stores > 0, "the compiler holds it now: the row can go"


def test_every_row_has_a_name_and_an_example() -> None:
    assert len(ROWS) == len(CONV_SPILLS) + len(WEIGHT_GRAD_SPILLS)
    assert {one.row for one in EXAMPLES} == set(ROWS)
    for one in EXAMPLES:
        assert one.target in ROWS[one.row].targets


def test_a_gpu_without_a_row_of_its_own_is_taken_for_its_next_of_kin() -> None:
    found = {arch: next_of_kin(Target("cuda", arch, 32, 0, 1)) for arch in (75, 80, 87, 90, 103, 121)}
    assert found == {75: "sm_80", 80: "sm_80", 87: "sm_86", 90: "sm_90", 103: "sm_100", 121: "sm_120"}
    assert next_of_kin(Target("hip", "gfx1151", 32, 0, 1)) == "gfx1100"
    assert next_of_kin(Target("hip", "gfx908", 64, 0, 1)) in ("gfx90a", "gfx942", "gfx950")
    assert all(next_of_kin(target) == name for name, target in TARGETS.items())
