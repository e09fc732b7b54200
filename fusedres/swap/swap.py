"""fuse, unfuse: fused forward passes in and out of a live model by changing the class of its modules."""

import logging
import os
import warnings
from typing import Any, TypeVar

from torch import nn

from fusedres.nn.fused import Fused, plain_base
from fusedres.nn.norms import behind_norm
from fusedres.nn.parts import NotFusable, why_not_conv, why_not_norm
from fusedres.nn.scripting import OF_INSTANCES
from fusedres.nn.structured import structured_class
from fusedres.patterns.choose import AUTO, check_schedule
from fusedres.patterns.online import Online
from fusedres.runtime.plans import chosen_plan
from fusedres.swap.account import Account, is_counted
from fusedres.swap.registry import families, fused_again, fused_class
from fusedres.swap.structure import structured_modules

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger(__name__)


ONLINE = "online"
# What a module knows of its calls and its choices, which `fuse` lets it begin anew.
STARTED_ANEW = (
    "fused_failure", "fused_unread", "fused_plan", "fused_online", "fused_choices", "fused_prepared",
)  # fmt: skip


def check_model(model: nn.Module) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def fuse(
    model: Model, *, schedule: str = AUTO, plan: str | os.PathLike[str] | None = None, tune: str | None = None
) -> Model:
    """Give every residual block and stem that the library knows its fused forward pass, in place.

    A block is fused by changing its class to a subclass of its own: ``isinstance``, parameters, buffers, names and
    ``state_dict()`` stay as they are, and an optimizer made before goes on working. Whether a call takes the fused pass
    is decided at that call, by what the block is made of then: hooks, replaced parts or code, another kind of layer let
    it run its plain modules, and `report` says why. Fusing again changes nothing but the schedule, and lets kernels be
    tried again that could not be started.

    Args:
        model: any module; itself may be a block.
        schedule: ``"auto"`` (chosen per layer) or a rung of the ladder for all: ``"block_end"``, ``"stats"``,
            ``"prologue"``, ``"moments"``; ``"memory"``: what keeps fewest bytes for the backward pass.
        plan: a file that ``fusedres tune`` wrote, which ``"auto"`` goes by. Without one it goes by what was measured on
            this machine's GPU, if anything was, and else by what is predicted.
        tune: ``"online"``: measure while the model trains on a GPU. In its first steps each kind of block takes turns
            among eager PyTorch and the rungs, five times each; then the fastest stays. Every step's numbers are those
            of one rung or another. Off under deterministic algorithms, CUDA graphs' capture and torch.distributed.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is no module, the schedule or the way of tuning unknown, or the plan no file
            with one; nothing has changed then.
    """
    check_model(model)
    check_schedule(schedule)
    if tune not in (None, ONLINE):
        raise ValueError(f"tune: expected {ONLINE!r} or None, got {tune!r}")
    if tune is not None and schedule != AUTO:
        raise ValueError(f"tune: expected schedule={AUTO!r} with it, which leaves a choice, got {schedule!r}")
    own = {
        "fused_plan": None if plan is None else chosen_plan(plan),
        "fused_online": None if tune is None else Online(),
    }
    swap_classes(model, schedule)
    for module in model.modules():
        if isinstance(module, Fused):
            module.__dict__.update({name: value for name, value in own.items() if value is not None})
    fused = sum(isinstance(module, Fused) for module in model.modules())
    _log.info(
        "%s: %d modules are fused, schedule %s", (plain_base(type(model)) or type(model)).__name__, fused, schedule
    )
    _warn_of_nothing(model)
    return model


def swap_classes(model: Model, schedule: str) -> Model:
    """`fuse` without a word, of arguments that were checked."""
    for module in model.modules():
        by_class = isinstance(module, Fused) and not module.fused_by_structure
        plain = plain_class(type(module)) if by_class else type(module)
        fused = None if plain is None else fused_class(plain)
        if plain is not None and fused is not None and by_class != _fits(fused, module):
            _give_class(module, plain if by_class else fused)
    for module in list(structured_modules(model)):
        if not isinstance(module, Fused):
            _give_class(module, structured_class(type(module)))
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            module.fused_schedule, module.fused_name = schedule, name
            for own in STARTED_ANEW:
                module.__dict__.pop(own, None)
    return model


def _warn_of_nothing(model: nn.Module) -> None:
    """Say why nothing is fused where there are convolutions, and batch norms that passes might take."""
    modules = list(model.modules())
    wanted = any(isinstance(module, nn.Conv2d) for module in modules) and any(map(is_counted, modules))
    if wanted and not any(isinstance(module, Fused) for module in modules):
        first = next(norm for norm in Account(model).norms if norm.counted)
        name = type(model).__name__
        warnings.warn(
            f"fusedres.fuse: nothing of {name} is fused: {first.name}: {first.reason}; "
            "fusedres.report(model) says more",
            stacklevel=3,
        )  # fmt: skip


def _fits(fused: type[Fused], module: nn.Module) -> bool:
    """Whether a module is built as those that its class is known for; who waits for its calls may change later."""
    try:
        parts = fused.fused_parts(module)
    except NotFusable:
        return False
    if any(why_not_conv("", pair.conv) or why_not_norm("", pair.bn) for pair in parts.pairs):
        return False
    return all(type(inner) is nn.Identity for pair in parts.pairs for _, inner in behind_norm(pair.bn))


def _give_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def unfuse(model: Model) -> Model:
    """Give every fused module its plain class back, in place.

    Args:
        model: any module, fused or not.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is no module.
    """
    check_model(model)
    for module in model.modules():
        plain = plain_class(type(module))
        if plain is not None:
            for name in OF_INSTANCES:
                module.__dict__.pop(name, None)
            live: Any = module
            live.__class__ = plain
    return model


class Frozen:
    """A mixin before the class of a model that `freeze` made: it can not be trained."""

    def train(self, mode: bool = True) -> Any:
        """The model itself, which stays in evaluation mode.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                "train: expected mode=False, got True: this model was made by fusedres.freeze for inference alone; "
                "train the model that it was made of"
            )
        live: Any = super()
        return live.train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class behind this one may itself be one that was made, which is found by what it was made of.
        reduced: Any = super().__reduce_ex__(protocol)
        inner = type(self).__bases__[1]
        made_by = inner.__dict__.get("fused_made_by")
        return (_frozen_again, (inner, False) if made_by is None else (made_by[1], True), *reduced[2:])


def frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a frozen model of this one."""
    key: Any = cls
    if key not in _frozen:
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _frozen[key] = type(f"Frozen{cls.__name__}", (Frozen, cls), own)
    return _frozen[key]


_frozen: dict[Any, type[nn.Module]] = {}


def _frozen_again(cls: type[nn.Module], fused: bool) -> nn.Module:
    frozen = frozen_class(fused_again(cls) if fused else cls)
    return frozen.__new__(frozen)


def plain_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module of a fused class had before it was fused; None: it is no such class."""
    if not issubclass(cls, Fused):
        return None
    if cls in families().values() or "fused_made_by" in cls.__dict__:
        return plain_base(cls)
    if issubclass(cls, Frozen):
        inner = plain_class(cls.__bases__[1])
        return None if inner is None else frozen_class(inner)
    # torch's fully_shard derives a class of its own from that of the module that it is given.
    if not cls.__module__.startswith("torch."):
        return None
    bases = tuple(plain_class(base) or base for base in cls.__bases__)
    if bases == cls.__bases__:
        return None
    own = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    own.pop("fused_watches", None)
    made: type[nn.Module] = type(cls.__name__.replace("Fused", "", 1), bases, own)
    return made
