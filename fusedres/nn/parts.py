"""What a live module is made of, and why it can not be fused if it can not."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from fusedres.activation import RELU, Activation, activation_of
from fusedres.nn.norms import behind_norm, why_not_norm
from fusedres.nn.patched import why_overridden
from fusedres.nn.tensors import NotFusable

Named = tuple[str, nn.Module]
"""A module, behind the name that it has in its block."""


class Pair(NamedTuple):
    """A convolution and the batch norm behind it, with the names they have in their block."""

    conv: nn.Module
    bn: nn.Module
    conv_name: str
    bn_name: str


def part(module: nn.Module, name: str) -> nn.Module:
    """A part of a module, as the plain forward finds it; ``name`` may be that of a part of a part, ``"f.a.0"``.

    Raises:
        NotFusable: it is missing, or something else than a module.
    """
    steps = name.split(".") if "." in name else (name,)
    found: Any = module
    for step in steps:
        own = found.__dict__
        found = own[step] if step in own else own["_modules"].get(step)
        if not isinstance(found, nn.Module):
            what = "is missing" if found is None else f"is a {type(found).__name__}, not a module"
            raise NotFusable(f"{name} {what}")
    return found


def pair_of(block: nn.Module, conv: str, bn: str) -> Pair:
    """A convolution and a batch norm by their names.

    Raises:
        NotFusable: one is missing.
    """
    return Pair(part(block, conv), part(block, bn), conv, bn)


def parts_in_order(block: nn.Module, name: str, *names: str) -> list[str]:
    """The full names of what a container holds, which runs just these one after the other.

    Raises:
        NotFusable: it runs something else, or in another way.
    """
    container = part(block, name)
    if type(container).forward is not nn.Sequential.forward:
        raise NotFusable(f"{name} is a {type(container).__name__}, not a plain sequence")
    if tuple(container._modules) != names:
        raise NotFusable(f"expected {name} to hold {', '.join(names)}, found {', '.join(container._modules)}")
    return [f"{name}.{inner}" for inner in names]


def activation_of_part(name: str, module: nn.Module) -> Activation:
    """The activation that a part of a block is.

    Raises:
        NotFusable: it computes what no fused pass does.
    """
    act = activation_of(module)
    if act is None:
        raise NotFusable(f"{name} is a {type(module).__name__}, which no fused pass computes")
    return act


def relu_part(block: nn.Module, name: str) -> Named:
    """A part of a block that has to be a ReLU, with its name.

    Raises:
        NotFusable: it is missing, or something else.
    """
    module = part(block, name)
    if activation_of(module) != RELU:
        raise NotFusable(f"{name} is a {type(module).__name__}, not a plain ReLU")
    return name, module


def why_not_pairs(pairs: Iterable[Pair]) -> str | None:
    """The reason why these can not be fused, or None."""
    for conv, bn, conv_name, bn_name in pairs:
        reason = why_not_conv(conv_name, conv) or why_not_lone(bn_name, bn) or why_not_hooked(conv_name, conv)
        if reason:
            return reason
    return None


def why_not_conv(name: str, conv: nn.Module) -> str | None:
    """The same of a convolution, whoever waits for its call."""
    if type(conv) is not nn.Conv2d and not _computes_as_conv(type(conv)):
        return f"{name} is a {type(conv).__name__}, not a plain Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{name} pads with {conv.padding_mode!r}, {conv.padding!r}; only zeros of a given width are fused"
    return None


def _computes_as_conv(cls: type) -> bool:
    """Whether a class derives from Conv2d and computes as it does; parametrizations are properties of their class."""
    plain = all(getattr(cls, name, None) is getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))
    return plain and not any(
        hasattr(cls, name) for name in ("weight", "bias", "stride", "padding", "dilation", "groups")
    )


def why_not_bare(name: str, conv: nn.Module) -> str | None:
    """The same of a convolution without a batch norm behind it."""
    reason = why_not_conv(name, conv)
    if reason is None and getattr(conv, "bias", None) is not None:
        reason = f"{name} has a bias and no batch norm behind it"
    return reason or why_not_hooked(name, conv)


def why_not_parts(pairs: Iterable[Pair], norms: Iterable[Named]) -> str | None:
    """The same of convolutions with their batch norms, and of lone ones, which may run more behind themselves."""
    for conv, bn, conv_name, bn_name in pairs:
        reason = why_not_conv(conv_name, conv) or why_not_hooked(conv_name, conv)
        reason = reason or why_not_norm(bn_name, bn) or why_not_hooked(bn_name, bn)
        if reason:
            return reason
    return next(filter(None, (why_not_norm(*named) or why_not_hooked(*named) for named in norms)), None)


def why_not_lone(name: str, bn: nn.Module) -> str | None:
    """The same of a batch norm that is to run nothing behind it."""
    reason = why_not_norm(name, bn) or why_not_hooked(name, bn)
    for inner, module in behind_norm(bn) if reason is None else ():
        if type(module) is not nn.Identity:
            return f"{name} runs a {type(module).__name__} of its own behind it, {name}.{inner}"
        reason = reason or why_not_hooked(f"{name}.{inner}", module)
    return reason


def why_not_others(others: Iterable[Named]) -> str | None:
    """The same of modules that the plain forward calls and the fused one does not."""
    for name, module in others:
        reason = why_not_hooked(name, module)
        if reason:
            return reason
    return None


def why_not_hooked(name: str, module: nn.Module) -> str | None:
    """Whether somebody waits for a call of an inner module."""
    # A fused pass does not call the inner modules, so nothing may wait for such a call.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which a fused pass would not call"
    return why_overridden(name, module)


def check_fusable(*reasons: str | None) -> None:
    """Refuse for the first of these reasons.

    Raises:
        NotFusable: there is one.
    """
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise NotFusable(reason)
