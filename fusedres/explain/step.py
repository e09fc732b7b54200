"""One step of a model on the meta device, eager or on a rung, with an account of all that it moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusedres.models.sources import in_one_line
from fusedres.nn.stem import FusedStem
from fusedres.patterns.choose import Choice, listening
from fusedres.plan.gpus import Gpu, assume_gpu
from fusedres.swap import fuse, report, unfuse
from fusedres.swap.report import why_not_fused
from fusedres.traffic.account import Account, Entry
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.traffic.saved import saved_bytes
from fusedres.traffic.tensors import tensors_in

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
        why = why_not_fused(fused)
        if why is not None:
            raise ValueError(f"model: {why}")
        chosen = [row.name for row in report(fused) if row.fused]
        networks = {name for name in chosen if _is_network(name, fused, chosen)}
        names = _names(unfuse(model), set(chosen) - networks, networks)
        return cls(
            model,
            fused,
            {model.get_submodule(name): name for name in names},
            {fused.get_submodule(name): name for name in names},
            (STEM, HEAD) if networks else (REST, REST),
        )


def _is_network(name: str, model: nn.Module, fused: list[str]) -> bool:
    """Whether a fused module is a network around blocks: what it does itself is its stem and its head."""
    around = any(other != name and _is_inside(other, name) for other in fused)
    return around or isinstance(model.get_submodule(name), FusedStem)


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _names(model: nn.Module, blocks: set[str], networks: set[str]) -> list[str]:
    """The outermost blocks, and what else has no modules inside, in the model's order.

    Of a network's own modules only classifiers: a fused pass may stand for the others, and is not taken if these have
    hooks.
    """
    chosen: list[str] = []
    for name, module in model.named_modules():
        if any(_is_inside(name, outer) for outer in chosen if outer in blocks):
            continue
        own = any(_is_inside(name, network) for network in networks)
        leaf = isinstance(module, nn.Linear) if own else not any(module.children())
        if name in blocks or (leaf and name not in networks):
            chosen.append(name)
    return chosen


def check_images(model: nn.Module, images: Tensor, *, infer: bool) -> None:
    """Refuse a model that does not take ``images``, on the meta device, before anything is counted.

    Raises:
        ValueError: its forward pass fails, or gives nothing that a backward pass could start at.
    """
    try:
        with torch.set_grad_enabled(not infer):
            outputs = list(tensors_in(model.train(not infer)(images)))
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise ValueError(
            f"model: expected one that takes a tensor of images, here of {size}, and never looks at their values;"
            f" its forward fails: {in_one_line(error)}"
        ) from error
    if not infer and not any(output.requires_grad for output in outputs):
        raise ValueError("model: expected one whose output has a gradient, got none")


def run_step(
    twins: Twins, images: Tensor, rung: str | None, *, gpu: Gpu, dtype: torch.dtype, infer: bool = False,
    images_grad: bool = False, cast: bool = False,
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
        cast: whether the model has ``dtype`` itself, and no autocast is needed.
    """
    model, names = (twins.plain, twins.plain_names) if rung is None else (twins.fused, twins.fused_names)
    model.train(not infer)
    if rung is not None:
        fuse(model, schedule=rung)
        # Constants that kernels read are there by now, as in every step but the first.
        account = Account(names, rest=twins.rest, target=gpu.target)
        with account, assume_gpu(gpu), _as_in_a_step(dtype, infer=infer, cast=cast):
            try:
                model(images)
            except ValueError as error:
                raise ValueError(f"layer {account.layer() or '(model)'}: {error}") from error
    for parameter in model.parameters():
        parameter.grad = None
    images = images.detach().requires_grad_(images_grad)
    account = Account(names, rest=twins.rest, target=gpu.target if rung else None, grad_twice=rung is not None)
    outputs: tuple[Tensor, ...] = ()
    saved = 0

    def forward(module: nn.Module) -> tuple[Tensor, ...]:
        nonlocal outputs
        with _as_in_a_step(dtype, infer=infer, cast=cast):
            outputs = tuple(tensor for tensor in tensors_in(module(images)) if tensor.requires_grad)
        return outputs

    choices: dict[str, Choice] = {}

    def chosen(choice: Choice) -> None:
        choices.setdefault(account.layer(), choice)

    with account, assume_gpu(gpu), listening(chosen):
        if infer:
            forward(model)
        else:
            saved = int(saved_bytes(model, forward).total)
            # As from a loss that is a sum over all of them.
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return Step(tuple(account.entries), saved, choices)


@contextmanager
def _as_in_a_step(dtype: torch.dtype, *, infer: bool, cast: bool) -> Iterator[None]:
    with torch.set_grad_enabled(not infer), meta_autocast(None if cast or dtype.itemsize != 2 else dtype):
        yield
