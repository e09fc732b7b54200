"""Which nodes of a forward that was read are done by a fused pass."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fusedres.activation import IDENTITY, Activation, activation_of, activation_of_function
from fusedres.nn.kinds import Kind, is_depthwise, kind_of
from fusedres.nn.parts import why_not_conv
from fusedres.nn.reading import Reading
from fusedres.nn.steps import (
    ChainStep,
    FusedStep,
    LayerPlace,
    NormStep,
    Place,
    PlainNode,
    PReLUStep,
    Step,
    SumStep,
    places_of,
    with_frees,
)

Node = fx.Node


@dataclass(frozen=True)
class Match:
    """A forward as steps.

    Attributes:
        steps: in order.
        result: what the forward gives, made of `Place`.
        crossed: the paths of modules of which a fused pass does a part, beside a part of what is outside of them.
    """

    steps: tuple[Step, ...]
    result: Any
    crossed: frozenset[str]

    @property
    def fused(self) -> tuple[FusedStep, ...]:
        return tuple(step for step in self.steps if isinstance(step, FusedStep))

    @property
    def adds(self) -> bool:
        """Whether anything is added in a fused pass."""
        return any(
            step.residual is not None or (isinstance(step, ChainStep) and step.projection is not None)
            for step in self.fused
        )


def match(reading: Reading, modules: Sequence[nn.Module]) -> Match:
    """The fused passes for what a forward computes, each as long as it can be.

    Args:
        reading: of the forward.
        modules: those in the places of what was seen.
    """
    return _Matcher(reading, modules).match()


_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def is_in_place(node: Node, module: nn.Module | None) -> bool:
    """Whether a node writes over what it takes."""
    if node.op == "call_module":
        return getattr(module, "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    written = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
    return written or node.target in _IN_PLACE or (activation_at(node) is not None and node.args[-1] is True)


def activation_at(node: Node) -> Activation | None:
    """What a call of a function or method computes, if it is an activation."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    return activation_of_function(node.target, node.args[1:], node.kwargs)


