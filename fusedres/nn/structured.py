"""Modules of any class, whose fused passes are found by what their forward computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.nn.fused import Fused, fused_type
from fusedres.nn.in_graph import in_graph
from fusedres.nn.inputs import Inputs, forward_of
from fusedres.nn.kinds import plain_type
from fusedres.nn.parts import NotFusable
from fusedres.nn.patched import why_patched
from fusedres.nn.proof import prove
from fusedres.nn.size_rule import too_small
from fusedres.nn.steps import Modules
from fusedres.nn.structure import Finder, Structure, StructureParts, structure_at
from fusedres.nn.tracing import is_read
from fusedres.patterns.choose import AUTO
from fusedres.runtime.collectives import is_one_of_several
from fusedres.runtime.graphs import is_compiled_now


class FusedStructure(Fused):
    """A module whose forward runs as fused passes and what lies between them, where that was seen to be the same."""

    fused_by_structure = True

    fused_structures: tuple[int, ...] = ()
    """Of the structures that it had so far; set on the instance."""

    fused_unread: tuple[tuple[bool, Inputs], ...] = ()
    """In which mode and with what its forward could not be read; set on the instance until it is fused again."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.fused_watches = ()  # a structure tells itself whether what was read is still there

    @classmethod
    def parts_of(cls, module: nn.Module) -> StructureParts:
        """What a call with one tensor for each parameter without a default runs fused.

        Raises:
            NotFusable: nothing, with the reason.
        """
        structure, modules = taken_apart(module, None)
        reasons = [step.why_not(modules) for step in structure.found.fused]
        if None not in reasons:
            raise NotFusable(next(filter(None, reasons), "nothing in its forward has a fused pass"))
        return StructureParts(structure, modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return in_graph(self, "forward", super().forward, *args, **kwargs)
        taken = None if is_read() else self._taken(args, kwargs)
        if taken is None:
            return super().forward(*args, **kwargs)
        structure, modules, tensors = taken
        return structure.run(self, modules, tensors)

    def __getstate__(self) -> Any:
        of_class = getattr(super(), "__getstate__", None)
        state = dict(self.__dict__) if of_class is None else of_class()
        # Another process numbers its structures anew.
        others = ("fused_structures", "fused_unread")
        return {name: state[name] for name in state if name not in others} if isinstance(state, dict) else state

    def _taken(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Structure, Modules, tuple[Tensor, ...]] | None:
        """The module taken apart for a call; None: it runs as it is."""
        forward = forward_of(plain_type(self))
        bound = None if isinstance(forward, str) else forward.bound(args, kwargs)
        if bound is None:
            return None
        inputs, tensors = bound
        x, known = tensors[0], self.fused_weights
        if known is not None and self.fused_schedule == AUTO and not is_one_of_several():
            # Asked first, of what the module weighed the last time: where little is computed, asking is felt.
            gains = self.training or torch.is_grad_enabled()
            if too_small(x, known if gains else 0):
                return None
        if any(map(self.goes_plain, tensors)) or why_patched(()) is not None:
            return None
        if (self.training, inputs) in self.fused_unread:
            return None
        taken = self._remembered(inputs)
        if taken is None and is_compiled_now():
            # A compiler's tensors have no values by which something could be tried.
            taken = self._known_before(inputs)
            if taken is None:
                return None
        if taken is None:
            found = proved(self, inputs)
            modules = None if isinstance(found, str) else found.modules_of(self)
            if isinstance(found, str) or modules is None:
                self.__dict__["fused_unread"] = (*self.fused_unread[-3:], (self.training, inputs))
                return None
            self.__dict__["fused_structures"] = (*self.fused_structures[-3:], found.index)
            self.__dict__["fused_weights"] = found.weights_in(modules)
            taken = found, modules
        structure, modules = taken
        if structure.refused is not None:
            return None
        return structure, modules, tensors

    def _known_before(self, inputs: Inputs) -> tuple[Structure, Modules] | None:
        """The structure that was found of such a module when it was fused, or in another call."""
        forward = forward_of(plain_type(self))
        usual = not isinstance(forward, str) and inputs == forward.without_options()
        for asked in (inputs, None) if usual else (inputs,):
            found = Finder().known(self, asked)
            if isinstance(found, Structure) and found.proved and found.reading.is_of_code():
                modules = found.modules_of(self)
                if modules is not None:
                    return found, modules
        return None

    def fused_prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = forward_of(plain_type(self))
        bound = None if isinstance(forward, str) else forward.bound(args, kwargs)
        if bound is not None and self._remembered(bound[0]) is None:
            found = proved(self, bound[0])
            if isinstance(found, Structure):
                self.__dict__["fused_structures"] = (*self.fused_structures[-3:], found.index)

    def _remembered(self, inputs: Inputs) -> tuple[Structure, Modules] | None:
        """One of the structures that the module had before, which it has again."""
        for index in self.fused_structures:
            structure = structure_at(index)
            if structure is not None and structure.reading.inputs == inputs:
                modules = structure.modules_of(self)
                if modules is not None:
                    return structure, modules
        return None


def proved(module: nn.Module, inputs: Inputs | None, finder: Finder | None = None) -> Structure | str:
    """The structure of a module, whose fused passes were tried, or why it has none."""
    finder = Finder() if finder is None else finder
    structure = finder.found(module, inputs)
    if isinstance(structure, Structure) and structure.found.fused and not structure.proved:
        structure.refused = prove(structure, module, finder.training)
        structure.proved = True
    return structure


def taken_apart(module: nn.Module, inputs: Inputs | None, finder: Finder | None = None) -> tuple[Structure, Modules]:
    """The structure of a module, seen to compute the same, and its modules.

    Args:
        module: the live module.
        inputs: what it is called with; a tensor for each parameter without a default if not given.
        finder: finds it; one for the modules' own modes if not given.

    Raises:
        NotFusable: with the reason.
    """
    structure = proved(module, inputs, finder)
    if isinstance(structure, str):
        raise NotFusable(structure)
    if structure.refused is not None:
        raise NotFusable(structure.refused)
    return structure, structure.modules_in(module)


def structured_class(cls: type[nn.Module]) -> type[FusedStructure]:
    """The fused class of a plain one."""
    if cls not in _made:
        made: Any = fused_type(FusedStructure, cls, fused_made_by=(structured_class, cls))
        _made[cls] = made
    return _made[cls]


_made: dict[type[nn.Module], type[FusedStructure]] = {}
