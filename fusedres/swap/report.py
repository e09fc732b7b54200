"""report: what the next call of each module of a model does, and why. Nothing is changed to find out."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fusedres.nn.fused import Fused, FusedPass, plain_base
from fusedres.nn.stem import FusedStem
from fusedres.patterns.choose import AUTO
from fusedres.runtime.launch import why_not_on
from fusedres.runtime.torch_private import AnyBatchNorm
from fusedres.swap.account import Account, is_inside
from fusedres.swap.registry import NOTHING_TO_FUSE, fused_class
from fusedres.swap.rehearsal import stand_in
from fusedres.swap.swap import check_model, swap_classes
from fusedres.swap.table import Norm, Report, Row

SMALL = "on a CPU, auto leaves small inputs and evaluation to the plain modules"
NOT_YET = "not fused yet: call fusedres.fuse(model)"


def report(model: nn.Module) -> Report:
    """What the next call of a model runs fused, what not, and why, in the modes that its modules are in.

    A row is a fused module, one that `fuse` would fuse, or one with convolutions and batch norms of its own of which it
    would fuse none, in the model's order. Every batch norm is accounted for, too: BatchNorm2d and what is used in its
    place (`fusedres.nn.norms`) are counted; those of one or three dimensions are named alone, since no pass is made for
    them.

    Args:
        model: any module, fused or not.

    Returns:
        A `Report`: rows to iterate over, and ``norms``; ``print`` shows a table.

    Raises:
        TypeError: the model is no module.
    """
    check_model(model)
    now = Account(model)
    whole = all(norm.where is not None for norm in now.norms)
    then = now if whole else Account(swap_classes(stand_in(model), AUTO))
    norms = tuple(_norm(*both, now.held) for both in zip(now.norms, then.norms, strict=True))
    rows = tuple(_rows(now, then, norms))
    small = any(row.fused and row.schedule == AUTO for row in rows) and _on_cpu(model)
    return Report(rows, norms, SMALL if small else "")


def _norm(now: Norm, then: Norm, held: set[str]) -> Norm:
    """What is said of a batch norm, of what is said now and of what would be said after `fuse`."""
    if now.where is not None or then.where is None:
        return now if now.where is not None else then
    reason = f"{now.reason}; call fusedres.fuse(model) again" if now.name in held else NOT_YET
    return replace(now, reason=reason)


def _rows(now: Account, then: Account, norms: tuple[Norm, ...]) -> Iterator[Row]:
    left = {norm.name: norm.reason for norm in norms if norm.where is None}
    told: list[str] = []
    for (name, module), (_, rehearsed) in zip(now.model.named_modules(), then.model.named_modules(), strict=True):
        if name in now.why:
            row = _row(now, name, module, now.why[name])
        elif name in then.why:
            row = _row(then, name, rehearsed, then.why[name] or NOT_YET)
        elif type(module) in NOTHING_TO_FUSE:
            row = Row(name, type(module).__name__, False, None, NOTHING_TO_FUSE[type(module)])
        else:
            inside = any(is_inside(name, outer) for outer in told)
            reason = None if inside else _why_not_as_known(module) or _first_left(name, module, left)
            if reason is None:
                continue
            row = Row(name, type(module).__name__, False, None, reason)
        if isinstance(rehearsed, FusedPass):
            told.append(name)
        yield row


def _row(account: Account, name: str, module: nn.Module, why: str | None) -> Row:
    assert isinstance(module, Fused)
    plain = plain_base(type(module)) or type(module)
    kind = f"{plain.__name__} stem" if isinstance(module, FusedStem) else plain.__name__
    if why is not None:
        return Row(name, kind, False, None, why)
    norms = sum(where == name for where in account.where.values())
    note = "; ".join(filter(None, (account.partly(name), _choices(module), _note(module))))
    return Row(name, kind, True, module.fused_schedule, "", note, norms)


def _why_not_as_known(module: nn.Module) -> str | None:
    """Why a block that is not fused by its class is not, where its class is known."""
    known = None if isinstance(module, Fused) else fused_class(type(module))
    return known.why_plain(module) if known is not None and issubclass(known, FusedPass) else None


def _first_left(name: str, module: nn.Module, left: dict[str, str]) -> str | None:
    """Why the first batch norm of a module's own that is in no pass is in none; None where it has no such one, or no
    convolution."""
    if _holds_alone(module) or isinstance(module, nn.Conv2d | AnyBatchNorm):
        return None
    owned = dict(_own_layers(name, module))
    reasons = (left[inner] for inner, layer in owned.items() if inner in left and isinstance(layer, AnyBatchNorm))
    return next(reasons, None) if any(isinstance(layer, nn.Conv2d) for layer in owned.values()) else None


def _own_layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for inner, child in module.named_children():
        path = f"{name}.{inner}" if name else inner
        if _holds_alone(child):
            yield from _own_layers(path, child)
        else:
            yield path, child


def _choices(module: Fused) -> str:
    """What ``"auto"`` took in its calls, and whether that was measured or predicted."""
    rungs: dict[str, list[str]] = {}
    for rung, source in module.fused_choices.items():
        rungs.setdefault(source, []).append(rung)
    return "; ".join(f"took {', '.join(names)}, {source}" for source, names in rungs.items())


def _note(module: Fused) -> str:
    """What a better GPU, or a better layout in the last backward pass, would have spared, or an empty string."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_cuda and why_not_on(parameter.get_device()):
        runs = "the plain modules" if module.fused_schedule == AUTO else "the library's calls"
        return f"runs {runs}: {why_not_on(parameter.get_device())}"
    if module.fused_reordered is not None:
        strides = module.fused_reordered
        return f"its gradient arrives with strides {strides} and is copied at every step; channels_last would not be"
    return ""


def _on_cpu(model: nn.Module) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.device.type == "cpu"


def _holds_alone(module: nn.Module) -> bool:
    """Whether a module is a container, which has no computation of its own."""
    sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return sequence or type(module) in (nn.ModuleList, nn.ModuleDict)


def why_not_fused(model: nn.Module) -> str | None:
    """Why nothing of a model that went through `fuse` is fused; None if some of it is."""
    rows = report(model)
    if any(row.fused for row in rows):
        return None
    reasons = "; ".join(dict.fromkeys(f"{row.name or 'the model'}: {row.reason}" for row in rows[:3]))
    return f"nothing to fuse in it ({reasons or 'no residual block that the library knows'})"
