"""Which plain class becomes which fused class.

A family of blocks is one file of `fusedres.swap.families`: functions that take modules of a library apart, each
registered by `family` for the classes whose modules it takes. No library is imported for it: its classes are looked up
where the library is there already, since its models can not be here otherwise.
"""

import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fusedres.nn.chain import FusedResidual
from fusedres.nn.fused import Fused, PartsFunction, fused_type
from fusedres.nn.patched import Watch

Function = TypeVar("Function", bound=PartsFunction)


class Declaration(NamedTuple):
    """A class of a library by its name, what computes its modules, what takes them apart, and its own attributes."""

    name: str
    mixin: type[Fused]
    parts: PartsFunction
    own: dict[str, Any]


_waiting: dict[str, list[Declaration]] = {}
_known: dict[type[nn.Module], type[Fused]] = {}

NOTHING_TO_FUSE: dict[type[nn.Module], str] = {}
"""Blocks that have no fused pass, and why; `report` names them."""


def family(library: str, *names: str, mixin: type[Fused] = FusedResidual, **own: Any) -> Callable[[Function], Function]:
    """Register a function that takes modules apart.

    Args:
        library: the name in ``sys.modules`` of the module that has the classes.
        names: of the classes, whose fused classes are made when they are first needed.
        mixin: computes what the function gives.
        own: attributes of the fused classes, such as ``adds_in_place``.
    """

    def declare(parts: Function) -> Function:
        _waiting.setdefault(library, []).extend(Declaration(name, mixin, parts, own) for name in names)
        return parts

    return declare


def register(plain: type[nn.Module], fused: type[Fused]) -> None:
    """Register a fused class that is there already."""
    _known[plain] = fused


def register_class(plain: type[nn.Module], fused: type[Fused]) -> None:
    """The same, whenever it comes: classes that derive from the plain one are looked at anew."""
    families()
    register(plain, fused)
    for cls in [cls for cls in _derived if issubclass(cls, plain)]:
        del _derived[cls]


def families() -> Mapping[type[nn.Module], type[Fused]]:
    """Plain class -> fused class, for every library whose models can exist in this process."""
    if not _known or any(library in sys.modules for library in _waiting):
        with _lock:
            _look()
    return _known


_lock = threading.RLock()


def _look() -> None:
    """Read the files of the families, and make the classes of libraries that are there by now."""
    if not _known:
        files = importlib.import_module("fusedres.swap.families")
        for found in pkgutil.iter_modules(files.__path__):
            importlib.import_module(f"{files.__name__}.{found.name}")
    for library in [library for library in _waiting if library in sys.modules]:
        module = sys.modules[library]
        # Somebody may be importing it at this moment.
        if all(hasattr(module, declaration.name) for declaration in _waiting[library]):
            for name, mixin, parts, own in _waiting.pop(library):
                plain, file = getattr(module, name), parts.__module__
                fused = fused_type(mixin, plain, parts, fused_made_by=(fused_again, plain), __module__=file, **own)
                setattr(sys.modules[file], fused.__name__, fused)
                _known[plain] = fused


def fused_class(cls: type[nn.Module]) -> type[Fused] | None:
    """The fused class of modules of this one, if the library knows it, or a class that it derives from and computes as.

    A subclass computes as its base if a call of it runs the base's code: it may be built in another way.
    """
    if issubclass(cls, Fused):
        return None
    known = families()
    base = next((base for base in cls.__mro__ if base in known), None)
    if base is None or why_own(cls, base) is not None:
        return None
    if cls is not base and cls not in _derived:
        _derived[cls] = fused_type(known[base], cls, fused_made_by=(fused_again, cls))
    return known[base] if cls is base else _derived[cls]


_derived: dict[type[nn.Module], type[Fused]] = {}


def fused_again(plain: type[nn.Module]) -> type[nn.Module]:
    """What `pickle` finds the class of a fused module by."""
    return fused_class(plain) or plain


def why_own(cls: type[nn.Module], base: type[nn.Module]) -> str | None:
    """What a subclass of a known class computes in its own way, or None."""
    for watch in families()[base].fused_watches:
        if _looked_up(cls, watch) is not _looked_up(base, watch):
            return f"{cls.__module__}.{cls.__qualname__} derives from {base.__name__} and has its own {watch.name}"
    return None


def _looked_up(cls: type[nn.Module], watch: Watch) -> Any:
    return getattr(cls, watch.name, None)
