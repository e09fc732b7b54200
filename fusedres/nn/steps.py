"""What runs in the place of a forward that was read: fused passes, and what lies between them as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fusedres.activation import IDENTITY, Activation
from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, Shortcut
from fusedres.functional import add_act
from fusedres.nn.fused import Fused
from fusedres.nn.layers import layer_of
from fusedres.nn.norms import group_of, norm_alone, norm_of
from fusedres.nn.parts import Named, NotFusable, Pair, why_not_others, why_not_parts
from fusedres.nn.size_rule import too_small
from fusedres.nn.stem import pool_geometry
from fusedres.nn.tensors import tensor_of
from fusedres.nn.tracing import is_plain
from fusedres.operands import Layer
from fusedres.patterns.bn_act import run_bn_act, run_bn_prelu
from fusedres.patterns.chain import run_chain
from fusedres.patterns.choose import AUTO
from fusedres.patterns.stem import run_stem
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.fallback import attempt
from fusedres.runtime.graphs import launches
from fusedres.runtime.text import Untold

Values = list[Any]
"""What the nodes of a forward gave, by their places in it; the last is a set of the places of those that the plain
modules would have given in another layout."""


class Modules(NamedTuple):
    """The live modules that a forward calls, and their paths."""

    found: Sequence[nn.Module]
    paths: Sequence[str]

    def named(self, place: int) -> Named:
        return self.paths[place], self.found[place]

    def pair(self, conv: int, norm: int) -> Pair:
        return Pair(self.found[conv], self.found[norm], self.paths[conv], self.paths[norm])


@dataclass(frozen=True)
class PlainNode:
    """A node as it is: a call of a module, of a batch norm without what is behind it, of a function or a method, or a
    tensor that is looked up."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    out: int
    names: tuple[str, ...] = ()
    """Of a tensor, below its module."""

    def run(self, modules: Sequence[nn.Module], values: Values) -> Any:
        args, kwargs = filled(self.args, values), filled(self.kwargs, values)
        if self.op == "norm":
            return norm_alone(modules[self.target], args[0])
        if self.op == "call_module":
            return modules[self.target](*args, **kwargs)
        if self.op == "call_function":
            return self.target(*args, **kwargs)
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        found: Any = modules[self.target]
        for name in self.names:
            found = getattr(found, name)
        return found


@dataclass(frozen=True)
class Place:
    """Where a value stands."""

    place: int


@dataclass(frozen=True)
class Step:
    """Nodes that run one after the other, as they are where nothing else is said.

    Attributes:
        nodes: in order; the last gives what the others are for.
        frees: places of values that nobody needs any more.
    """

    nodes: tuple[PlainNode, ...]
    frees: tuple[int, ...] = ()

    @property
    def out(self) -> int:
        return self.nodes[-1].out

    def run(self, owner: Fused, modules: Modules, values: Values) -> None:
        """Put what it gives in its place."""
        for node in self.nodes:
            values[node.out] = node.run(modules.found, values)
        for node in self.nodes[:-1]:
            values[node.out] = None
        for place in self.frees:
            values[place] = None


