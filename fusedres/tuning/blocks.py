"""The calls of a model's step that a rung is chosen for, each kind once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.nn.fused import Fused
from fusedres.patterns.choose import Gathered, gathering
from fusedres.plan.decisions import Site


@dataclass(frozen=True, eq=False)
class Block:
    """One kind of call.

    Attributes:
        gathered: one of its calls.
        names: of the modules that make it.
        count: how often a step makes it.
    """

    gathered: Gathered
    names: tuple[str, ...]
    count: int

    @property
    def site(self) -> Site:
        return self.gathered.site

    @property
    def title(self) -> str:
        """For people: the first of its modules, and how many more there are."""
        first = self.names[0] if self.names else type(self.gathered.pattern).__name__.strip("_").lower()
        more = self.count - 1
        return f"{first or 'the model'}{f' and {more} more' if more else ''}"


def blocks_of(model: nn.Module, run: Callable[[], object]) -> list[Block]:
    """What ``run``, a step's forward pass of a fused ``model``, calls; in the order of first calls.

    The model's buffers, and the state of random numbers, are put back.
    """
    names = {id(module): name for name, module in model.named_modules()}
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    schedules = [module.fused_schedule for module in fused]
    with undone(model), gathering() as every:
        for module in fused:
            module.fused_schedule = "auto"
        try:
            run()
        finally:
            for module, schedule in zip(fused, schedules, strict=True):
                module.fused_schedule = schedule
    kinds: dict[Site, list[Gathered]] = {}
    for one in every:
        kinds.setdefault(one.site, []).append(one)
    return [
        Block(same[0], tuple(dict.fromkeys(names.get(id(one.owner), "") for one in same)), len(same))
        for same in kinds.values()
    ]


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Buffers, gradients and the state of random numbers are afterwards what they were before."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = list({tensor.get_device() for tensor, _ in buffers if tensor.is_cuda}) if buffers else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def made_real(
    value: Any,
    device: torch.device,
    seed: int,
    *,
    images: int,
    batch: int,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> Any:
    """An operand on the meta device with values drawn from ``seed`` in its place, laid out alike.

    Args:
        value: a tensor, or nested tuples, lists and dataclasses of tensors and constants, such as a pattern.
        device: of the tensors.
        seed: of the values, the same for every dtype where there are few.
        images: that a call has, which its tensors of images (`IMAGES`) begin with.
        batch: how many of them to make.
        dtype: in place of floating-point ones.
        name: of the value.
    """
    generators = {"cpu": torch.Generator("cpu").manual_seed(seed)}
    if device.type != "cpu":
        generators[device.type] = torch.Generator(device).manual_seed(seed)

    def made(part: Any, name: str) -> Any:
        if isinstance(part, Tensor):
            return drawn(part, name)
        if isinstance(part, tuple):
            fields = getattr(part, "_fields", None)
            inner = [made(one, fields[i] if fields else name) for i, one in enumerate(part)]
            return type(part)(*inner) if fields else tuple(inner)
        if isinstance(part, list):
            return [made(one, name) for one in part]
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            own = {one.name: getattr(part, one.name) for one in dataclasses.fields(part) if one.init}
            changed = {key: new for key, old in own.items() if (new := made(old, key)) is not old}
            return dataclasses.replace(part, **changed) if changed else part
        return part

    def drawn(part: Tensor, name: str) -> Tensor:
        shape = list(part.shape)
        if part.dim() == 4 and name in IMAGES and shape[0] == images:
            shape[0] = batch
        rows = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if rows else torch.contiguous_format
        wanted = part.dtype if dtype is None or not part.is_floating_point() else dtype
        placed = torch.empty(shape, dtype=wanted, device=device, memory_format=layout)
        if not part.is_floating_point():
            return placed.zero_()
        where = device.type if placed.numel() >= MANY else "cpu"
        with torch.no_grad():
            placed.copy_(_values(name, shape, generators[where]))
        return placed.requires_grad_(part.requires_grad)

    return made(value, name)


# Values that are drawn on the device itself.
MANY = 1 << 22
IMAGES = ("x", "tensor", "residual")


def _values(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Such as a network in training holds, in fp32."""
    drawn = torch.empty(shape, device=generator.device).normal_(generator=generator)
    if name == "weight":
        fan_in = max(1, drawn[0].numel()) if drawn.dim() > 1 else 1
        return drawn.mul_((2 / fan_in) ** 0.5)
    if name in ("gamma", "running_var"):
        return drawn.mul_(0.1).add_(1)
    if name in ("beta", "bias", "running_mean"):
        return drawn.mul_(0.1)
    return drawn


Autocast = Callable[[], Any]
"""Makes what a block's calls run inside."""


def autocast_of(block: Block, device: torch.device) -> Autocast:
    """As the call that was taken down ran."""
    call = block.gathered.call
    return lambda: torch.autocast(device.type, dtype=call.dtype) if call.autocast else nullcontext()
