"""fusedres.autograd.global_pool: PyTorch's own pooling, with a gradient that takes no memory."""

import copy

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

import fusedres
from fusedres.autograd import GlobalPool
from fusedres.plan import SCHEDULES
from tests.comparison import assert_close
from tests.vgpu_support import needs_vgpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 7, 5), (1, 4, 1, 1), (3, 8, 4, 4)], ids=str)
def test_bit_by_bit_as_pytorch(size, dtype):
    ours = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    pooled, expected = GlobalPool.apply(ours), adaptive_avg_pool2d(theirs, 1)
    assert torch.equal(pooled, expected)
    dz = torch.randn_like(expected)
    pooled.backward(dz)
    expected.backward(dz)
    assert torch.equal(ours.grad, theirs.grad)


def test_derivatives_of_any_order():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GlobalPool.apply, x)
    assert torch.autograd.gradgradcheck(GlobalPool.apply, x)


def test_the_gradient_has_a_value_per_image_and_channel():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    seen = []
    y = x * 1
    y.register_hook(lambda grad: seen.append(grad.stride()))
    GlobalPool.apply(y).sum().backward()
    assert seen[0][2:] == (0, 0)


@needs_vgpu
@pytest.mark.parametrize("shortcut", ["identity", pytest.param("projection", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=() if name == "moments" else pytest.mark.slow) for name in SCHEDULES]
)
def test_the_last_block_on_kernels_reads_it_as_it_is(schedule, shortcut, monkeypatch):
    """Against the formulas, on which the gradient is spread out."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    channels = 32 if shortcut == "identity" else 16
    block = fusedres.fuse(fusedres.nn.Bottleneck(channels, 8), schedule=schedule)
    x, dz = torch.randn(2, channels, 5, 4), torch.randn(2, 32, 1, 1)
    grads = []
    for backend in ("vgpu:sm_90", "reference"):
        model, images = copy.deepcopy(block), x.clone().requires_grad_()
        with fusedres.backend(backend), fusedres.record() as trace:
            GlobalPool.apply(model(images)).backward(dz)
        grads.append([images.grad, *(parameter.grad for parameter in model.parameters())])
        assert trace.launches or backend == "reference"
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, 1e-5)