@dataclass(frozen=True)
class FusedStep(Step):
    """Nodes for which there is a fused pass.

    Attributes:
        x: place of what it takes.
        residual: place of what is added to what it makes of that, or None.
        act: behind them.
        others: places of the modules of activations and pooling, which the pass does not call.
        seen: whether anything but a fused pass takes what it gives: that has the layout that the plain modules would
            give.
    """

    x: int = 0
    residual: int | None = None
    act: Activation = IDENTITY
    others: tuple[int, ...] = ()
    seen: bool = True

    def pairs(self, modules: Modules) -> tuple[Pair, ...]:
        return ()

    def lone(self, modules: Modules) -> tuple[Named, ...]:
        """Batch norms without a convolution."""
        return ()

    def norms(self, modules: Modules) -> Iterator[nn.Module]:
        yield from (pair.bn for pair in self.pairs(modules))
        yield from (norm for _, norm in self.lone(modules))

    def is_folded(self, modules: Modules) -> bool:
        """Whether a batch norm is in the convolution before it by now: without gradients alone."""
        return any(type(pair.bn) is nn.Identity for pair in self.pairs(modules))

    def why_not(self, modules: Modules) -> str | None:
        """Why its nodes would run as they are, or None."""
        reason = why_not_parts(self.pairs(modules), self.lone(modules))
        return reason or why_not_others(modules.named(place) for place in self.others)

    def fused(self, modules: Modules, values: Values, schedule: str) -> Tensor:
        """The fused pass.

        Raises:
            NotFusable: a tensor is of a kind that passes do not take.
        """
        raise NotImplementedError

    @property
    def operand_places(self) -> tuple[int, ...]:
        """Of the tensors that it takes, the first that which it is planned by."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def summand(self, values: Values, size: Sequence[int]) -> Tensor | None:
        """What is added to a tensor of a size as it is, or None.

        Raises:
            NotFusable: PyTorch would have to make one as large as the other.
        """
        residual: Tensor | None = None if self.residual is None else values[self.residual]
        if residual is not None and tuple(residual.shape) != tuple(size):
            raise NotFusable("what is added is of another shape")
        return residual

    def run(self, owner: Fused, modules: Modules, values: Values) -> None:
        z = self.attempt(owner, modules, values)
        if z is None:
            super().run(owner, modules, values)
            return
        values[self.out] = z
        for place in self.frees:
            values[place] = None

    def attempt(self, owner: Fused, modules: Modules, values: Values) -> Tensor | None:
        """The fused pass, or None where its nodes have to run as they are."""
        operands = [values[place] for place in self.operand_places]
        if any(not is_plain(x) or x.dim() != 4 for x in operands):
            return None
        x, auto = operands[0], owner.fused_schedule == AUTO
        waits = any(group_of(norm) is not None for norm in self.norms(modules))
        if owner.fused_failure is not None or not (x.numel() or waits):
            return None
        pairs = self.pairs(modules)
        folded = self.is_folded(modules)
        convs: list[Any] = [pair.conv for pair in pairs]
        if auto and x.device.type == "cpu" and not waits:
            gains = bool(pairs) and (folded or torch.is_grad_enabled() or owner.training)
            if too_small(x, sum(conv.weight.numel() for conv in convs) if gains else 0):
                return None
        if self.why_not(modules) is not None:
            return None
        if folded and torch.is_grad_enabled() and (x.requires_grad or convs[0].weight.requires_grad):
            return None

        def written() -> list[Tensor]:
            return [buffer for norm in self.norms(modules) for buffer in norm.buffers()]

        def run() -> Tensor:
            return self.fused(modules, values, owner.fused_schedule)

        try:
            z = attempt(owner, written, run, kernels=launches(x))
        except (NotFusable, Untold):
            return None
        follows = has_channels_last(x) and self.x not in values[-1]
        if z is None or follows or any(has_channels_last(conv.weight) for conv in convs):
            return z
        if self.seen:
            return z.contiguous()
        values[-1].add(self.out)
        return z


def has_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a pixel lie beside each other, and no other axis does."""
    return tensor.stride(1) == 1 and tensor.shape[2:].numel() > 1


class LayerPlace(NamedTuple):
    """A convolution, the batch norm behind it and the activation behind that."""

    conv: int
    norm: int
    act: Activation = IDENTITY


@dataclass(frozen=True)
class ChainStep(FusedStep):
    """act(bn(conv(... act(bn(conv(x))))) + shortcut), max-pooled perhaps.

    Attributes:
        layers: the chain.
        projection: the shortcut, if it is a layer on ``x``; a ``residual`` that is ``x`` is the identity.
        typed_as: place of the value whose dtype the sum has, where it was added in place; -1: that of the branch.
        pool: place of the max-pooling behind it.
    """

    layers: tuple[LayerPlace, ...] = ()
    projection: LayerPlace | None = None
    typed_as: int | None = None
    pool: int | None = None

    def pairs(self, modules: Modules) -> tuple[Pair, ...]:
        layers = self.layers if self.projection is None else (*self.layers, self.projection)
        return tuple(modules.pair(layer.conv, layer.norm) for layer in layers)

    def why_not(self, modules: Modules) -> str | None:
        reason = super().why_not(modules)
        if reason is None and self.pool is not None:
            try:
                pool_geometry(*modules.named(self.pool))
            except NotFusable as why:
                return str(why)
        return reason

    def fused(self, modules: Modules, values: Values, schedule: str) -> Tensor:
        x = values[self.x]
        layers = [layer_of(modules.pair(layer.conv, layer.norm), layer.act) for layer in self.layers]
        if self.pool is not None:
            *before, last = layers
            if before:
                x = run_chain(x, before, act=before[-1].act, schedule=schedule)
            geometry = pool_geometry(*modules.named(self.pool))
            return run_stem(x, last._replace(act=self.act), geometry, schedule=schedule)
        z = run_chain(x, layers, shortcut=self._shortcut(modules, values, layers), act=self.act, schedule=schedule)
        if self.typed_as is not None:
            z = z.to(values[self.typed_as].dtype if self.typed_as >= 0 else contraction_dtype(x))
        return z

    def _shortcut(self, modules: Modules, values: Values, layers: Sequence[Layer]) -> Shortcut:
        if self.projection is not None:
            return Projection(layer_of(modules.pair(self.projection.conv, self.projection.norm)))
        if self.residual is None:
            return NO_SHORTCUT
        x = values[self.x]
        height, width = x.shape[2:]
        for layer in layers:
            height, width = layer.geometry.output_size(height, width, layer.window)
        residual = self.summand(values, (x.shape[0], layers[-1].weight.shape[0], height, width))
        return Identity() if self.residual == self.x else Residual(residual)


