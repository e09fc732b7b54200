"""One step of a model on the meta device, eager or on a rung, with an account of all that it moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bench.saved_activations import saved_bytes
from ..nn.fused import FusedStem
from ..plan import Choice
from ..plan.choose import listening
from ..plan.gpus import Gpu, assume_gpu
from ..swap import fuse, report, unfuse
from .account import Account, Entry
from .autocast import meta_autocast

STEM, REST, HEAD = "stem", "between blocks", "head"


@dataclass(frozen=True)
class Step:
    """What one step takes.

    Attributes:
        entries: every launch, in order.
        saved: bytes kept for the backward pass, parameters left out; 0 for inference.
        choices: what ``"auto"`` chose, by layer.
    """

    entries: tuple[Entry, ...]
    saved: int = 0
    choices: Mapping[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class Twins:
    """A model and its fused copy on the meta device, with the modules that layers are named after."""

    plain: nn.Module
    fused: nn.Module
    plain_names: Mapping[nn.Module, str]
    fused_names: Mapping[nn.Module, str]
    rest: tuple[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Twins:
        """``model`` unfused and a copy of it fused, named alike.

        Raises:
            ValueError: nothing of the model can be fused; the message says why.
        """
        fused = fuse(copy.deepcopy(model))
        rows = report(fused)
        if not any(row.fused for row in rows):
            reasons = "; ".join(dict.fromkeys(f"{row.name or 'the model'}: {row.reason}" for row in rows[:3]))
            raise ValueError(f"model: nothing to fuse in it ({reasons or 'no residual block that the library knows'})")
        blocks = {row.name for row in rows if row.fused and not isinstance(fused.get_submodule(row.name), FusedStem)}
        stem = {
            f"{row.name}.{name}".lstrip(".")
            for row in rows
            if row.fused and isinstance(owner := fused.get_submodule(row.name), FusedStem)
            for name in _stem_modules(owner)
        }
        names = _names(unfuse(model), blocks)
        return cls(
            model,
            fused,
            {model.get_submodule(name): STEM if name in stem else name for name in names},
            {fused.get_submodule(name): name for name in names if name not in stem},
            (STEM, HEAD) if stem else (REST, REST),
        )


def _stem_modules(owner: FusedStem) -> list[str]:
    parts = owner.checked_stem()
    return [parts.pair.conv_name, parts.pair.bn_name, *(name for name, _ in parts.others)]


def _names(model: nn.Module, blocks: set[str]) -> list[str]:
    """The outermost blocks, and the modules without children that are in none of them, in the model's order."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in chosen if outer in blocks)
        # A global pool is the model's own affair where the model is fused.
        leaf = not any(module.children()) and not isinstance(module, nn.AdaptiveAvgPool2d)
        if not inside and (name in blocks or leaf):
            chosen.append(name)
    return chosen


def run_step(
    twins: Twins, images: Tensor, rung: str | None, *, gpu: Gpu, dtype: torch.dtype, infer: bool = False,
    images_grad: bool = False,
) -> Step:  # fmt: skip
    """Count one step of the model alone: forward, and in training backward from a gradient that is there.

    Args:
        twins: the model.
        images: (N, C, H, W) on the meta device; fp32 as they come from a loader, or of ``dtype`` from another block.
        rung: a schedule of `fuse`; None for the plain model.
        gpu: whose launches the dry run makes.
        dtype: bf16 and fp16 by autocast, or fp32.
        infer: the forward pass in evaluation mode, without gradients.
        images_grad: whether the images need a gradient too (they do where they are another block's output).
    """
    model, names = (twins.plain, twins.plain_names) if rung is None else (twins.fused, twins.fused_names)
    model.train(not infer)
    if rung is not None:
        fuse(model, schedule=rung)
        # Weights are gathered and folded by now, as in every step but the first.
        account = Account(names, rest=twins.rest, target=gpu.target)
        with account, assume_gpu(gpu), _as_in_a_step(dtype, infer):
            try:
                model(images)
            except ValueError as error:
                raise ValueError(f"layer {account.layer() or '(model)'}: {error}") from error
    for parameter in model.parameters():
        parameter.grad = None
    images = images.detach().requires_grad_(images_grad)
    account = Account(names, rest=twins.rest, target=gpu.target if rung else None, grad_twice=rung is not None)
    outputs: list[Tensor] = []
    saved = 0

    def forward(module: nn.Module) -> Tensor:
        with _as_in_a_step(dtype, infer):
            outputs.append(_tensor_of(module(images)))
        return outputs[0]

    choices: dict[str, Choice] = {}

    def chosen(choice: Choice) -> None:
        choices.setdefault(account.layer(), choice)

    with account, assume_gpu(gpu), listening(chosen):
        if infer:
            forward(model)
        else:
            saved = int(saved_bytes(model, forward).total)
            outputs[0].backward(torch.empty_like(outputs[0]))
    return Step(tuple(account.entries), saved, choices)


def _tensor_of(output: object) -> Tensor:
    """The output of a model, or the first of several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))  # type: ignore[call-overload]
    return output


@contextmanager
def _as_in_a_step(dtype: torch.dtype, infer: bool) -> Iterator[None]:
    with torch.set_grad_enabled(not infer), meta_autocast(dtype if dtype.itemsize == 2 else None):
        yield
