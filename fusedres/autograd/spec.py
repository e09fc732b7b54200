"""What a fused pattern is told besides its tensors."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.contract import Geometry, PoolGeometry
from ..plan import Schedule
from ..replay import Holding


class NormTensors(NamedTuple):
    """The tensors of one batch norm, each (K,) or None, and the bias of the convolution before it.

    ``counted`` is () int64, the batches seen, to be one more where this one is measured; None: nobody counts.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bias: Tensor | None = None
    counted: Tensor | None = None

    @property
    def affine(self) -> "NormTensors":
        """Gamma and beta alone."""
        return NormTensors(self.gamma, self.beta)

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """In the order of `check_norm_vectors`."""
        return self[:5]


class ConvBN(NamedTuple):
    """The tensors of one convolution and its batch norm; every one but the weight may be None."""

    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    counted: Tensor | None = None

    @property
    def parameters(self) -> "ConvBN":
        """Without the running statistics, which the next forward pass changes and no backward pass reads."""
        return self._replace(running_mean=None, running_var=None, counted=None)

    @property
    def norm(self) -> NormTensors:
        return NormTensors(self.gamma, self.beta, self.running_mean, self.running_var, self.bias, self.counted)


@dataclass(frozen=True)
class NormSpec:
    """The numbers of one batch norm.

    Attributes:
        eps: added to the variance.
        momentum: weight of the new value in the running statistics.
        batch_stats: normalise with this batch's statistics (training), not with the running ones.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    batch_stats: bool = True


@dataclass(frozen=True)
class LayerSpec:
    """One convolution and its batch norm.

    Attributes:
        geometry: how its window moves.
        norm: the numbers of its batch norm.
        moments: whether its output is never written.
        rounded: the weight in the dtype of the contractions, where that is not its own and the copy was made already.
    """

    geometry: Geometry
    norm: NormSpec
    moments: bool = False
    rounded: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def compared(self) -> tuple[Any, ...]:
        """All of it but the copy."""
        return self.geometry, self.norm, self.moments

    def weight(self, layer: ConvBN, dtype: torch.dtype) -> Tensor:
        """The weight of ``layer`` in a dtype of contractions."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return layer.weight.to(dtype)


class Layered(Holding):
    """Of layers and, perhaps, the projection of a shortcut."""

    layers: tuple[LayerSpec, ...]
    projection: LayerSpec | None

    @property
    def compared_layers(self) -> tuple[Any, ...]:
        """What the layers and the projection are compared by."""
        return tuple(layer.compared for layer in self.layers), self.projection and self.projection.compared

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        every = self.layers if self.projection is None else (*self.layers, self.projection)
        return tuple(layer.rounded for layer in every)


@dataclass(frozen=True)
class ChainSpec(Layered):
    """A chain conv-BN-ReLU-...-conv-BN and what joins it at its end.

    Attributes:
        layers: the chain, in order.
        projection: the shortcut's conv-BN on the block's input, or None.
        shortcut: ``"none"``, ``"identity"``, ``"zero_pad"``, ``"projection"`` of the input, or ``"residual"``, a
            tensor of its own.
        act: after the sum, ``"relu"`` or None.
        schedule: what is written to memory.
        dtype: of the contractions (autocast's, or the input's own).
        zero_pad_stride: of the zero-pad shortcut.
        hands_over: whether nobody but a fused block behind this one sees its output, so that the gradient may arrive
            behind its ReLU.
    """

    layers: tuple[LayerSpec, ...]
    schedule: Schedule
    dtype: torch.dtype
    projection: LayerSpec | None = None
    shortcut: str = "none"
    act: str | None = "relu"
    zero_pad_stride: tuple[int, int] = (1, 1)
    hands_over: bool = False

    @property
    def compared(self) -> tuple[Any, ...]:
        return (
            self.compared_layers, self.schedule, self.dtype, self.shortcut, self.act, self.zero_pad_stride,
            self.hands_over,
        )  # fmt: skip


@dataclass(frozen=True)
class StemSpec(Holding):
    """conv-BN-ReLU-max-pool."""

    layer: LayerSpec
    pool: PoolGeometry
    schedule: Schedule
    dtype: torch.dtype

    @property
    def compared(self) -> tuple[Any, ...]:
        return self.layer.compared, self.pool, self.schedule, self.dtype

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        return (self.layer.rounded,)
