"""Fused forward passes for live modules, mixed into subclasses of the modules they serve."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..autocast import contraction_dtype
from ..autograd import GlobalPool
from ..chain import run_chain, run_stem
from ..inference import forget
from ..launch import left_to_library
from ..plan import AUTO
from .parts import (
    BlockParts,
    NotFusable,
    Pair,
    StemParts,
    layer_of,
    residual_parts,
    stem_parts,
    why_not,
    why_not_others,
    why_not_pairs,
)


class Fused(nn.Module):
    """A mixin before a module's own class: fused where that is possible at this call, else the plain forward.

    The parameters, buffers, names and state dict are those of the plain class; only ``__class__`` differs.
    """

    fused_schedule: str = AUTO
    """The schedule asked for; what `fuse` sets on the instance."""

    def fused_convs(self) -> tuple[nn.Module, ...]:
        """Every convolution that the fused pass runs.

        Raises:
            NotFusable: with the reason.
        """
        raise NotImplementedError

    def goes_plain(self, x: Any) -> bool:
        """Whether a call runs the plain modules: it is `traced`, there is nothing to compute, or ``"auto"`` has nothing
        better on this GPU."""
        return traced(x) or not x.numel() or (self.fused_schedule == AUTO and left_to_library(x))

    def train(self, mode: bool = True) -> Any:
        # Writes through .data are not counted by torch; a change of mode is where a stale cache would show.
        try:
            for conv in self.fused_convs():
                forget(conv.weight)  # type: ignore[arg-type]
        except NotFusable:
            pass
        return super().train(mode)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: a module of the plain class with the same parameters and buffers."""
        plain = next(of for of in type(self).__mro__ if issubclass(of, nn.Module) and not issubclass(of, Fused))
        return twin_of_class(self, plain)


def twin_of_class(module: nn.Module, of: type[nn.Module]) -> nn.Module:
    """A module of another class that shares everything with this one but the tables of who is whose child.

    `torch.jit.script` puts what fused modules are to be compiled as into those tables.
    """
    twin: nn.Module = of.__new__(of)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("fused_schedule", None)
    twin.__dict__["_modules"] = {name: _with_own_children(child) for name, child in module._modules.items()}
    return twin


def _with_own_children(module: nn.Module | None) -> nn.Module | None:
    """A module itself, where it is prepared for scripting as a whole or holds nothing that is."""
    if module is None or hasattr(module, "__prepare_scriptable__"):
        return module
    holds = any(hasattr(inner, "__prepare_scriptable__") for inner in module.modules())
    return twin_of_class(module, type(module)) if holds else module


def traced(x: Any) -> bool:
    """Whether somebody reads the forward pass, transforms it, or waits for every module's call: they get the plain
    modules."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True  # who compiles is not to see what follows
    transforms = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    return transforms or _has_any_global_hook()


def _is_unseen(x: Tensor) -> bool:
    """Whether nobody but a fused pass is given the gradient at ``x``, as far as can be told from here."""
    made_by = getattr(x.grad_fn, "_forward_cls", None)
    ours = x.grad_fn is None or (made_by is not None and made_by.__module__.startswith("fusedres."))
    return ours and not x._backward_hooks and not x.retains_grad


def pooled(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; where it is global average pooling, with a gradient that is not written out."""
    global_ = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
    fits = global_ and not traced(x) and x.dim() == 4 and not left_to_library(x)
    if not fits or not _is_unseen(x) or why_not_others([("avgpool", module)]) is not None:
        plain: Tensor = module(x)
        return plain
    z: Tensor = GlobalPool.apply(x)
    return z


