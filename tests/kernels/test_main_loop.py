"""fusedres.kernels.main_loop, compiled: what a block does before its loop and behind it."""

import re
from collections.abc import Callable
from functools import partial

import pytest

import fusedres
from fusedres.compiler.known import compile_binary
from tests.plan.convolutions import block_end, forward, input_gradient, two_contractions

X = (64, 64, 56, 56)
SAME_PIXELS = {
    "forward": partial(forward, X, 256, formed=True),
    "a block's end": partial(block_end, X, 256, mask=True),
    "two contractions": partial(two_contractions, X, 256),
    "input gradient": partial(input_gradient, X, 256, producer=True),
    "input gradient with matrices": partial(input_gradient, X, 256, formed=False, mask=True, matrices=True),
}
OTHERS = {
    "a window": partial(forward, X, 64, 3, formed=True),
    "strided": partial(forward, X, 256, stride=2, formed=True),
    "input gradient of a window": partial(input_gradient, X, 64, 3),
    "input gradient of a strided convolution": partial(input_gradient, X, 256, stride=2),
}


def compiled(call: Callable[[], None], stage: str, target: str = "sm_90") -> str:
    with fusedres.record(target) as trace, fusedres.backend("triton"):
        call()
    (launch,) = (launch for launch in trace.launches if launch.name.startswith("conv_"))
    text: str = compile_binary(launch.binary, target).asm[stage]
    return text


def divisions(call: Callable[[], None]) -> int:
    """That threads do for each of a tile's 128 pixels."""
    return len(re.findall(r"arith\.(?:div|rem)\w+ .*tensor<128xi32>", compiled(call, "ttir")))


@pytest.mark.parametrize("case", SAME_PIXELS)
def test_where_pixels_are_the_outputs_none_is_divided_for(case: str) -> None:
    assert divisions(SAME_PIXELS[case]) == 0


@pytest.mark.parametrize("case", OTHERS)
def test_elsewhere_rows_and_columns_are_told_from_the_pixel(case: str) -> None:
    assert divisions(OTHERS[case]) > 0


def test_statistics_are_summed_inside_of_threads() -> None:
    """Of 128 x 128 outputs by eight warps, spread over lanes, each of two sums took 96 shuffles and 12 across warps."""
    call = partial(forward, (64, 128, 28, 28), 128, 3, formed=True)
    assert compiled(call, "ptx").count("shfl.sync.bfly") == 2 * 12
