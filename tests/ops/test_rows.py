"""fusedres.ops.rows: where a pixel's channels lie in memory."""

import pytest
import torch

from fusedres.ops.rows import pitch_of, row_layout


def buffer(n: int, c: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)


SLICES = {
    "the first channels": (buffer(2, 12, 3, 4)[:, :8], 12),
    "the last ones": (buffer(2, 12, 3, 4)[:, 8:], 12),
    "one channel": (buffer(2, 12, 3, 4)[:, 5:6], 12),
    "one image": (buffer(1, 12, 3, 4)[:, :8], 12),
    "one column": (buffer(2, 12, 3, 1)[:, :8], 12),
    "one row": (buffer(2, 12, 1, 4)[:, :8], 12),
    "one pixel an image": (buffer(5, 12, 1, 1)[:, :8], 12),
    "every other image": (buffer(4, 12, 1, 1)[::2, :8], 24),
}
OTHERS = {
    "all channels": buffer(2, 12, 3, 4),
    "a single pixel": buffer(1, 12, 1, 1)[:, :8],
    "channels apart": torch.randn(2, 12, 3, 4),
    "every other channel": buffer(2, 12, 3, 4)[:, ::2],
    "a window of pixels": buffer(2, 12, 3, 4)[:, :8, :, :2],
    "every other image of several pixels": buffer(4, 12, 3, 4)[::2, :8],
    "transposed pixels": buffer(2, 12, 3, 4)[:, :8].transpose(2, 3),
    "a broadcast pixel": buffer(2, 12, 1, 1).expand(2, 12, 3, 4),
    "a broadcast image": buffer(1, 12, 1, 1).expand(3, 12, 1, 1),
    "no images": buffer(0, 12, 3, 4),
}


@pytest.mark.parametrize(("tensor", "pitch"), SLICES.values(), ids=SLICES)
def test_a_slice_of_channels_is_taken_as_it_lies(tensor, pitch):
    assert pitch_of(tensor) == pitch
    assert row_layout(tensor) is tensor


@pytest.mark.parametrize("tensor", OTHERS.values(), ids=OTHERS)
def test_anything_else_is_channels_last_or_becomes_it(tensor):
    assert pitch_of(tensor) is None
    rows = row_layout(tensor)
    assert rows.is_contiguous(memory_format=torch.channels_last) and torch.equal(rows, tensor)
    assert (rows is tensor) == tensor.is_contiguous(memory_format=torch.channels_last)
