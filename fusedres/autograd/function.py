"""What the Functions of all patterns have in common: how a pass is run, what is kept of it, which form goes back."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.autograd import graph, handover
from fusedres.autograd.composed import Composed, composed_gradients
from fusedres.autograd.layouts import arrived
from fusedres.autograd.saved import Given, Packed, keep, let_go, saved_pack, unpacked_once
from fusedres.context import resume, snapshot
from fusedres.operands import Partials, Producer
from fusedres.ops.bn_backward import NormSums
from fusedres.runtime import fallback, ranges
from fusedres.runtime.autocast import no_autocast
from fusedres.runtime.graphs import is_graphed
from fusedres.runtime.launch import LaunchFailed
from fusedres.runtime.replay import replayed, replayed_at_last
from fusedres.runtime.torch_private import forward_class, is_batch_of_gradients


class Passed(NamedTuple):
    """What a forward pass gives: z; for a backward pass, if there is one, what was kept; the statistics of z, where
    they were measured; and the end of a chain, where the block behind it can make the sums of the gradient there."""

    z: Tensor
    saved: Packed | None = None
    partials: Partials | None = None
    end: Producer | None = None


class Gradients(NamedTuple):
    """What a backward pass gives; ``sums``: of dx, where it is behind the activation of the block below."""

    dx: Tensor | None
    tensors: Sequence[Tensor | None] = ()
    dresidual: Tensor | None = None
    sums: NormSums | None = None


def fused_or_composed(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward: fused, or where what it returns is to be differentiated, by `composed_gradients`.

    The latter also takes batches of gradients, and the place of a fused pass whose kernel can not be started: the owner
    of the pass is told. All run in ``ctx.context`` and outside autocast, on whichever thread they are called. Without a
    gradient, as a Function that has none materialised may be called, there is none for anybody.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        dz = grads[0]
        if dz is None:
            return (None,) * len(ctx.needs_input_grad)
        differentiated = torch.is_grad_enabled()
        with resume(ctx.context), no_autocast(dz.device.type), unpacked_once(ctx):
            if differentiated or is_batch_of_gradients(dz):
                return composed_gradients(ctx, dz, create_graph=differentiated)
            try:
                return backward(ctx, dz.resolve_neg(), *grads[1:])
            except LaunchFailed as failure:
                fallback.give_up(getattr(ctx, "owner", None), failure)
                return composed_gradients(ctx, dz, create_graph=False)

    return run


class FusedFunction(torch.autograd.Function):
    """A pattern, as ``apply(x, residual, spec, *tensors)``; each says what these are and what comes back.

    A class has ``run(x, residual, spec, tensors, under) -> Passed``; ``go_back(dz, sums, spec, saved, given) ->
    Gradients``; ``composed(ctx, dz) -> Composed``, the pattern as a plain function; and ``norms(spec)``, where the
    batch norms are among the tensors. Where a compiler follows, a call is a node of its graph (`autograd.graph`).
    """

    measured = False
    """Whether (z, counts, mean, m2) is what comes back, the latter the `Partials` of z or None each."""

    follows = False
    """Whether the last backward step of a pass can be that of the block below too."""

    run: Callable[..., Passed]
    go_back: Callable[..., Gradients]
    composed: Callable[..., Composed]
    norms: Callable[[Any], graph.Norms]

    op = ""
    """The name of its op in a compiler's graph."""

    @classmethod
    def apply(cls, x: Tensor, residual: Tensor | None, spec: Any, *tensors: Tensor | None) -> Any:
        if is_graphed(x):
            z = graph.passed(cls, x, residual, spec, tensors)
            return (z, None, None, None) if cls.measured else z
        return super().apply(x, residual, spec, *tensors)

    @staticmethod
    def anchored(x: Tensor, residual: Tensor | None, spec: Any) -> tuple[Tensor | None, ...]:
        """The inputs of which a copy is kept."""
        return (x,)

    @staticmethod
    def summands(x: Tensor, residual: Tensor | None, spec: Any) -> tuple[Tensor | None, ...]:
        """The inputs that join a sum, where the slope of the activation behind it has a derivative in them."""
        return ()

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, spec: Any, *tensors: Tensor | None) -> Any:
        function = forward_class(ctx)
        under = handover.ends.take(x) if function.follows else None
        if not ctx.needs_input_grad[0]:
            under = None
        with spec.call.without_autocast():
            passed = replayed(function.run, x, residual, spec, tensors, under)
        if passed.saved is not None:
            # The statistics of x were of use in the forward pass alone.
            ctx.spec = replace(spec, partials=None) if getattr(spec, "partials", None) is not None else spec
            ctx.context, ctx.name = snapshot(), ranges.forward_name()
            residual_dtype = None if residual is None else residual.dtype
            ctx.given = Given(x.dtype, tuple(x.shape), residual_dtype, ctx.needs_input_grad)
            inputs = function.anchored(x, residual, spec)
            keep(ctx, passed.saved, *inputs, summands=function.summands(x, residual, spec))
        if passed.end is not None:
            handover.ends.leave(passed.z, passed.end)
        if not function.measured:
            return passed.z
        if passed.partials is None:
            return passed.z, None, None, None
        ctx.set_materialize_grads(False)  # nobody reads a gradient of statistics
        ctx.mark_non_differentiable(*passed.partials)
        return passed.z, *passed.partials

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Any, ...]:
        function = forward_class(ctx)
        sums = handover.reduced.take(dz) if function.follows else None
        dz = arrived(dz, ctx.spec.call, ctx.owner)
        with ranges.backward(ctx.name):
            operands = [dz, sums, ctx.spec, saved_pack(ctx), ctx.given]
            found = replayed_at_last(function.go_back, operands, functools.partial(let_go, ctx))
        if found.dx is not None and found.sums is not None:
            handover.reduced.leave(found.dx, found.sums)
        tensors = found.tensors
        if ctx.spec.call.absent:
            tensors = [None if grad is None else torch.zeros_like(grad) for grad in tensors]
        return (found.dx, found.dresidual, None, *tensors)
