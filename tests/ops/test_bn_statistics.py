"""fusedres.ops.bn_statistics: mean and squared deviations per channel, in fp32 or wider."""

import pytest
import torch

from fusedres.ops.bn_statistics import bn_statistics
from tests.comparison import LOW, STORAGE, assert_close, relative_error

SIZES = {
    "even": (2, 8, 4, 4),
    "odd, C not a multiple of 8": (3, 5, 7, 3),
    "one pixel": (1, 6, 1, 1),
    "one image": (1, 3, 9, 5),
    "one channel": (4, 1, 3, 3),
    "many pixels": (2, 3, 130, 121),
}


def exactly(y):
    y = y.double()
    mean = y.mean((0, 2, 3))
    return mean, (y - mean[:, None, None]).square().sum((0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("case", SIZES)
def test_is_the_definition(case, dtype, each_backend):
    y = (torch.randn(SIZES[case], dtype=torch.float64) * 2 + 1).to(dtype)
    partials = bn_statistics(y)
    mean, m2 = exactly(y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert partials.counts.tolist() == [y.numel() // y.shape[1]]
    assert_close(partials.mean[0], mean, tolerance, name="mean")
    assert_close(partials.m2[0], m2, tolerance, name="m2")
    assert partials.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided view"])
def test_layout_does_not_matter(layout, each_backend):
    wide = torch.randn(2, 5, 6, 14, dtype=torch.float64)
    y = {
        "channels_last": wide[..., ::2].contiguous(memory_format=torch.channels_last),
        "contiguous": wide[..., ::2].contiguous(),
        "strided view": wide[..., ::2],
    }[layout]
    partials = bn_statistics(y)
    mean, m2 = exactly(wide[..., ::2])
    assert_close(partials.mean[0], mean)
    assert_close(partials.m2[0], m2)


def test_large_mean_does_not_cancel(each_backend):
    y = (torch.randn(4, 6, 32, 32, dtype=torch.float64) + 1e4).float()
    _, m2 = exactly(y)
    assert_close(bn_statistics(y).m2[0], m2, 1e-5)
    n = y.numel() // y.shape[1]
    raw = y.square().sum((0, 2, 3)) - y.sum((0, 2, 3)).square() / n
    assert relative_error(raw, m2) > 1e-2, "the raw second moment passes, so this test has no teeth"


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_constant_channel_has_no_deviation(dtype, each_backend):
    partials = bn_statistics(torch.full((2, 3, 5, 5), 1.5, dtype=dtype))
    assert torch.equal(partials.mean[0], torch.full((3,), 1.5))
    assert torch.equal(partials.m2[0], torch.zeros(3))


def test_refused_by_name(each_backend):
    with pytest.raises(ValueError, match=r"y: expected a 4-D tensor .*got shape \(2, 3\)"):
        bn_statistics(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="y: expected a floating-point tensor"):
        bn_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.int32))
