"""Whether the code behind a module is what its library ships: what somebody put in its place is run, never skipped."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn import functional as F

from fusedres.activation import MODULES
from fusedres.nn.plain import NoShortcut, ZeroPadShortcut
from fusedres.runtime.graphs import is_compiled_now


class Watch(NamedTuple):
    """An attribute of a class or module, and the function that it was when fusedres first looked; None: not shipped."""

    owner: Any
    name: str
    function: Any


# Every module's call goes through these.
_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")

# What a fused pass does itself: the layers, and what they call.
_LAYERS = (
    nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, *MODULES, nn.PReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Sequential, ZeroPadShortcut, NoShortcut,
)  # fmt: skip
_FUNCTIONS = (
    "conv2d", "batch_norm", "relu", "leaky_relu", "relu6", "silu", "hardswish", "gelu", "mish", "elu", "prelu",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
)  # fmt: skip


def watches_of(cls: type) -> tuple[Watch, ...]:
    """What a call of a module of this class runs: its forward, the methods that this calls, and the way there."""
    key: Any = cls
    if key not in _seen:
        _seen[key] = tuple(Watch(cls, name, _shipped(cls, name)) for name in _called(cls))
    return _seen[key]


_seen: dict[Any, tuple[Watch, ...]] = {}


def _called(cls: type) -> list[str]:
    """The methods that a call runs, by name, as far as their code names them."""
    names, found = ["forward"], ["forward", *_CALLING]
    while names:
        code: CodeType | None = getattr(getattr(cls, names.pop(), None), "__code__", None)
        for name in code.co_names if code is not None else ():
            method = isinstance(getattr(cls, name, None), FunctionType) and not hasattr(nn.Module, name)
            if method and name not in found:
                found.append(name)
                names.append(name)
    return found


def _shipped(owner: Any, name: str) -> Any:
    """The function that is there now, if the package in which it was defined has its code; else None."""
    function = getattr(owner, name)
    home: str = owner.__name__
    if isinstance(owner, type):
        home = next(base for base in owner.__mro__ if name in base.__dict__).__module__
    if isinstance(function, BuiltinFunctionType):
        return function
    # A class that was made by `exec` may be of a module that there is not.
    package = sys.modules.get(home.partition(".")[0])
    folder = os.path.dirname(getattr(package, "__file__", None) or "")
    code = getattr(function, "__code__", None)
    return function if code is not None and (not folder or code.co_filename.startswith(folder)) else None


_TORCH = (
    *(Watch(layer, name, _shipped(layer, name)) for layer in _LAYERS for name in ("forward", "__call__")),
    *(Watch(nn.Module, name, _shipped(nn.Module, name)) for name in _CALLING),
    Watch(nn.Conv2d, "_conv_forward", _shipped(nn.Conv2d, "_conv_forward")),
    *(Watch(F, name, _shipped(F, name)) for name in _FUNCTIONS),
)


def _by_owner(watches: Iterable[Watch]) -> list[tuple[Callable[[Any], tuple[Any, ...]], Any, tuple[Any, ...]]]:
    """How to look up all that is watched of a class at once, and what is to be found."""
    owners: dict[Any, list[Watch]] = {}
    for watch in watches:
        owners.setdefault(watch.owner, []).append(watch)
    return [
        (operator.attrgetter(*(watch.name for watch in of)), owner, tuple(watch.function for watch in of))
        for owner, of in owners.items()
    ]


_TORCH_BY_OWNER = _by_owner(_TORCH)


def why_patched(watches: tuple[Watch, ...]) -> str | None:
    """What stands in the place of shipped code, among these and in PyTorch's own layers, or None.

    A compiler that is being served may follow calls of modules by functions of its own.
    """
    # Asked at every call of every block: all names of a class are looked up at once.
    as_shipped = all(names(owner) == functions for names, owner, functions in _TORCH_BY_OWNER)
    for owner, name, function in watches if as_shipped else (*watches, *_TORCH):
        found = getattr(owner, name, None)
        if function is None or (found is not function and not _is_compilers(name, found)):
            return f"{owner.__name__}.{name} was replaced"
    return None


def _is_compilers(name: str, found: Any) -> bool:
    code: CodeType | None = getattr(found, "__code__", None)
    return name in _CALLING and code is not None and code.co_filename.startswith(_TRACERS) and is_compiled_now()


_TRACERS = os.path.dirname(fx.__file__)


# Entries of a module's own dictionary that stand in the place of its class's methods.
_OVERRIDES = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl", "_check_input_dim")


def why_overridden(name: str, module: nn.Module) -> str | None:
    """What somebody put in the place of a method of this one module, or None."""
    own = module.__dict__
    if not own.keys().isdisjoint(_OVERRIDES):
        method = next(method for method in _OVERRIDES if method in own)
        return f"{name}.{method} was replaced".lstrip(".")
    if name and own.get("_compiled_call_impl") is not None:
        return f"{name} was compiled on its own"
    return None
