"""report: what the next call of each module of a model does, and why. Nothing is changed to find out."""

from collections.abc import Iterator

from torch import nn

from fusedres.nn.fused import Fused, FusedPass, plain_base
from fusedres.nn.stem import FusedStem
from fusedres.nn.tracing import PLAIN_TENSORS, why_traced_everywhere
from fusedres.patterns.choose import AUTO
from fusedres.runtime.launch import why_not_on
from fusedres.runtime.torch_private import AnyBatchNorm, is_compiled
from fusedres.swap.registry import NOTHING_TO_FUSE, families, fused_class, why_own
from fusedres.swap.swap import check_model
from fusedres.swap.table import Report, Row


def report(model: nn.Module) -> Report:
    """What the next call of a model runs fused, what not, and why: one row per residual block, stem, or module that
    looks like one, in the model's order.

    Args:
        model: any module, fused or not.

    Returns:
        A `Report`: rows to iterate over; ``print`` shows a table.

    Raises:
        TypeError: the model is no module.
    """
    check_model(model)
    rows: list[Row] = []
    compiled: list[str] = []
    blocks: list[str] = []
    for name, module in model.named_modules():
        if is_compiled(module):
            compiled.append(name)
        row = _row(name, module)
        if row is None and not _is_inside(name, blocks) and _owns_layers(module):
            cls = type(module)
            row = Row(name, cls.__name__, False, None, f"fusedres does not know {cls.__module__}.{cls.__qualname__}")
        if row is None:
            continue
        if _is_block(type(module)):
            blocks.append(name)
        rows.append(row.left(COMPILED) if row.fused and _is_inside(name, compiled) else row)
    return Report(
        rows, remark=SMALL if any(row.fused and row.schedule == AUTO for row in rows) and _on_cpu(model) else ""
    )


SMALL = "on a CPU, auto leaves small inputs and evaluation to the plain modules"


def _on_cpu(model: nn.Module) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.device.type == "cpu"


COMPILED = "torch.compile reads its forward: the plain modules run"


def _is_inside(name: str, outer: list[str]) -> bool:
    """Whether a module is one of these, or below one."""
    return any(not one or name == one or name.startswith(f"{one}.") for one in outer)


def _is_block(cls: type[nn.Module]) -> bool:
    """Whether a module's row tells of everything below it."""
    fused = cls if issubclass(cls, Fused) else fused_class(cls)
    return fused is not None and issubclass(fused, FusedPass)


def _row(name: str, module: nn.Module) -> Row | None:
    cls = type(module)
    if isinstance(module, Fused):
        kind = _kind(plain_base(cls) or cls, cls)
        reason = why_now(module)
        if reason:
            return Row(name, kind, False, None, reason)
        return Row(name, kind, True, module.fused_schedule, "", _note(module))
    known = families()
    base = next((base for base in cls.__mro__ if base in known), None)
    if base is not None:
        fused = fused_class(cls)
        own = why_own(cls, base)
        if own is not None and issubclass(known[base], FusedStem) and not _owns_layers(module):
            return None
        reason = own or (fused and fused.why_plain(module)) or "not fused yet: call fusedres.fuse(model)"
        return Row(name, _kind(base if own else cls, known[base]), False, None, reason)
    if cls in NOTHING_TO_FUSE:
        return Row(name, cls.__name__, False, None, NOTHING_TO_FUSE[cls])
    return None


def why_now(module: Fused) -> str | None:
    """Why the next call of a fused module would run its plain forward, or None."""
    cls = type(module)
    reason = cls.why_plain(module) or why_traced_everywhere()
    if reason is not None:
        return reason
    for conv in cls.parts_of(module).convs:
        weight = getattr(conv, "weight", None)
        # fully_shard keeps shards, and puts the whole in their place while a module runs.
        sharded = type(weight).__name__ == "DTensor"
        if not sharded and type(weight) not in PLAIN_TENSORS:
            return f"the weight of a {type(conv).__name__} is a {type(weight).__name__}, not a plain tensor"
    return None


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


def _kind(plain: type[nn.Module], fused: type[nn.Module]) -> str:
    return f"{plain.__name__} stem" if issubclass(fused, FusedStem) else plain.__name__


def _owns_layers(module: nn.Module) -> bool:
    """Whether a module has both a convolution and a batch norm below it, with nothing but containers between."""
    if _holds_alone(module) or isinstance(module, nn.Conv2d | AnyBatchNorm):
        return False
    owned = list(_own_layers(module))
    norms = any(isinstance(layer, AnyBatchNorm) for layer in owned)
    return norms and any(isinstance(layer, nn.Conv2d) for layer in owned)


def _own_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _holds_alone(child):
            yield from _own_layers(child)
        else:
            yield child


def _holds_alone(module: nn.Module) -> bool:
    """Whether a module is a container, which has no computation of its own."""
    sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return sequence or type(module) in (nn.ModuleList, nn.ModuleDict)
