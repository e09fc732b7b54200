"""Fused forward passes for live modules, mixed into subclasses of the modules they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .. import backends, switches
from ..autocast import contraction_dtype
from ..autograd import GlobalPool
from ..chain import run_chain, run_stem
from ..contact import attempt
from ..launch import left_to_library, wants_kernels
from ..plan import AUTO
from .genuine import Watch, watched, why_overridden, why_patched
from .parts import (
    PLAIN_TENSORS,
    BlockParts,
    NotFusable,
    StemParts,
    layer_of,
    pair_of,
    residual_parts,
    stem_parts,
    why_not,
    why_not_others,
    why_not_pairs,
)

OF_INSTANCES = ("fused_schedule", "fused_failure", "fused_reordered", "fused_weights")
"""What fused modules have of their own, beside their class."""


def plain_base(cls: type) -> type[nn.Module] | None:
    """The plain class behind a fused one, if it has one already."""
    plain = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Fused))
    found = next(plain, nn.Module)
    return None if found is nn.Module else found


class Fused(nn.Module):
    """A mixin before a module's own class: fused where that is possible at this call, else the plain forward.

    The parameters, buffers, names and state dict are those of the plain class; only ``__class__`` differs.
    """

    fused_schedule: str = AUTO
    """The schedule asked for; what `fuse` sets on the instance."""

    fused_failure: str | None = None
    """Why no kernel is tried any more; set on the instance where one could not be started."""

    fused_reordered: tuple[int, ...] | None = None
    """Strides of the last gradient that arrived in another layout than channels_last, and was copied."""

    fused_weights: int | None = None
    """How many weights its convolutions had: by them ``"auto"`` tells on a CPU whether a call is worth a fused pass."""

    fused_watches: tuple[Watch, ...] = ()
    """The plain code that the fused pass stands for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = plain_base(cls)
        if plain is not None:
            cls.fused_watches = watched(plain)

    @classmethod
    def parts_of(cls, module: nn.Module) -> Any:
        """A module of the plain class or of this one taken apart, every part of a kind that the fused pass replaces;
        what is given has ``convs``, the convolutions that it runs, ``norms``, whose statistics it may move, and
        ``pairs`` of both where they follow each other.

        Raises:
            NotFusable: with the reason.
        """
        raise NotImplementedError

    @classmethod
    def why_plain(cls, module: nn.Module) -> str | None:
        """Why the next call of a module of this class would run the plain forward, or None."""
        if switches.DISABLED:
            return "FUSEDRES_DISABLE is set"
        failure = module.__dict__.get("fused_failure")
        if failure is not None:
            return str(failure)
        reason = why_overridden("", module) or why_patched(cls.fused_watches)
        if reason is not None:
            return reason
        try:
            cls.parts_of(module)
        except NotFusable as why:
            return str(why)
        return None

    def goes_plain(self, x: Any) -> bool:
        """Whether a call runs the plain modules: it is `traced`, there is nothing to compute, or ``"auto"`` has nothing
        better on this GPU."""
        if switches.DISABLED or self.fused_failure is not None or traced(x) or not x.numel():
            return True
        return self.fused_schedule == AUTO and left_to_library(x)

    def parts_now(self, x: Any) -> Any:
        """The module taken apart for a call on ``x``; None: it runs the plain modules."""
        auto = self.fused_schedule == AUTO
        # Asked first, of what the block weighed the last time: where little is computed, asking is felt.
        known = self.fused_weights
        if auto and known is not None and not _is_read() and too_small(x, known):
            return None
        if self.goes_plain(x) or why_patched(self.fused_watches) is not None:
            return None
        try:
            parts = self.parts_of(self)
        except NotFusable:
            return None
        folded = any(type(norm) is nn.Identity for norm in parts.norms)
        if auto and x.device.type == "cpu":
            self.fused_weights = sum(conv.weight.numel() for conv in parts.convs)
            # Evaluation gains by folding, which each pass would have to do anew: within noise of nothing, or less.
            gains = folded or self.training or torch.is_grad_enabled()
            if too_small(x, self.fused_weights if gains else 0):
                return None
        # Without a batch norm there is inference alone.
        if folded and torch.is_grad_enabled() and (x.requires_grad or parts.convs[0].weight.requires_grad):
            return None
        return parts

    def attempt(self, parts: Any, run: Callable[..., Tensor], *args: Any) -> Tensor | None:
        """``run(*args)``, the fused pass; None, with nothing changed, where it could not be: the plain one is due."""

        def written() -> list[Tensor]:
            return [buffer for norm in parts.norms for buffer in norm.buffers()]

        try:
            x: Tensor = args[0]
            return attempt(self, written, lambda: run(*args), kernels=wants_kernels(x) and not x.is_meta)
        except NotFusable:  # before anything was launched: tensors of a kind that passes do not take
            return None

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: a module of the plain class with the same parameters and buffers."""
        return twin_of_class(self, plain_base(type(self)) or type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made by `fused_subclass` are found by what they were made of.
        made_of = type(self).__dict__.get("fused_made_of")
        reduced: Any = super().__reduce_ex__(protocol)
        return reduced if made_of is None else (_remade, made_of, *reduced[2:])


class FusedPass(Fused):
    """A module whose whole forward is one fused pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_or_plain(x, self._run)

    def fused_or_plain(self, x: Tensor, run: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """``run(x, parts)``, or the plain forward where that can not be now."""
        parts = self.parts_now(x)
        z = None if parts is None else self.attempt(parts, run, x, parts)
        if z is None:
            z = super().forward(x)
        return z

    def _run(self, x: Tensor, parts: Any) -> Tensor:
        """The fused pass."""
        raise NotImplementedError


def fused_subclass(fused: type[Fused], plain: type[nn.Module]) -> type[Fused]:
    """The fused class of ``plain``, which derives from the plain class of ``fused`` and computes as that does."""
    made_of: Any = (fused, plain)
    if made_of not in _made:
        own = {"fused_made_of": made_of, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _made[made_of] = type(f"Fused{plain.__name__}", (fused, plain), own)
    return _made[made_of]


_made: dict[Any, type[Fused]] = {}


def _remade(fused: type[Fused], plain: type[nn.Module]) -> Fused:
    cls = fused_subclass(fused, plain)
    return cls.__new__(cls)


def twin_of_class(module: nn.Module, of: type[nn.Module]) -> nn.Module:
    """A module of another class that shares everything with this one but the tables of who is whose child.

    `torch.jit.script` puts what fused modules are to be compiled as into those tables.
    """
    twin: nn.Module = of.__new__(of)
    twin.__dict__.update(module.__dict__)
    for name in OF_INSTANCES:
        twin.__dict__.pop(name, None)
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
    if type(x) not in PLAIN_TENSORS or _is_read():
        return True  # who compiles is not to see what follows
    transforms = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    return transforms or _has_any_global_hook()


def _is_read() -> bool:
    """Whether a compiler or a tracer goes through the code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def traced_everywhere() -> str | None:
    """Why every module of the process runs as it is written now, or None."""
    return "a hook for all modules waits for every call" if _has_any_global_hook() else None


# On a CPU a fused block takes a tenth of a millisecond of Python more than its plain twin: where its convolutions
# multiply less than this for each thread (some 5 ms), that would be felt.
LEAST_WORK_PER_THREAD = 2**28


def too_small(x: Any, weights: int) -> bool:
    """Whether a block of so many ``weights`` is left to its plain modules on a CPU: a fused pass saves less than it
    costs."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dim() != 4 or backends.current() != "auto":
        return False
    n, _, h, w = x.shape
    return n * h * w * weights < LEAST_WORK_PER_THREAD * torch.get_num_threads()


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


class FusedBlock(FusedPass):
    """A residual block (or a single conv-BN-act) as one autograd node."""

    adds_in_place = False
    """Whether the plain block adds its shortcut to what it is added to, so that autocast's dtype stays."""

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        """The block taken apart.

        Raises:
            NotFusable: with the reason.
        """
        raise NotImplementedError

    @classmethod
    def parts_of(cls, module: nn.Module) -> BlockParts:
        parts = cls.blocks_parts(module)
        reason = why_not(parts)
        if reason is not None:
            raise NotFusable(reason)
        return parts

    def forward(self, x: Tensor, *, hands_over: bool = False) -> Tensor:
        """The block; ``hands_over`` is what `through` says of blocks that are a chain."""
        return self.fused_or_plain(x, self._run_on if hands_over else self._run)

    def _run(self, x: Tensor, parts: BlockParts) -> Tensor:
        return self._run_chain(x, parts)

    def _run_on(self, x: Tensor, parts: BlockParts) -> Tensor:
        return self._run_chain(x, parts, hands_over=True)

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

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        return residual_parts(block, 2)


class FusedBottleneck(FusedBlock):
    """conv1 bn1 relu conv2 bn2 relu conv3 bn3 + shortcut, relu."""

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        return residual_parts(block, 3)


class FusedConvBNAct(FusedBlock):
    """conv bn act, no shortcut."""

    @classmethod
    def blocks_parts(cls, block: Any) -> BlockParts:
        return BlockParts((pair_of(block, "conv", "bn"),), None, "none", block.act, (1, 1), ())


class FusedStem(Fused):
    """A network whose conv1, bn1, relu and maxpool (if it has one) run as one autograd node."""

    stem_relu = "relu"
    """What its ReLU is called."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> StemParts:
        parts = stem_parts(module, cls.stem_relu)
        reason = why_not_pairs(parts.pairs) or why_not_others(parts.others)
        if reason is not None:
            raise NotFusable(reason)
        return parts

    def stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x))))."""
        parts = self.parts_now(x)
        z = None if parts is None else self.attempt(parts, self._run_stem, x, parts)
        if z is not None:
            return z
        for name in ("conv1", "bn1", self.stem_relu, "maxpool"):
            part = getattr(self, name, None)
            x = x if part is None else part(x)
        return x

    def _run_stem(self, x: Tensor, parts: StemParts) -> Tensor:
        if parts.before:
            x = run_chain(x, [layer_of(pair) for pair in parts.before], schedule=self.fused_schedule)
        layer = layer_of(parts.pair)
        if parts.pool is None:
            return run_chain(x, [layer], schedule=self.fused_schedule)
        return run_stem(x, layer, parts.pool, schedule=self.fused_schedule)
