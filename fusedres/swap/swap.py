"""fuse, unfuse: fused forward passes in and out of a live model by changing the class of its modules."""

from typing import Any, TypeVar

from torch import nn

from fusedres.nn.fused import Fused, plain_base
from fusedres.nn.scripting import OF_INSTANCES
from fusedres.patterns.choose import AUTO, check_schedule
from fusedres.swap.registry import families, fused_again, fused_class

Model = TypeVar("Model", bound=nn.Module)


def check_model(model: nn.Module) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def fuse(model: Model, *, schedule: str = AUTO) -> Model:
    """Give every residual block and stem that the library knows its fused forward pass, in place.

    A block is fused by changing its class to a subclass of its own: ``isinstance``, parameters, buffers, names and
    ``state_dict()`` stay as they are, and an optimizer made before goes on working. Whether a call takes the fused pass
    is decided at that call, by what the block is made of then: hooks, replaced parts or code, another kind of layer let
    it run its plain modules, and `report` says why. Fusing again changes nothing but the schedule, and lets kernels be
    tried again that could not be started.

    Args:
        model: any module; itself may be a block.
        schedule: ``"auto"`` (chosen per layer) or a rung of the ladder for all: ``"block_end"``, ``"stats"``,
            ``"prologue"``, ``"moments"``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is no module, or the schedule unknown; nothing has changed then.
    """
    check_model(model)
    check_schedule(schedule)
    for module in model.modules():
        fused = fused_class(type(module))
        live: Any = module
        if fused is not None:
            live.__class__ = fused
        if isinstance(module, Fused):
            module.fused_schedule = schedule
            module.__dict__.pop("fused_failure", None)
    return model


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
