"""Convolutions of any small shape, for every target and dtype."""

import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st

from fusedres.operands import Geometry
from tests.comparison import LOW
from tests.kernels.convolutions import Conv
from tests.kernels.executed import TESTED

WINDOWS = ((1, 1), (3, 3), (5, 5), (1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    """Small ones; the sizes that binaries are made for come from short lists, all others are any."""
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    c, k = (groups * draw(st.sampled_from((4, 8, 16, 32, 48, 64))) for _ in range(2))
    window = draw(st.sampled_from(WINDOWS))
    stride, padding, dilation = (
        (draw(high), draw(high)) for high in (st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))
    )
    # A single tap is not dilated: the library crashes in bf16 where one is, strided and padded.
    dilation = tuple(step if taps > 1 else 1 for step, taps in zip(dilation, window, strict=True))
    size = draw(st.integers(1, 3)), c, draw(st.integers(1, 14)), draw(st.integers(1, 14))
    geometry = Geometry(stride, padding, dilation, groups)
    assume(min(geometry.output_size(size[2], size[3], window)) >= 1)
    return Conv(size, k, window, geometry)


ON_TARGETS = {
    "conv": convolutions(), "target": st.sampled_from(TESTED), "dtype": st.sampled_from((torch.float32, *LOW)),
}  # fmt: skip
reproducible = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink])
