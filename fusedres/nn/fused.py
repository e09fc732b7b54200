"""The mixin of every fused class, placed before a module's own class: fused where possible at a call, else plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusedres.context import context
from fusedres.nn.in_graph import Path, Told, in_graph, told_of
from fusedres.nn.norms import group_of
from fusedres.nn.parts import NotFusable, Pair, why_not_others, why_not_pairs
from fusedres.nn.patched import Watch, watches_of, why_overridden, why_patched
from fusedres.nn.scripting import twin_of_class
from fusedres.nn.size_rule import too_small
from fusedres.nn.tracing import is_read, is_traced
from fusedres.patterns.choose import AUTO
from fusedres.patterns.online import Online
from fusedres.runtime import switches
from fusedres.runtime.collectives import is_one_of_several
from fusedres.runtime.fallback import attempt
from fusedres.runtime.graphs import launches
from fusedres.runtime.launch import left_to_library
from fusedres.runtime.plans import Chosen
from fusedres.runtime.text import Untold
from fusedres.runtime.torch_private import constant_to_compilers


class Parts(Protocol):
    """A module taken apart, for a fused pass."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Convolutions with a batch norm behind them."""

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        """Every convolution that the pass runs."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """Every batch norm, whose statistics it may move."""

    @property
    def others(self) -> tuple[tuple[str, nn.Module], ...]:
        """What the plain forward calls besides, by name, and the fused pass does not."""


PartsFunction = Callable[[Any], Parts]
"""Takes a module of a plain class apart, every part of a kind that the fused pass replaces; else raises `NotFusable`
with the reason."""


def plain_base(cls: type) -> type[nn.Module] | None:
    """The plain class behind a fused one, if it has one already."""
    plain = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Fused))
    found = next(plain, nn.Module)
    return None if found is nn.Module else found


class Fused(nn.Module):
    """A mixin before a module's own class: fused where that is possible at this call, else the plain forward.

    The parameters, buffers, names and state dict are those of the plain class; only ``__class__`` differs. A class has
    ``fused_parts``, which takes a module apart, and ``fused_pass``, which runs on what that gives.
    """

    fused_parts: PartsFunction

    fused_by_structure = False
    """Whether its passes are what its own forward tells, and not what its class is known for."""

    fused_schedule: str = AUTO
    """The schedule asked for; what `fuse` sets on the instance."""

    fused_name: str = ""
    """Where it stood in the model that was fused."""

    fused_plan: Chosen | None = None
    """The plan that the model was fused with; None: the user's own for the GPU at hand, if there is one."""

    fused_online: Online | None = None
    """What measures choices while the model trains, one for all of a model's modules."""

    fused_choices: Mapping[str, str] = {}
    """What ``"auto"`` took in calls since the model was fused, and whether that was measured or predicted."""

    fused_failure: str | None = None
    """Why no kernel is tried any more; set on the instance where one could not be started."""

    fused_reordered: tuple[int, ...] | None = None
    """Strides of the last gradient that arrived in another layout than channels_last, and was copied."""

    fused_weights: int | None = None
    """How many weights its convolutions had: by them ``"auto"`` tells on a CPU whether a call is worth a fused pass."""

    fused_prepared: tuple[Any, ...] = ()
    """Of a network: the kinds of passes whose binaries were compiled before they ran."""

    fused_watches: tuple[Watch, ...] = ()
    """The plain code that the fused pass stands for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = plain_base(cls)
        if plain is not None:
            cls.fused_watches = watches_of(plain)

    @classmethod
    def parts_of(cls, module: nn.Module) -> Any:
        """The `Parts` of a module of the plain class or of this one.

        Raises:
            NotFusable: with the reason.
        """
        parts = cls.fused_parts(module)
        reason = why_not_pairs(parts.pairs) or why_not_others(parts.others)
        if reason is not None:
            raise NotFusable(reason)
        return parts

    def fused_pass(self, x: Tensor, parts: Any) -> Tensor:
        """The fused pass."""
        raise NotImplementedError

    def fused_or(self, plain: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
        """`fused_pass` with these options, or ``plain(x)`` where that can not be now."""
        parts = self.parts_now(x)
        run = partial(self.fused_pass, **options) if options else self.fused_pass
        z = None if parts is None else self.attempt(parts, run, x, parts)
        return plain(x) if z is None else z

    def fused_prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out what takes the values of tensors, before a call with such arguments is put into a graph."""

    @constant_to_compilers
    def fused_told(self) -> Told | None:
        """What a compiler is told of the module, that goes through its code; None: that it runs the plain modules."""
        return None if type(self).why_plain(self) is not None else told_of(self, self.fused_paths())

    def fused_paths(self) -> tuple[Path, ...]:
        """Which of the modules below it its fused passes stand for."""
        return ((),)

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
        """Whether a call runs the plain modules: somebody traces it, there is nothing to compute and nobody who waits
        for it, or ``"auto"`` has nothing better on this GPU."""
        if switches.DISABLED or self.fused_failure is not None or is_traced(x):
            return True
        if not x.numel() and (x.shape[:1].numel() or not is_one_of_several()):
            return True
        return self.fused_schedule == AUTO and left_to_library(x)

    def parts_now(self, x: Any) -> Any:
        """The module taken apart for a call on ``x``; None: it runs the plain modules."""
        auto = self.fused_schedule == AUTO
        # Asked first, of what the block weighed the last time: where little is computed, asking is felt.
        known = self.fused_weights
        if auto and known is not None and not is_read() and not is_one_of_several() and too_small(x, known):
            return None
        if self.goes_plain(x) or why_patched(self.fused_watches) is not None:
            return None
        try:
            parts = self.parts_of(self)
        except NotFusable:
            return None
        folded = any(type(norm) is nn.Identity for norm in parts.norms)
        if any(group_of(norm) is not None for norm in parts.norms):
            # Whatever the size of its batch, a process does what the others do.
            return parts
        if not x.numel():
            return None
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
            own = {"plan": self.fused_plan, "online": self.fused_online}
            with context(**own) if self.fused_plan or self.fused_online else nullcontext():
                return attempt(self, written, lambda: run(*args), kernels=launches(x))
        except (NotFusable, Untold):  # before anything was launched: tensors of a kind that passes do not take
            return None

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: a module of the plain class with the same parameters and buffers."""
        return twin_of_class(self, plain_base(type(self)) or type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that can not be found by its name is found by what makes it.
        made_by = type(self).__dict__.get("fused_made_by")
        reduced: Any = super().__reduce_ex__(protocol)
        return reduced if made_by is None else (_remade, made_by, *reduced[2:])


class FusedPass(Fused):
    """A module whose whole forward is one fused pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_or_plain(x)

    def fused_or_plain(self, x: Tensor, **options: Any) -> Tensor:
        """`fused_pass` with these options, or the plain forward where that can not be now."""
        if torch.compiler.is_dynamo_compiling():
            return in_graph(self, "fused_or_plain", super().forward, x)
        return self.fused_or(super().forward, x, **options)


def fused_type(
    mixin: type[Fused], plain: type[nn.Module], parts: PartsFunction | None = None, *, name: str = "", **own: Any
) -> type[Fused]:
    """The fused class of a plain one.

    Args:
        mixin: what computes.
        plain: the plain class.
        parts: takes a module of the plain class apart; the mixin's own if not given.
        name: of the class.
        own: its other attributes.
    """
    if parts is not None:
        own["fused_parts"] = staticmethod(parts)
    own = {"__module__": plain.__module__, "__doc__": plain.__doc__, **own}
    return type(name or f"Fused{plain.__name__}", (mixin, plain), own)


def _remade(maker: Callable[..., type[nn.Module]], *made_of: Any) -> nn.Module:
    cls = maker(*made_of)
    return cls.__new__(cls)