class _Matcher:
    def __init__(self, reading: Reading, modules: Sequence[nn.Module]) -> None:
        self.reading, self.modules = reading, modules
        self.order = {node: i for i, node in enumerate(reading.nodes)}
        self.calls = Counter(str(node.target) for node in reading.nodes if node.op == "call_module")
        self.segments: list[tuple[list[Node], FusedStep]] = []
        self.used: set[Node] = set()
        self._follow_writes()

    def _follow_writes(self) -> None:
        """Who reads a value that was written over reads what was written."""
        for node in self.reading.nodes:
            if node.args and isinstance(node.args[0], Node) and is_in_place(node, self.module(node)):
                at = self.order[node]
                node.args[0].replace_all_uses_with(node, lambda user, at=at: self.order[user] > at)  # type: ignore[misc]

    def module(self, node: Any) -> nn.Module | None:
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        return self.modules[self.place(node)]

    def place(self, node: Node) -> int:
        return self.reading.paths[str(node.target)]

    def kind(self, node: Any) -> Kind | None:
        module = self.module(node)
        once = module is not None and self.calls[str(node.target)] == 1 and len(node.args) == 1 and not node.kwargs
        return kind_of(module) if once and module is not None else None

    def sole_user(self, node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def conv_before(self, norm: Node) -> Node | None:
        """The convolution whose output this batch norm alone takes, if a fused pass computes it."""
        conv = norm.args[0]
        if self.kind(conv) is not Kind.CONV or not isinstance(conv, Node) or self.sole_user(conv) is not norm:
            return None
        if self.prelu_behind(norm) is not None:
            return None  # whose pass starts with the batch norm
        module: Any = self.module(conv)
        return conv if why_not_conv("", module) is None and not is_depthwise(module) else None

    def is_norm(self, node: Any) -> bool:
        if self.kind(node) is Kind.NORM:
            return True
        # In the place of a batch norm that was folded into the convolution before it.
        return self.kind(node) is Kind.IDLE and type(self.module(node)) is nn.Identity and bool(self.conv_before(node))

    def act_behind(self, node: Node) -> tuple[Node, Activation] | None:
        """The activation that alone takes what a node gives."""
        user = self.sole_user(node)
        if user is None or not user.args or user.args[0] is not node:
            return None
        module = self.module(user)
        if module is not None:
            act = activation_of(module) if self.kind(user) is Kind.ACT else None
        else:
            act = activation_at(user)
        return None if act is None else (user, act)

    def prelu_behind(self, norm: Node) -> Node | None:
        """The PReLU that alone takes what a batch norm gives."""
        user = self.sole_user(norm)
        module = self.module(user)
        once = user is not None and self.calls[str(user.target)] == 1 and user.args == (norm,) and not user.kwargs
        return user if once and type(module) is nn.PReLU else None

    def match(self) -> Match:
        ends = {layers[-1].last: layers for layers in self._chains()}
        for node in self.reading.nodes:
            if self._is_sum(node):
                self._add(node, ends)
        for node, layers in ends.items():
            if node not in self.used:
                self._take(layers, None, None)
        return self._result()

    def _chains(self) -> Iterator[list[_Layer]]:
        """Lone batch norms, and layers behind each other of which nobody else sees what is between."""
        layers = {}
        for node in self.reading.nodes:
            if self.is_norm(node):
                layer = _Layer(self.conv_before(node), node, *(self.act_behind(node) or ()))
                if layer.conv is None:
                    yield [layer]
                else:
                    layers[layer.conv] = layer
        following = {}
        for layer in layers.values():
            user = self.sole_user(layer.last)
            if user in layers and user is not None:
                following[layer.norm] = layers[user]
        behind = {layer.norm for layer in following.values()}
        for layer in layers.values():
            if layer.norm not in behind:
                chain = [layer]
                while chain[-1].norm in following:
                    chain.append(following[chain[-1].norm])
                yield chain

    def _is_sum(self, node: Node) -> bool:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS or node.kwargs:
            return False
        operands = node.args
        # A parameter is the same for every image, and PyTorch has to make it as large as what it is added to.
        return (
            len(operands) == 2
            and operands[0] is not operands[1]
            and all(isinstance(o, Node) and o.op != "get_attr" for o in operands)
        )

    def _add(self, node: Node, ends: dict[Node, list[_Layer]]) -> None:
        """A sum: with the chain or batch norm that gives one of its operands, or with its activation alone."""
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        # Without an activation of their own.
        free = [o for o in (left, right) if o in ends and o not in self.used and self.is_norm(o)]
        ours = [o for o in free if self.sole_user(o) is node]
        written = node.target in (operator.iadd, "add_")
        # A value that somebody else may hold has to be written over, as it was.
        if written and left not in ours and (left.op == "placeholder" or len(left.users) > 1):
            return
        if not ours:
            act = self.act_behind(node)
            if act is not None:
                self._keep([node, act[0]], SumStep((), x=self.order[left], residual=self.order[right], act=act[1]))
            return
        main = max(ours, key=lambda o: (ends[o][0].conv is not None, len(ends[o]), o is left))
        other = right if main is left else left
        beside = ends[other] if other in ours else None
        if beside is not None and not self._joins(ends[main], beside):
            self._take(beside, None, None)
            beside = None
        typed = None
        if written:
            typed = -1 if main is left or beside is not None else self.order[other]
        self._take(ends[main], node, other, beside, typed)

    def _joins(self, main: list[_Layer], beside: list[_Layer]) -> bool:
        """Whether one pass does what stands beside a chain, too: a layer on the same input, or a batch norm each."""
        if main[0].conv is None:
            return beside[0].conv is None
        return beside[0].conv is not None and len(beside) == 1 and beside[0].x is main[0].x

    def _take(
        self, layers: list[_Layer], added: Node | None, other: Node | None, beside: list[_Layer] | None = None,
        typed: int | None = None,
    ) -> None:  # fmt: skip
        last = layers[-1]
        prelu = self.prelu_behind(last.norm)
        if prelu is not None:
            before, lone = self.order[last.x], self.place(last.norm)
            self._keep([last.norm, prelu], PReLUStep((), x=before, norm=lone, slope=self.place(prelu)))
            return
        nodes = [node for layer in (*layers, *(beside or ())) for node in layer.nodes]
        end = last.act
        if added is not None:
            act = self.act_behind(added)
            end = IDENTITY if act is None else act[1]
            nodes += [added] if act is None else [added, act[0]]
        residual = None if other is None or beside is not None else self.order[other]
        if last.conv is None:
            both = None if beside is None else beside[0]
            joined = residual if both is None else self.order[both.x]
            norm = None if both is None else self.place(both.norm)
            step: FusedStep = NormStep(
                (), act=end, x=self.order[last.x], norm=self.place(last.norm), residual=joined, residual_norm=norm
            )
        else:
            places = tuple(self._layer_place(layer) for layer in layers)
            projection = None if beside is None else self._layer_place(beside[0])
            step = ChainStep(
                (), act=end, x=self.order[layers[0].x], layers=places, projection=projection, residual=residual,
                typed_as=typed,
            )  # fmt: skip
            pool = self._pool_behind(nodes) if added is None else None
            if pool is not None:
                nodes.append(pool)
                step = replace(step, pool=self.place(pool))
        self._keep(nodes, step)

    def _layer_place(self, layer: _Layer) -> LayerPlace:
        assert layer.conv is not None
        return LayerPlace(self.place(layer.conv), self.place(layer.norm), layer.act)

    def _pool_behind(self, nodes: list[Node]) -> Node | None:
        last = max(nodes, key=self.order.__getitem__)
        user = self.sole_user(last)
        module = self.module(user)
        found = type(module) is nn.MaxPool2d and user is not None and user.args == (last,) and not user.kwargs
        return user if found else None

    def _keep(self, nodes: list[Node], step: FusedStep) -> None:
        ordered = sorted(nodes, key=self.order.__getitem__)
        layers = (Kind.CONV, Kind.NORM, Kind.IDLE)
        called = [node for node in ordered if node.op == "call_module" and self.kind(node) not in layers]
        self.segments.append((ordered, replace(step, others=tuple(map(self.place, called)))))
        self.used.update(ordered)

    def _result(self) -> Match:
        ends = {nodes[-1]: (nodes, step) for nodes, step in self.segments}
        steps: list[Step] = []
        result: Any = None
        for node in self.reading.nodes:
            if node.op == "output":
                result = self._argument(node.args[0])
            elif node in ends:
                nodes, step = ends[node]
                steps.append(replace(step, nodes=tuple(self._plain(each) for each in nodes)))
            elif node.op != "placeholder" and node not in self.used:
                steps.append(Step((self._plain(node),)))
        kept = places_of(result)
        crossed = {path for nodes, _ in self.segments for path in _crossed_by(nodes)}
        return Match(with_frees(steps, kept), result, frozenset(crossed))

    def _plain(self, node: Node) -> PlainNode:
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        target: Any = node.target
        names: tuple[str, ...] = ()
        if node.op == "call_module":
            target = self.place(node)
            if len(args) == 1 and kind_of(self.modules[target]) is Kind.NORM:
                return PlainNode("norm", target, args, kwargs, self.order[node])
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            target, names = self.reading.paths[path], (name,)
        return PlainNode(node.op, target, args, kwargs, self.order[node], names)

    def _argument(self, argument: Any) -> Any:
        at: Any = lambda node: Place(self.order[node])  # noqa: E731
        return fx.node.map_arg(argument, at)


@dataclass(frozen=True)
class _Layer:
    """A batch norm, the convolution before it and the activation behind it."""

    conv: Node | None
    norm: Node
    act_node: Node | None = None
    act: Activation = IDENTITY

    @property
    def x(self) -> Node:
        first = (self.conv or self.norm).args[0]
        assert isinstance(first, Node)
        return first

    @property
    def last(self) -> Node:
        return self.act_node or self.norm

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for node in (self.conv, self.norm, self.act_node) if node is not None)


def _crossed_by(nodes: Sequence[Node]) -> set[str]:
    """The inlined modules that have some of these nodes, but not all."""
    within = [set(node.meta["within"]) for node in nodes]
    return set.union(*within) - set.intersection(*within)