class FusedBlock(Fused):
    """A residual block (or a single conv-BN-act) as one autograd node."""

    adds_in_place = False
    """Whether the plain block adds its shortcut to what it is added to, so that autocast's dtype stays."""

    def fused_parts(self) -> BlockParts:
        """The block taken apart.

        Raises:
            NotFusable: with the reason.
        """
        raise NotImplementedError

    def checked_parts(self) -> BlockParts:
        """`fused_parts`, every one of them of a kind that the fused pass replaces.

        Raises:
            NotFusable: with the reason.
        """
        parts = self.fused_parts()
        reason = why_not(parts)
        if reason is not None:
            raise NotFusable(reason)
        return parts

    def fused_convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.checked_parts().pairs)

    def forward(self, x: Tensor, *, hands_over: bool = False) -> Tensor:
        """The block; ``hands_over`` is what a `FusedStage` says of blocks that are a chain."""
        if not self.goes_plain(x):
            try:
                parts = self.checked_parts()
            except NotFusable:
                pass
            else:
                return self._run_chain(x, parts, hands_over=True) if hands_over else self._run(x, parts)
        plain: Tensor = super().forward(x)
        return plain

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        return self._run_chain(x, parts)

    def _run_chain(self, x: Tensor, parts: BlockParts, *, gain: float = 1.0, hands_over: bool = False) -> Tensor:
        """The block's chain with its own shortcut; ``gain`` multiplies the last batch norm's output."""
        *inner, last = (layer_of(pair) for pair in parts.chain)
        projection = None if parts.projection is None else layer_of(parts.projection)
        shortcut, residual = parts.shortcut, None
        if projection is not None and parts.pool is not None:
            residual = run_chain(parts.pool(x), [projection], act=None, schedule=self.fused_schedule)
            shortcut, projection = "residual", None
        z = run_chain(
            x,
            [*inner, last if gain == 1 else last._replace(gain=gain)],
            projection=projection,
            shortcut=shortcut,
            residual=residual,
            zero_pad_stride=parts.zero_pad_stride,
            act=parts.act,
            schedule=self.fused_schedule,
            hands_over=hands_over,
        )
        return z.to(contraction_dtype(x)) if self.adds_in_place else z


class FusedBasicBlock(FusedBlock):
    """conv1 bn1 relu conv2 bn2 + shortcut, relu."""

    def fused_parts(self) -> BlockParts:
        return residual_parts(self, 2)


class FusedBottleneck(FusedBlock):
    """conv1 bn1 relu conv2 bn2 relu conv3 bn3 + shortcut, relu."""

    def fused_parts(self) -> BlockParts:
        return residual_parts(self, 3)


class FusedConvBNAct(FusedBlock):
    """conv bn act, no shortcut."""

    def fused_parts(self) -> BlockParts:
        modules = self._modules
        pair = Pair(modules["conv"], modules["bn"], "conv", "bn")  # type: ignore[arg-type]
        return BlockParts((pair,), None, "none", self.act, (1, 1), ())  # type: ignore[arg-type]


class FusedStem(Fused):
    """A network whose conv1, bn1, relu and maxpool (if it has one) run as one autograd node."""

    stem_relu = "relu"
    """What its ReLU is called."""

    def checked_stem(self) -> StemParts:
        """The stem taken apart, every part of a kind that the fused pass replaces.

        Raises:
            NotFusable: with the reason.
        """
        parts = stem_parts(self, self.stem_relu)
        reason = why_not_pairs(parts.pairs) or why_not_others(parts.others)
        if reason is not None:
            raise NotFusable(reason)
        return parts

    def fused_convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.checked_stem().pairs)

    def stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x))))."""
        if not self.goes_plain(x):
            try:
                parts = self.checked_stem()
            except NotFusable:
                pass
            else:
                return self._run_stem(x, parts)
        for name in ("conv1", "bn1", self.stem_relu, "maxpool"):
            part = self._modules.get(name)
            x = x if part is None else part(x)
        return x

    def _run_stem(self, x: Tensor, parts: StemParts) -> Tensor:
        if parts.before:
            x = run_chain(x, [layer_of(pair) for pair in parts.before], schedule=self.fused_schedule)
        layer = layer_of(parts.pair)
        if parts.pool is None:
            return run_chain(x, [layer], schedule=self.fused_schedule)
        return run_stem(x, layer, parts.pool, schedule=self.fused_schedule)
