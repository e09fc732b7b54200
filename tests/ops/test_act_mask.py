"""fusedres.ops.act_mask: eight channels to a byte, there and back."""

import numpy as np
import pytest
import torch

from fusedres.ops.act_mask import act_backward, pack_relu_mask, unpack_relu_mask

SIZES = {
    "whole bytes": (2, 16, 3, 5),
    "last byte not full": (2, 13, 3, 5),
    "less than a byte": (1, 3, 4, 4),
    "one channel": (2, 1, 3, 3),
    "one pixel": (1, 9, 1, 1),
    "one word": (2, 32, 3, 5),
    "words": (2, 96, 3, 5),
    "bytes, not words": (1, 48, 3, 2),
    "no pixel": (0, 64, 3, 2),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SIZES)
def test_bits_are_numpys_little_endian_ones(case, layout):
    z = torch.randn(SIZES[case]).relu().contiguous(memory_format=layout)
    mask = pack_relu_mask(z)
    exact = np.packbits((z.permute(0, 2, 3, 1) > 0).numpy(), axis=-1, bitorder="little")
    if z.shape[1] % 32 == 0:
        exact = np.moveaxis(exact.view(np.int32), -1, 0)
    assert mask.is_contiguous()
    assert mask.numpy().dtype == exact.dtype
    assert np.array_equal(mask.numpy(), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SIZES)
def test_roundtrip(case, dtype):
    z = torch.randn(SIZES[case]).relu().to(dtype)
    assert torch.equal(unpack_relu_mask(pack_relu_mask(z), z.shape[1]), z > 0)


def test_zero_negative_zero_and_nan_are_closed_and_the_smallest_positive_is_open():
    z = torch.tensor([0.0, -0.0, float("nan"), 1e-45, float("inf"), -1.0]).view(1, 6, 1, 1)
    assert pack_relu_mask(z).flatten().tolist() == [0b011000]


@pytest.mark.parametrize("bits", [True, False], ids=["bits", "output"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SIZES)
def test_backward_is_that_of_relu(case, dtype, bits, each_backend):
    x = torch.randn(SIZES[case]).to(dtype).requires_grad_()
    z = x.relu()
    g = torch.randn(SIZES[case]).to(dtype)
    (exact,) = torch.autograd.grad(z, x, g)
    assert torch.equal(act_backward(g, pack_relu_mask(z) if bits else z.detach()), exact)


def test_backward_of_a_gradient_wider_than_the_output(each_backend):
    z = torch.randn(2, 5, 3, 3).bfloat16().relu()
    g = torch.randn(2, 5, 3, 3)
    out = act_backward(g, z)
    assert out.dtype == torch.float32
    assert torch.equal(out, g * (z > 0))


def test_backward_drops_an_infinite_gradient_at_a_closed_position(each_backend):
    z, g = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), float("inf"))
    assert torch.equal(act_backward(g, pack_relu_mask(z)), z)
    assert torch.equal(act_backward(g, z), z)
