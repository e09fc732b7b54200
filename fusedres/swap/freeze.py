"""A copy of a model for inference alone, its batch norms folded into the convolutions before them once."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn

from fusedres.nn.fused import Fused
from fusedres.nn.norms import behind_norm, norm_of
from fusedres.nn.parts import NotFusable, Pair
from fusedres.swap.swap import Frozen, check_model, frozen_class, fuse, unfuse

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def freeze(model: Model) -> Model:
    """A fused copy of a model for inference alone: batch norms behind convolutions are folded into them.

    The copy is in evaluation mode and its parameters require no gradient. It is an ordinary module: it can be moved,
    cast, exported (`torch.export`, ONNX) and unfused. ``copy.train()`` is refused, since nothing is left to train.
    What is written to ``model`` afterwards is not seen by the copy.

    Args:
        model: any module, fused or not; it stays as it is.

    Returns:
        The copy, an instance of the model's plain class.

    Raises:
        TypeError: the model is no module.
    """
    check_model(model)
    if issubclass(type(model), Frozen):
        return fuse(copy.deepcopy(model))
    frozen = fuse(unfuse(copy.deepcopy(model))).requires_grad_(False).eval()
    pairs = [pair for module in frozen.modules() if isinstance(module, Fused) for pair in _pairs_of(module)]
    uses = Counter(id(part) for pair in pairs for part in pair[:2])
    uses.update(id(child) for parent in frozen.modules() for child in parent._modules.values())
    for conv, bn, *_ in pairs:
        # Once in a pair and once in its parent: nobody else calls it, as far as can be seen.
        if uses[id(conv)] == uses[id(bn)] == 2 and _is_foldable(conv, bn):
            _fold(conv, bn)
            _replace(frozen, bn)
    live: Any = frozen
    live.__class__ = frozen_class(type(frozen))
    return frozen


def _pairs_of(module: Fused) -> tuple[Pair, ...]:
    try:
        pairs: tuple[Pair, ...] = type(module).parts_of(module).pairs
    except NotFusable:
        return ()
    return pairs


def _is_foldable(conv: nn.Module, bn: nn.Module) -> bool:
    own = "weight" in conv._parameters and "bias" in conv._parameters
    if not own or type(bn) is nn.Identity or behind_norm(bn):
        return False
    try:
        return norm_of(bn).running_mean is not None
    except NotFusable:
        return False


def _fold(conv: Any, bn: nn.Module) -> None:
    """bn(conv(u)) as one convolution; in fp64, so that each number is rounded once."""
    norm = norm_of(bn)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.numbers.eps)
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    if norm.gamma is not None:
        scale = scale * norm.gamma.double()
    shift = shift * scale
    if norm.beta is not None:
        shift = shift + norm.beta.double()
    dtype = conv.weight.dtype
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def _replace(model: nn.Module, bn: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is bn:
                parent._modules[name] = nn.Identity().eval()
                return