@dataclass(frozen=True)
class NormStep(FusedStep):
    """act(bn(x) + residual), or act(bn(x) + bn'(residual)).

    Attributes:
        norm: place of the batch norm.
        residual_norm: place of the batch norm of the residual, or None.
    """

    norm: int = 0
    residual_norm: int | None = None

    def lone(self, modules: Modules) -> tuple[Named, ...]:
        norms = (self.norm,) if self.residual_norm is None else (self.norm, self.residual_norm)
        return tuple(modules.named(place) for place in norms)

    def fused(self, modules: Modules, values: Values, schedule: str) -> Tensor:
        x = values[self.x]
        residual = self.summand(values, x.shape)
        other = None if self.residual_norm is None else norm_of(modules.found[self.residual_norm])
        return run_bn_act(x, norm_of(modules.found[self.norm]), self.act, residual=residual, residual_norm=other)


@dataclass(frozen=True)
class PReLUStep(NormStep):
    """prelu(bn(x)), whose slopes are parameters of the module in the place ``slope``."""

    slope: int = 0

    def why_not(self, modules: Modules) -> str | None:
        # The reading tells of what it does not look into nothing but that it is there.
        name, module = modules.named(self.slope)
        other = type(module) is not nn.PReLU
        return super().why_not(modules) or (f"{name} is a {type(module).__name__}, not a PReLU" if other else None)

    def fused(self, modules: Modules, values: Values, schedule: str) -> Tensor:
        slope = tensor_of("weight", modules.found[self.slope])
        if slope is None:
            raise NotFusable("a PReLU has no weight")
        return run_bn_prelu(values[self.x], norm_of(modules.found[self.norm]), slope)


@dataclass(frozen=True)
class SumStep(FusedStep):
    """act(x + residual)."""

    def fused(self, modules: Modules, values: Values, schedule: str) -> Tensor:
        x = values[self.x]
        residual = self.summand(values, x.shape)
        assert residual is not None
        return add_act(x, residual, act=self.act)


def filled(template: Any, values: Values) -> Any:
    """What a template is with values in the place of their places: lists that may be written to, which fx's may not."""
    if type(template) is Place:
        return values[template.place]
    if isinstance(template, tuple):
        parts = [filled(part, values) for part in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    if isinstance(template, list):
        return [filled(part, values) for part in template]
    if isinstance(template, dict):
        return {name: filled(part, values) for name, part in template.items()}
    if isinstance(template, slice):
        return slice(*(filled(part, values) for part in (template.start, template.stop, template.step)))
    return template


def with_frees(steps: Sequence[Step], kept: Sequence[int]) -> tuple[Step, ...]:
    """Steps, each with the places of the values of which it is the last user; ``kept`` are needed at the end."""
    needed, seen, behind = set(kept), set(kept), []
    for step in reversed(steps):
        inside = {node.out for node in step.nodes}
        taken = {place for node in step.nodes for place in places_of((node.args, node.kwargs))} - inside
        step = replace(step, frees=tuple(sorted(taken - needed)))
        if isinstance(step, FusedStep):
            step = replace(step, seen=step.out in seen)
        else:
            seen |= taken
        behind.append(step)
        needed |= taken
    return tuple(reversed(behind))


def places_of(argument: Any) -> list[int]:
    """Where the values stand that an argument of a node is made of."""
    found: list[int] = []

    def note(part: Any) -> Any:
        if type(part) is Place:
            found.append(part.place)
        return part

    fx.node.map_aggregate(argument, note)
    return found
