"""What a fused pattern is told besides its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.autograd.graph import Norms
from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, Shortcut, ZeroPad
from fusedres.operands import LAYER_TENSORS, Geometry, Layer, Norm, NormNumbers, PoolGeometry
from fusedres.plan.schedule import Schedule
from fusedres.runtime.call import Call
from fusedres.runtime.holding import HELD, Holding
from fusedres.runtime.text import known


@dataclass(frozen=True)
class LayerSpec(Holding):
    """A `Layer` without the tensors that a Function is applied to: the fields are of its names."""

    geometry: Geometry
    norm: NormNumbers
    act: Activation = RELU
    moments: bool = False
    rounded: Tensor | None = field(default=None, compare=False, repr=False, metadata=HELD)

    @classmethod
    def of(cls, layer: Layer) -> "LayerSpec":
        return cls(layer.geometry, layer.norm.numbers, layer.act, layer.moments, layer.rounded)

    def layer(self, tensors: Sequence[Tensor | None]) -> Layer:
        """The layer again, of its `Layer.tensors`."""
        weight, gamma, beta, running_mean, running_var, bias, counted = tensors
        assert weight is not None
        norm = Norm(gamma, beta, running_mean, running_var, bias, counted, self.norm)
        return Layer(weight, self.geometry, norm, 1.0, self.act, self.moments, self.rounded)


def layers_of(specs: Sequence[LayerSpec], tensors: Sequence[Tensor | None]) -> tuple[Layer, ...]:
    """The layers of a flat list of their tensors."""
    return tuple(
        spec.layer(tensors[LAYER_TENSORS * i : LAYER_TENSORS * (i + 1)]) for i, spec in enumerate(specs)
    )  # fmt: skip


def norms_of(specs: Sequence[LayerSpec], at: int = 0) -> Norms:
    """The batch norms of layers whose tensors begin at a place."""
    return [(at + LAYER_TENSORS * i + 1, spec.norm) for i, spec in enumerate(specs)]


@dataclass(frozen=True)
class PatternSpec(Holding):
    """Of every fused pattern.

    Attributes:
        call: what was decided at the door.
        schedule: what is written to memory.
    """

    call: Call
    schedule: Schedule

    @property
    def dtype(self) -> torch.dtype:
        """Of the contractions."""
        return self.call.dtype


@dataclass(frozen=True)
class LayeredSpec(PatternSpec):
    """Of layers in a row and what joins their output.

    Attributes:
        layers: in order.
        shortcut: what joins.
    """

    layers: tuple[LayerSpec, ...]
    shortcut: Shortcut = NO_SHORTCUT

    @property
    def projection(self) -> LayerSpec | None:
        """The layer of a projection."""
        return self.shortcut.layer if isinstance(self.shortcut, Projection) else None

    @property
    def every(self) -> tuple[LayerSpec, ...]:
        """The layers, and the projection last."""
        return self.layers if self.projection is None else (*self.layers, self.projection)


@dataclass(frozen=True)
class ChainSpec(LayeredSpec):
    """A chain conv-BN-act-...-conv-BN and what joins it at its end.

    Attributes:
        act: after the sum, an activation.
        hands_over: whether nobody but a fused block behind this one sees its output, so that the gradient may arrive
            behind its activation.
    """

    act: Activation = RELU
    hands_over: bool = False


@dataclass(frozen=True)
class StemSpec(PatternSpec):
    """conv-BN-act-max-pool; ``images_grad``: whether the gradient of its input is asked for."""

    layer: LayerSpec
    pool: PoolGeometry
    images_grad: bool = False


known(ChainSpec, StemSpec, LayerSpec, Shortcut, Identity, ZeroPad, Projection, Residual)
known(Layer, Norm, Geometry, NormNumbers, PoolGeometry, Schedule)
