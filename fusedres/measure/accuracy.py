"""What may be wrong with a result: errors against fp64, and how large they may be beside eager PyTorch's own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 1.5
# A ReLU whose input is within rounding of zero flips, in whoever computes it: some of those alone, in the small layers
# at a network's end, make a gradient's error of 1e-2 and one parameter's of several. A wrong formula is off by 1.
FLIPS, FLIPS_OF_ONE = 0.03, 0.1
GRADIENTS = "all gradients"
OF_ONE = "gradient of "
OF_THE_INPUT = "gradient of the input"


class Observed(NamedTuple):
    """Results by name, and gradients by the parameter's name (None where backward left none)."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def relative_error(actual: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """|actual - exact| / |exact|, Euclidean norms in fp64 (or over ``scale``); absolute where that is 0."""
    if actual.shape != exact.shape:
        return math.inf
    exact = exact.double()
    norm = float(exact.norm()) if scale is None else scale
    return float((actual.double() - exact).norm()) / (norm if norm > 0 else 1.0)


def errors(observed: Observed, exact: Observed) -> dict[str, float]:
    """Every output's error, that of all gradients together, and of each parameter's: inf where something is missing."""
    found = {
        name: relative_error(observed.outputs[name], tensor) if name in observed.outputs else math.inf
        for name, tensor in exact.outputs.items()
    }
    gradients = {name: tensor for name, tensor in exact.gradients.items() if tensor is not None}
    if not gradients:
        return found
    whole = math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in gradients.values()))
    square = 0.0
    for name, tensor in gradients.items():
        ours = observed.gradients.get(name)
        if ours is None:
            found[f"{OF_ONE}{name}"] = square = math.inf
            continue
        # The exact gradient of some parameters is zero, and whatever is computed for them is rounding.
        scale = max(float(tensor.double().norm()), 1e-3 * whole)
        found[f"{OF_ONE}{name}"] = relative_error(ours, tensor, scale)
        square += (found[f"{OF_ONE}{name}"] * scale) ** 2
    return found | {GRADIENTS: math.sqrt(square) / (whole or 1.0)}


def allowance(name: str, eager: float, storage: torch.dtype, kind: str, factor: float = FACTOR) -> float:
    """The bound on an error, from eager's own ``eager`` in a storage dtype; ``kind``: ``"op"``, or more than one."""
    if name in (GRADIENTS, OF_THE_INPUT):
        return max(factor * eager, FLIPS)
    if name.startswith(OF_ONE):
        return max(2 * factor * eager, FLIPS_OF_ONE)
    if storage.itemsize == 2:
        return max(factor * eager, 0.5 * torch.finfo(storage).eps)
    # Sums over many pixels, taken in another order.
    return max(factor * eager, (16 if kind == "op" else 4) * torch.finfo(torch.float32).eps)


def worst(ours: dict[str, float], bounds: dict[str, float]) -> str:
    """The name of the error that exceeds its bound most, or comes nearest to it."""
    return max(ours, key=lambda name: math.inf if math.isnan(ours[name]) else ours[name] / bounds[name])
