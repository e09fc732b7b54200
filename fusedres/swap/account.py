"""Where each batch norm of a model is in its next call: in the fused pass of which module, or why in none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import nn

from fusedres.nn.fused import Fused, FusedPass
from fusedres.nn.kinds import is_layer, plain_type
from fusedres.nn.norms import is_norm, why_not_norm
from fusedres.nn.parts import NotFusable
from fusedres.nn.patched import why_overridden
from fusedres.nn.steps import FusedStep, Modules
from fusedres.nn.structure import Finder
from fusedres.nn.structured import taken_apart
from fusedres.nn.tracing import PLAIN_TENSORS, why_traced_everywhere
from fusedres.runtime.torch_private import AnyBatchNorm
from fusedres.swap.structure import inlined
from fusedres.swap.table import Norm


def is_counted(norm: nn.Module) -> bool:
    """Whether a module is a batch norm of images, whether or not passes take one of its class."""
    return is_norm(norm) or isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)


class Account:
    """What the next call of a model runs fused, of the classes and in the modes that its modules have now.

    Attributes:
        model: the model, of which nothing changes.
        why: name -> why it runs plain, or None: of every fused module that is called, so none of which a pass of a
            module above it does the work.
        where: id of a batch norm -> name of the fused module whose pass has it.
        held: the names of batch norms that a fused module has a pass for, which it does not take now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.why: dict[str, str | None] = {}
        self.where: dict[int, str] = {}
        self.held: set[str] = set()
        self._finder = Finder()
        absorbed: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, Fused) and id(module) not in absorbed:
                self.why[name] = why_now(module)
                if self.why[name] is None:
                    absorbed.update(map(id, self._take(name, module)))

    def _take(self, name: str, module: Fused) -> Iterator[nn.Module]:
        """Note the batch norms in the passes of a module; the modules that are not called because of these."""
        for norm in type(module).parts_of(module).norms:
            self.where.setdefault(id(norm), name)
        if isinstance(module, FusedPass):
            yield from (inner for inner in module.modules() if inner is not module)
        elif module.fused_by_structure:
            structure, _ = taken_apart(module, None, self._finder)
            yield from (module.get_submodule(path) for path in inlined(structure))

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """Every batch norm of the model, in its order."""
        found = []
        for name, norm in self.model.named_modules():
            if is_counted(norm) or isinstance(norm, AnyBatchNorm):
                where = self.where.get(id(norm))
                found.append(Norm(name, where, "" if where is not None else self._reason(name, norm), is_counted(norm)))
        return tuple(found)

    def partly(self, name: str) -> str:
        """What of a fused module runs as it is, or an empty string."""
        module = self.model.get_submodule(name)
        if not isinstance(module, Fused) or not module.fused_by_structure:
            return ""
        structure, modules = taken_apart(module, None, self._finder)
        every = [step.why_not(modules) for step in structure.found.fused]
        reasons = [reason for reason in every if reason is not None]
        return f"{len(reasons)} of {len(every)} passes not taken: {reasons[0]}" if reasons else ""

    def _reason(self, name: str, norm: nn.Module) -> str:
        """Why a batch norm is in no pass."""
        if not is_counted(norm):
            return f"it is a {type(norm).__name__}, and no pass is made for those"
        if not is_norm(norm):
            return why_not_norm(name, norm) or ""
        first = ""
        # A block that is fused by its class as a whole tells of all below it.
        blocks = [path for path in _around(name) if isinstance(self.model.get_submodule(path), FusedPass)]
        for path in (*blocks, *_around(name)):
            reason, is_last = self._reason_in(path, norm)
            if reason and is_last:
                self.held.update([name] if self.why.get(path) else [])
                return reason
            first = first or reason
        return first or "no forward that could be read calls it"

    def _reason_in(self, path: str, norm: nn.Module) -> tuple[str, bool]:
        """Why a module around a batch norm has no pass for it, or an empty string; and whether nobody else could."""
        module = self.model.get_submodule(path)
        own = self.why.get(path) or ""
        if isinstance(module, Fused) and not module.fused_by_structure:
            return own, bool(own) and _has(module, norm)
        if is_layer(module) or type(module) in (nn.ModuleList, nn.ModuleDict):
            return "", False
        cls, called = plain_type(module).__name__, path or "the model"
        found = self._finder.found(module)
        if isinstance(found, str):
            if why_overridden("", module) is not None:  # which no class could say
                return f"{called} ({cls}): {found}", True
            say = f"fusedres.register({cls}, ...) lets you say what it computes"
            return f"{cls} can not be read: {found}; {say}", False
        modules = found.modules_in(module)
        steps = [step for step in found.found.steps if _calls(step, modules, norm)]
        if not steps:
            return f"the forward of {called} ({cls}) does not call it", False
        try:
            taken_apart(module, None, self._finder)
        except NotFusable as why:
            return f"{called} ({cls}): {why}", True
        if not isinstance(steps[0], FusedStep):
            return f"the forward of {called} ({cls}) calls it more than once, or with more than a tensor", True
        reason = steps[0].why_not(modules) or own
        return f"{called} ({cls}): {reason}" if reason else "", bool(reason)


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


def is_inside(name: str, outer: str) -> bool:
    """Whether a module is one of a name, or below it."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def _around(name: str) -> Iterator[str]:
    """The names of the modules around one, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _has(module: Fused, norm: nn.Module) -> bool:
    """Whether a batch norm is one of those that the pass of a module is for."""
    if isinstance(module, FusedPass):
        return True
    try:
        return any(norm is each for each in type(module).fused_parts(module).norms)
    except NotFusable:
        return any(norm is child for child in module.children())


def _calls(step: object, modules: Modules, norm: nn.Module) -> bool:
    nodes = getattr(step, "nodes", ())
    return any(node.op in ("norm", "call_module") and modules.found[node.target] is norm for node in nodes)
