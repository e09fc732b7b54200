"""Batch norm and PReLU in the blocks that have them: the face-recognition ResNet's, plain chains, stems."""

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.nn.steps import ChainStep, NormStep, PReLUStep
from fusedres.nn.structured import taken_apart
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import assert_same_pass, plain_copy, randomised, run, tensor
from tests.vgpu_support import needs_vgpu


class IResidual(nn.Module):
    """BN-conv-BN-PReLU-conv-BN, nothing behind the sum."""

    def __init__(self, channels: int, width: int, stride: int, slopes: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels, eps=2e-5), nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(width, eps=2e-5), nn.PReLU(slopes)
        self.conv2, self.bn3 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width, eps=2e-5)
        self.downsample = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return out


def chain() -> nn.Module:
    """The first activation is a ReLU and the second a PReLU."""
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 9, 1), nn.BatchNorm2d(9), nn.PReLU(9),
    )  # fmt: skip


class Bare(nn.Module):
    """No convolution before the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(6), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


BLOCKS = {
    "a face recognition block": lambda: IResidual(6, 6, 1, 6),
    "with a projection": lambda: IResidual(6, 8, 2, 8),
    "one slope": lambda: IResidual(6, 8, 2, 1),
    "a chain": chain,
    "a batch norm alone": Bare,
}


def made(block: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = randomised(BLOCKS[block]().to(dtype))
    for part in module.modules():
        if type(part) is nn.PReLU:
            nn.init.normal_(part.weight)
    return module


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_computes_what_the_plain_block_does(block, backend):
    fused = fusedres.fuse(made(block), schedule="stats")
    plain, x = plain_copy(fused), tensor(3, 6, 7, 5).to(memory_format=torch.channels_last)
    rows = fusedres.report(fused)
    assert rows and all(row.fused for row in rows)
    with fusedres.backend(backend):
        for mode in (True, False):
            assert_same_pass(run(fused.train(mode), x), run(plain.train(mode), x))
            with torch.no_grad():
                torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slopes", [1, 96], ids=["one slope", "one for each channel"])
def test_a_wide_block_is_trusted_by_its_passes(slopes, monkeypatch):
    """On layers with few channels, and as few slopes."""
    monkeypatch.setattr("fusedres.nn.proof.MOST_WORK", 0)
    fused = fusedres.fuse(randomised(IResidual(64, 96, 1, slopes)), schedule="stats")
    assert [row.reason for row in fusedres.report(fused)] == ["", ""]


STEPS = {
    "a face recognition block": [NormStep, PReLUStep, ChainStep],
    "a chain": [ChainStep, PReLUStep],
    "a batch norm alone": [PReLUStep],
}


@pytest.mark.parametrize("block", STEPS)
def test_which_passes_are_taken(block):
    structure, _ = taken_apart(made(block), None)
    assert [type(step) for step in structure.found.fused] == STEPS[block]


@needs_vgpu
def test_on_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fused = fusedres.fuse(made("with a projection", torch.float32), schedule="stats")
    plain, x = plain_copy(fused), tensor(2, 6, 7, 5, dtype=torch.float32)
    with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
        ours = run(fused, x)
    names = ("bn_prelu_kernel", "bn_prelu_reduce_kernel", "bn_prelu_apply_kernel")
    assert [trace.by_kernel()[name] for name in names] == [1, 1, 1]
    theirs, exact = run(plain, x), run(plain.double(), x.double())
    assert_as_accurate_as_eager(ours.z, theirs.z, exact.z)
    assert_as_accurate_as_eager(ours.dx, theirs.dx, exact.dx)
    assert relative_error(ours.grads["prelu.weight"], exact.grads["prelu.weight"]) <= 1e-5


def test_hooks_on_a_prelu_are_called():
    fused, seen = fusedres.fuse(made("a chain"), schedule="stats"), []
    fused[5].register_forward_hook(lambda module, args, z: seen.append(z))
    plain, x = plain_copy(fused), tensor(3, 6, 7, 5)
    z = fused(x)
    assert len(seen) == 1 and torch.equal(seen[0], z)
    torch.testing.assert_close(z, plain(x), rtol=1e-10, atol=1e-10)


def test_what_stands_in_its_place_later_is_run():
    fused = fusedres.fuse(made("a face recognition block"))
    plain, x = plain_copy(fused), tensor(2, 6, 7, 6)
    assert_same_pass(run(fused, x), run(plain, x))
    for model in (fused, plain):
        model.prelu = nn.GroupNorm(2, 6).double()  # which has a weight, too
    assert_same_pass(run(fused, x), run(plain, x))
