"""Networks whose batch norms are synchronised, and what a process of a group finds out about them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedres
from fusedres.models.densenet import densenet
from fusedres.models.network import build, residual_stages
from fusedres.nn import plain
from fusedres.runtime import collectives

STEPS = {"auto": 3}
"""Passes of a kind by rung, one on the others: as it is written, noted, and by the notes."""


class Others(nn.Module):
    """Batch norms that no convolution of ours is behind, two that are added, and a PReLU, found by structure."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False)  # depthwise: the library's
        self.bn, self.beside = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.second, self.norm, self.slope = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8)

    def forward(self, x):
        y = self.conv(x)
        z = torch.relu(self.bn(y) + self.beside(y.flip(3)))
        return self.slope(self.norm(self.second(z))).mean((2, 3))


def resnet(block: Any, expansion: int, pool: bool = False) -> nn.Module:
    stages = residual_stages(lambda _, *sizes: block(*sizes), [1, 2], [4, 8], 8, expansion)
    return build(nn.Conv2d(3, 8, 3, 1, 1, bias=False), stages, num_classes=3, fused=False, pool=pool)


def preact() -> nn.Module:
    stages = residual_stages(lambda _, *sizes: plain.PreActBasicBlock(*sizes), [2, 1], [8, 8], 8, 1)
    conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
    return build(conv1, stages, num_classes=3, fused=False, end=plain.BNAct(stages[1]))


NETWORKS = {
    "basic": lambda: resnet(plain.BasicBlock, 1),
    "bottleneck": lambda: resnet(plain.Bottleneck, 4, pool=True),
    "preact": preact,
    "dense": lambda: densenet(16, 4, bc=True, num_classes=3, fused=False),
    "others": Others,
}
SIDE = 8


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.to(dtype).train()


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def batch(step: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a mean far from zero, and a gradient of the logits."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn((size, 3, SIDE, SIDE), generator=generator, dtype=torch.float64) + 3
    # Every sample of its own kind, so that the statistics of processes differ.
    x = x * torch.linspace(0.5, 2, size, dtype=torch.float64).view(-1, 1, 1, 1)
    return x.to(dtype), torch.randn((size, 8), generator=generator, dtype=torch.float64).to(dtype)


def steps_of(model: nn.Module, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, steps: int) -> dict:
    """Outputs, gradients and buffers after some steps on a share of each batch; all of it has a rank of -1."""
    begin, end = (0, sum(sizes)) if rank < 0 else (sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found: dict[str, Any] = {}
    for step in range(steps):
        x, dz = (tensor[begin:end] for tensor in batch(step, sum(sizes), dtype))
        x = x.clone().requires_grad_()
        model.zero_grad()
        z = model(x)
        z.backward(dz[:, : z.shape[1]])
        found[f"z {step}"], found[f"dx {step}"] = z.detach(), x.grad
        for name, parameter in model.named_parameters():
            found[f"grad of {name} {step}"] = parameter.grad.clone()
    return {**found, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


@contextmanager
def counting():
    """The collectives and the bytes that this process sends to each other one."""
    found: Counter = Counter()
    gather = collectives.all_gather

    def counted(every, own, **options):
        found["collectives"] += 1
        found["bytes"] += own.nbytes
        return gather(every, own, **options)

    collectives.all_gather = counted
    try:
        yield found
    finally:
        collectives.all_gather = gather


def in_processes(module: str, folder: Path, world: int, *arguments: str, timeout: float = 300) -> list[dict]:
    """What a module, as a program, leaves in each of some processes; they get (rank, world, folder, *arguments)."""
    command, root = [sys.executable, "-m", module], Path(__file__).parents[1]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(folder), *arguments], cwd=root) for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
        assert codes == [0] * world, f"the processes ended with {codes}"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@contextmanager
def in_group(rank: int, world: int, folder: str, **options: Any):
    """This process as one of a group of gloo."""
    from fusedres.nn import size_rule

    size_rule.LEAST_WORK_PER_THREAD = 0
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, **options)
    yield
    torch.distributed.destroy_process_group()


def leave(found: dict, rank: int, folder: str) -> None:
    torch.save(found, f"{folder}/{rank}.pt")


def fused(name: str, dtype: torch.dtype, schedule: str = "auto", *, late: bool = False) -> nn.Module:
    """A network that is synchronised before, or ``late`` after it is fused."""
    model = network(name, dtype)
    if late:
        return synchronised(fusedres.fuse(model, schedule=schedule))
    return fusedres.fuse(synchronised(model), schedule=schedule)
