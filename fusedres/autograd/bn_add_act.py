"""The block end on its own: normalise, add the (optionally normalised) shortcut, rectify."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..ops.bn_act import bn_act
from ..ops.bn_backward import bn_backward, masked
from ..ops.bn_statistics import bn_statistics
from ..ops.contract import Normaliser, OutputGrad, Partials, channels_last
from ..replay import Holding, replayed
from .composed import Composed, joining, normalised
from .layer import NORM, normaliser_of
from .layouts import arrived, in_dtype
from .saved import Packed, attached, fused_or_composed, keep, kept, kept_with_anchors, packed, unpacked
from .spec import NormSpec, NormTensors


@dataclass(frozen=True)
class BNAddActSpec(Holding):
    """``residual_norm`` is None where the residual joins as it is; ``partials`` are y's where they were measured."""

    norm: NormSpec
    residual_norm: NormSpec | None = None
    act: str | None = "relu"
    partials: Partials | None = field(default=None, compare=False, repr=False)

    @property
    def compared(self) -> tuple[Any, ...]:
        return self.norm, self.residual_norm, self.act

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        return tuple(self.partials or ())


class Kept(NamedTuple):
    y: Tensor
    norm: Normaliser
    residual: Tensor | None
    residual_norm: Normaliser | None
    mask: Tensor | None
    affine: tuple[NormTensors, NormTensors]


class BNAddAct(torch.autograd.Function):
    """z = act(bn(y) + residual), or act(bn(y) + bn'(residual)).

    ``apply(y, residual, spec, *tensors)``: y and residual (N, K, P, Q), residual may be None; tensors are the fields
    of two `NormTensors`, of y and of the residual.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, residual: Tensor | None, spec: BNAddActSpec, *tensors: Tensor | None) -> Tensor:
        training = any(ctx.needs_input_grad)
        with no_autocast(y.device.type):
            z, saved = replayed(_forward, y, residual, spec, tensors, training)
        if saved is not None:
            ctx.spec, ctx.backend = replace(spec, partials=None), backends.current()
            ctx.residual_dtype = None if residual is None else residual.dtype
            keep(ctx, saved, y, residual if spec.residual_norm is not None else None)
        return z

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        g = arrived(dz)
        dy, dresidual, grads = replayed(_backward, g, ctx.spec, kept(ctx), ctx.needs_input_grad, ctx.residual_dtype)
        return (dy, dresidual, None, *grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (of_y, of_residual) = kept_with_anchors(ctx)
        spec: BNAddActSpec = ctx.spec

        def form(y: Tensor, residual: Tensor | None, _: None, *tensors: Tensor | None) -> Tensor:
            z = normalised(y, NormTensors(*tensors[:NORM]), spec.norm, saved.norm)
            if residual is None:
                return z
            if spec.residual_norm is None:
                return z + residual
            return z + normalised(residual, NormTensors(*tensors[NORM:]), spec.residual_norm, saved.residual_norm)

        raw = saved.residual
        residual = joining(dz, ctx.residual_dtype) if raw is None else attached(raw, of_residual)
        main, other = saved.affine
        return Composed((attached(saved.y, of_y), residual, None, *main, *other), form, saved.mask)


def _measured(y: Tensor, tensors: NormTensors, spec: NormSpec, partials: Partials | None = None) -> Normaliser:
    if not spec.batch_stats:
        partials = None
    elif partials is None:
        partials = bn_statistics(y)
    return normaliser_of(partials, tensors, spec, y.dtype)


def _forward(
    y: Tensor, residual: Tensor | None, spec: BNAddActSpec, tensors: tuple[Tensor | None, ...], training: bool
) -> tuple[Tensor, Packed | None]:
    """z, and the `Kept` if there is a backward pass."""
    main, other = NormTensors(*tensors[:NORM]), NormTensors(*tensors[NORM:])
    y = channels_last(y)
    norm = _measured(y, main, spec.norm, spec.partials)
    residual_norm = None
    if residual is not None:
        residual = channels_last(residual)
        if spec.residual_norm is not None:
            residual_norm = _measured(residual, other, spec.residual_norm)
    z, mask = bn_act(
        y, norm.scale, norm.shift, residual=residual,
        residual_scale=residual_norm.scale if residual_norm else None,
        residual_shift=residual_norm.shift if residual_norm else None,
        act=spec.act, bit_mask=training and spec.act == "relu",
    )  # fmt: skip
    if not training:
        return z, None
    raw_residual = residual if residual_norm is not None else None
    return z, packed(Kept(y, norm, raw_residual, residual_norm, mask, (main.affine, other.affine)))


def _backward(
    dz: Tensor, spec: BNAddActSpec, pack: Packed, asked_of: tuple[bool, ...], residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """The gradients of y, of the residual and of the batch norms' tensors."""
    saved: Kept = unpacked(pack)
    g = OutputGrad(dz, saved.mask)

    def through(y: Tensor, norm: Normaliser, norm_spec: NormSpec, gamma: Tensor | None) -> tuple[Tensor, list[Any]]:
        typed = g._replace(g=in_dtype(g.g, y.dtype))
        dy, dgamma, dbeta = bn_backward(typed, y, norm, gamma, batch_stats=norm_spec.batch_stats)
        return dy, [dgamma, dbeta, *[None] * (NORM - 2)]

    dy, grads = through(saved.y, saved.norm, spec.norm, saved.affine[0].gamma)
    dresidual: Tensor | None = None
    residual_grads: list[Any] = [None] * NORM
    if saved.residual is not None and saved.residual_norm is not None and spec.residual_norm is not None:
        dresidual, residual_grads = through(
            saved.residual, saved.residual_norm, spec.residual_norm, saved.affine[1].gamma
        )
    elif asked_of[1]:
        dresidual = masked(g).to(residual_dtype)
    named = zip([*grads, *residual_grads], asked_of[3:], strict=True)
    return dy, dresidual, tuple(grad if wanted else None for grad, wanted in named)
