"""The stem, conv-BN-act-max-pool: which rung of the ladder it runs on, in training and inference."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fusedres.activation import IDENTITY
from fusedres.autograd import StemPool
from fusedres.autograd.spec import LayerSpec, StemSpec
from fusedres.autograd.stem import takes_stem
from fusedres.operands import ConvInput, Layer, Norm, PoolGeometry
from fusedres.ops.act_mask import activated
from fusedres.ops.contractions import conv_input
from fusedres.ops.conv_bn_act import conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.stem_pool import stem_pool
from fusedres.patterns import eager, inference
from fusedres.patterns.chain import run_chain, shapes_of
from fusedres.patterns.choose import AUTO, chain_schedule
from fusedres.patterns.door import checked_size, enter, with_rounded_weights
from fusedres.patterns.graph import graphed
from fusedres.runtime.call import Call
from fusedres.runtime.replay import replayed
from fusedres.traffic.weigh import fastest


def run_stem(x: Tensor, layer: Layer, pool: PoolGeometry, *, schedule: str = AUTO) -> Tensor:
    """maxpool(act(bn(conv(x)))), fused, differentiable; pooling is apart where `takes_stem` does not hold.

    Args:
        x: (N, C, H, W).
        layer: the convolution, its batch norm and activation.
        pool: the max-pooling window.
        schedule: as in `run_chain`.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    if not takes_stem(layer.act):
        return max_pool2d(run_chain(x, [layer], act=layer.act, schedule=schedule), *pool)
    return enter(_Stem(x, layer, pool, schedule))


@dataclass
class _Stem:
    """A call of `run_stem`."""

    x: Tensor
    layer: Layer
    pool: PoolGeometry
    schedule: str

    @property
    def norms(self) -> tuple[Norm]:
        return (self.layer.norm,)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.layer.tensors

    @property
    def shape(self) -> Hashable:
        return shapes_of([self.layer]), self.pool

    def plain(self, call: Call) -> Tensor:
        return max_pool2d(eager.through(self.x, (self.layer,), call.dtype), *self.pool)

    def check(self, call: Call) -> None:
        _, _, height, width = checked_size("x", self.x, self.layer, tuple(self.x.shape), call)
        if min(self.pool.output_size(height, width)) < 1:
            raise ValueError(f"pool: {height} x {width} pixels are too few for {self.pool}")

    def infer(self, call: Call) -> Tensor:
        (layer,) = inference.evaluated([self.layer], call)
        if call.kernels and layer.norm.running_mean is not None:
            operands = (self.x, layer, self.pool, call.dtype)
            way = fastest("stem", {"packed": _inferred_packed, "library": _inferred_as_it_is}, *operands)
            return replayed(_inferred_packed if way == "packed" else _inferred_as_it_is, *operands)
        # The activation never falls, so it may follow the maximum, over a fraction of the pixels.
        u = conv_input(self.x, call.dtype, layer, pack=call.kernels)
        z, *_ = conv_bn_act(inference.contraction(u, layer), act=IDENTITY)
        v = max_pool2d(z, *self.pool)
        return activated(v, layer.act, v.dtype, bit_mask=False, scratch=True)[0]

    def train(self, call: Call) -> Tensor:
        schedule, images_grad = self.schedule, self.x.requires_grad
        (layer,) = with_rounded_weights([self.layer], call.dtype)
        chosen = chain_schedule(schedule, kernels=call.kernels)
        spec = StemSpec(call, chosen, LayerSpec.of(layer), self.pool, images_grad)
        z: Tensor = StemPool.apply(self.x, None, spec, *layer.tensors)
        return z


def _inferred_packed(x: Tensor, layer: Layer, pool: PoolGeometry, dtype: torch.dtype) -> Tensor:
    return _pooled(conv_input(x, dtype, layer, pack=True), layer, pool)


def _inferred_as_it_is(x: Tensor, layer: Layer, pool: PoolGeometry, dtype: torch.dtype) -> Tensor:
    return _pooled(conv_input(x, dtype, layer, pack=False), layer, pool)


def _pooled(u: ConvInput, layer: Layer, pool: PoolGeometry) -> Tensor:
    y, _ = conv_forward(u, layer.weight, layer.geometry)
    return stem_pool(y, None, None, pool, indices=False, running=layer.norm, act=layer.act)[0]


graphed(_Stem, enter)
