"""The promise of memory: a training step's peak is not above the plain model's, on any rung, checkpointed or not.

Held from the third step on, when passes are replayed from their notes; a pass that is gone through keeps what was saved
to its end, since it has to give its gradients even if a kernel can not be started.
"""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres
from fusedres.plan.schedule import SCHEDULES
from tests.gpu_support import needs_gpu
from tests.vgpu_support import needs_vgpu

RUNGS = ("auto", "memory", *SCHEDULES)
HOW = (None, "reentrant", "not reentrant")
REPLAYED = 4
# On a GPU, images enough that activations outweigh gradients of weights, which do not grow with them.
LARGE = (2, 64)
SMALL = (2, 8)


def projection(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))


BLOCKS = {
    "bottleneck": (256, lambda: Bottleneck(256, 64)),
    "bottleneck with projection": (256, lambda: Bottleneck(256, 128, 2, projection(256, 512))),
    "basic": (64, lambda: BasicBlock(64, 64)),
    "basic with projection": (64, lambda: BasicBlock(64, 128, 2, projection(64, 128))),
}


class Network(nn.Module):
    """A block between convolutions, so that its input and its gradient come from others, as in networks."""

    def __init__(self, block: str, how: str | None) -> None:
        super().__init__()
        channels, build = BLOCKS[block]
        self.first, self.block, self.how = nn.Conv2d(3, channels, 3, padding=1, bias=False), build(), how
        self.last = nn.Conv2d(self.block.bn2.num_features * self.block.expansion, 8, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        z = self.block(x) if self.how is None else checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        return self.last(z).mean((2, 3))


def peak_of_cpu(step) -> int:
    """Bytes that tensors on the CPU hold at most in a step, beyond those of before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def peak_of_gpu(step) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak(block: str, how: str | None, rung: str | None, device: str, size: tuple[int, int], amp: bool) -> int:
    """Of a step that is replayed; ``rung`` None: of the plain model."""
    torch.manual_seed(0)
    model = Network(block, how).to(device, memory_format=torch.channels_last)
    if rung is not None:
        fusedres.fuse(model.block, schedule=rung)
    batch, side = size
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad()

    for _ in range(REPLAYED - 1):
        step()
    gc.collect()
    return peak_of_gpu(step) if device == "cuda" else peak_of_cpu(step)


def slow_but(first: object, every: tuple) -> list:
    return [one if one == first else pytest.param(one, marks=pytest.mark.slow) for one in every]


@needs_vgpu
@pytest.mark.parametrize("how", slow_but(None, HOW))
@pytest.mark.parametrize("rung", slow_but("block_end", RUNGS))
def test_kernels_on_the_cpu_keep_the_promise(rung, how):
    plain = peak("bottleneck", how, None, "cpu", SMALL, amp=False)
    with fusedres.backend("vgpu:sm_90"):
        fused = peak("bottleneck", how, rung, "cpu", SMALL, amp=False)
    assert 0 < fused <= plain


@needs_gpu
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_gpu_keeps_the_promise(block, how, amp):
    plain = peak(block, how, None, "cuda", LARGE, amp)
    above = {}
    for rung in RUNGS:
        fused = peak(block, how, rung, "cuda", LARGE, amp)
        if fused > plain:
            above[rung] = fused
    assert above == {}, f"plain: {plain}"
