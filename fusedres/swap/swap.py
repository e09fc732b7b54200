"""fuse, unfuse, report: fused forward passes in and out of a live model by changing the class of its modules."""

from typing import Any, TypeVar

from torch import nn

from ..autograd.layouts import reordered
from ..launch import why_not_on
from ..nn.fused import Fused, FusedStem
from ..nn.parts import NotFusable
from ..nn.stage import fuse_stages, unfuse_stages
from ..plan import AUTO, check_schedule
from .families import NOTHING_TO_FUSE, families
from .report import Report, Row

Model = TypeVar("Model", bound=nn.Module)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _reason(module: Fused) -> str:
    """Why a module of a fused class would run its plain forward now, or an empty string."""
    try:
        module.fused_convs()
    except NotFusable as why:
        return str(why)
    return ""


def _note(module: Fused) -> str:
    """What a better GPU, or a better layout in the last backward pass, would have spared, or an empty string."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_cuda and why_not_on(parameter.get_device()):
        runs = "the plain modules" if module.fused_schedule == AUTO else "the library's calls"
        return f"runs {runs}: {why_not_on(parameter.get_device())}"
    convs: Any = module.fused_convs()
    strides = reordered(convs[0].weight) if convs else None
    if strides is None:
        return ""
    return f"its gradient arrives with strides {strides} and is copied at every step; channels_last would not be"


def _try_fuse(module: nn.Module, plain: type[nn.Module], fused: type[nn.Module]) -> str:
    """Change the class if the module can be fused; the reason if not."""
    live: Any = module
    live.__class__ = fused
    reason = _reason(live) or ("its forward was replaced" if "forward" in module.__dict__ else "")
    if reason:
        live.__class__ = plain
    return reason


def fuse(model: Model, *, schedule: str = AUTO) -> Model:
    """Give every residual block and stem that the library knows its fused forward pass, in place.

    A block is fused by changing its class to a subclass of its own: ``isinstance``, parameters, buffers, names and
    ``state_dict()`` stay as they are, and an optimizer made before goes on working; so is an ``nn.Sequential`` in which
    blocks follow each other, for what they have in common. What can not be fused is left
    alone, and `report` says why. Fusing again changes nothing but the schedule.

    Args:
        model: any module; itself may be a block.
        schedule: ``"auto"`` (chosen per layer) or a rung of the ladder for all: ``"block_end"``, ``"stats"``,
            ``"prologue"``, ``"moments"``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is no module, or the schedule unknown; nothing has changed then.
    """
    _check_model(model)
    check_schedule(schedule)
    known = families()
    for module in model.modules():
        fused = known.get(type(module))
        if fused is not None:
            _try_fuse(module, type(module), fused)
        if isinstance(module, Fused):
            module.fused_schedule = schedule
    fuse_stages(model)
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
    _check_model(model)
    plain_class = {fused: plain for plain, fused in families().items()}
    for module in model.modules():
        plain = plain_class.get(type(module))
        if plain is not None:
            module.__dict__.pop("fused_schedule", None)
            module.__class__ = plain
    unfuse_stages(model)
    return model


def report(model: nn.Module) -> Report:
    """What is fused in a model, what is not, and why: one row per residual block or stem, in the model's order.

    Args:
        model: any module, fused or not.

    Returns:
        A `Report`: rows to iterate over; ``print`` shows a table.

    Raises:
        TypeError: the model is no module.
    """
    _check_model(model)
    known = families()
    plain_class = {fused: plain for plain, fused in known.items()}
    rows = []
    for name, module in model.named_modules():
        if type(module) in plain_class:
            assert isinstance(module, Fused)
            kind = _kind(plain_class[type(module)], type(module))
            reason = _reason(module)
            schedule = None if reason else module.fused_schedule
            rows.append(Row(name, kind, not reason, schedule, reason, "" if reason else _note(module)))
        elif type(module) in known:
            plain = type(module)
            reason = _try_fuse(module, plain, known[plain])
            kind = _kind(plain, known[plain])
            module.__class__ = plain
            rows.append(Row(name, kind, False, None, reason or "not fused yet: call fusedres.fuse(model)"))
        elif type(module) in NOTHING_TO_FUSE:
            rows.append(Row(name, type(module).__name__, False, None, NOTHING_TO_FUSE[type(module)]))
        else:
            base = next((plain for plain in known if isinstance(module, plain)), None)
            if base is not None:
                own = type(module)
                reason = f"{own.__module__}.{own.__qualname__} derives from {base.__name__} and may compute otherwise"
                rows.append(Row(name, base.__name__, False, None, reason))
    return Report(rows)


def _kind(plain: type[nn.Module], fused: type[nn.Module]) -> str:
    return f"{plain.__name__} stem" if issubclass(fused, FusedStem) else plain.__name__
