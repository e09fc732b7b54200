"""fusedres.ops.features, and `bn_combine`, which a dense block's statistics go through."""

import pytest
import torch

from fusedres.operands import Partials
from fusedres.ops.bn_finalize import bn_combine
from fusedres.ops.features import FeatureGrads, add_feature_grad, put_features


def test_features_are_put_into_their_channels_and_nowhere_else(each_backend):
    buffer = torch.zeros(2, 7, 3, 4).contiguous(memory_format=torch.channels_last)
    y = torch.randn(2, 3, 3, 4)
    put_features(buffer, y, 2)
    assert torch.equal(buffer[:, 2:5], y)
    assert not buffer[:, :2].any() and not buffer[:, 5:].any()


@pytest.mark.parametrize("first", [-1, 5])
def test_features_outside_of_the_buffer_are_refused(first):
    with pytest.raises(ValueError, match=f"first: expected 3 channels within 7, got them at {first}"):
        put_features(torch.zeros(2, 7, 3, 4), torch.zeros(2, 3, 3, 4), first)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_added_and_rounded_once(dtype, in_place, each_backend):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.randn(2, 7, 3, 4, dtype=wide).to(dtype).contiguous(memory_format=torch.channels_last)
    g = torch.randn(2, 4, 3, 4, dtype=wide).to(dtype)
    p = torch.randn(4, dtype=wide)
    exact = buffer[:, :4].double() + g.double() * p.double().view(1, -1, 1, 1)
    into = buffer if in_place else torch.zeros_like(buffer)
    before, rest = buffer.clone(), into[:, 4:].clone()
    add_feature_grad(FeatureGrads(buffer[:, :4], into[:, :4]), g, p)
    torch.testing.assert_close(into[:, :4].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(into[:, 4:], rest)
    assert in_place or torch.equal(buffer, before)


NOT_FEATURES = {
    "fewer channels": (torch.zeros(2, 3, 3, 4), torch.zeros(2, 4, 3, 4), ValueError, "before: expected shape"),
    "other pixels": (torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 4, 3), ValueError, "into: expected shape"),
    "two dtypes": (torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 3, 4).half(), TypeError, "into: expected the dtype"),
    "whole numbers": (torch.zeros(2, 4, 3, 4).int(), torch.zeros(2, 4, 3, 4), TypeError, "before: expected a float"),
}


@pytest.mark.parametrize(("before", "into", "error", "message"), NOT_FEATURES.values(), ids=NOT_FEATURES)
def test_gradients_of_other_features_are_refused(before, into, error, message):
    with pytest.raises(error, match=message):
        add_feature_grad(FeatureGrads(before, into), torch.zeros(2, 4, 3, 4), torch.ones(4))


def test_parts_are_combined_without_cancellation(each_backend):
    y = torch.randn(40, 5, dtype=torch.float64) + 1e6
    counts = torch.tensor([1.0, 9.0, 30.0], dtype=torch.float64)
    pieces = y.split([1, 9, 30])
    mean = torch.stack([piece.mean(0) for piece in pieces])
    m2 = torch.stack([(piece - piece.mean(0)).square().sum(0) for piece in pieces])
    count, of_all, squares = bn_combine(Partials(counts, mean, m2))
    assert count.tolist() == [40.0]
    torch.testing.assert_close(of_all[0], y.mean(0))
    torch.testing.assert_close(squares[0], (y - y.mean(0)).square().sum(0), rtol=1e-9, atol=0)
