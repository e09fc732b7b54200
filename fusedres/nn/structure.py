"""What a module is as fused passes and what lies between them, found once for all modules that are built alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fusedres.nn.fused import Fused
from fusedres.nn.inputs import Inputs, lone_input
from fusedres.nn.kinds import Kind, holds_norms, is_depthwise, is_layer, kind_of, plain_type
from fusedres.nn.match import Match, match
from fusedres.nn.parts import Named, Pair
from fusedres.nn.reader import read
from fusedres.nn.reading import Reading, is_watched
from fusedres.nn.settings import CONSTANTS, FUNCTIONS, Unreadable
from fusedres.nn.steps import FusedStep, Modules, Place, Values, filled
from fusedres.runtime import switches

MOST_NORMS = 16
"""A module of more is never read as a part of the one that calls it."""


@dataclass(eq=False)
class Structure:
    """A forward as steps, and whether they were seen to compute the same.

    Attributes:
        reading: of the forward.
        found: its steps.
        index: by which `structure_at` finds it.
        refused: why it is left alone although it was read, or None.
        proved: whether it was tried.
    """

    reading: Reading
    found: Match
    index: int
    refused: str | None = None
    proved: bool = False
    paths: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.paths = tuple(self.reading.paths)

    def modules_of(self, module: nn.Module) -> Modules | None:
        """The live modules, or None where something else would be read now."""
        found = self.reading.modules_of(module)
        return None if found is None else Modules(found, self.paths)

    def modules_in(self, module: nn.Module) -> Modules:
        """The same of a module that has not changed since this was found."""
        return Modules([module.get_submodule(path) for path in self.paths], self.paths)

    def weights_in(self, modules: Modules) -> int:
        """How many weights the convolutions of its passes have; without end where a batch norm is in one by now, whose
        pass has always something to spare."""
        convs: list[Any] = [pair.conv for step in self.found.fused for pair in step.pairs(modules)]
        folded = any(step.is_folded(modules) for step in self.found.fused)
        return 2**62 if folded else sum(conv.weight.numel() for conv in convs)

    def run(self, owner: Fused, modules: Modules, tensors: tuple[Tensor, ...]) -> Any:
        """The forward."""
        values: Values = [None] * len(self.reading.nodes)
        values[: len(tensors)] = tensors
        values.append(set())
        del tensors
        for step in self.found.steps:
            step.run(owner, modules, values)
        return filled(self.found.result, values)


@dataclass(frozen=True)
class StructureParts:
    """The fused passes of a module as it is now: what `Fused.parts_of` gives."""

    structure: Structure
    modules: Modules

    @property
    def steps(self) -> Iterator[FusedStep]:
        return (step for step in self.structure.found.fused if step.why_not(self.modules) is None)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(pair for step in self.steps for pair in step.pairs(self.modules))

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.pairs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(norm for step in self.steps for norm in step.norms(self.modules))

    @property
    def others(self) -> tuple[Named, ...]:
        return ()


Found = Structure | str
"""A structure, or why a forward has none."""


def structure_at(index: int) -> Structure | None:
    """The structure that was found as the ``index``-th, if it was."""
    return _all[index] if 0 <= index < len(_all) else None


_lock = threading.RLock()
_all: list[Structure] = []
_known: dict[Any, Found] = {}


class Finder:
    """Finds structures of modules that do not change meanwhile.

    Args:
        training: in the place of every module's own mode, where it is given.
    """

    def __init__(self, training: bool | None = None) -> None:
        self.training = training
        self.prints: dict[int, Any] = {}
        self.joins_memo: dict[int, bool] = {}

    def found(self, module: nn.Module, inputs: Inputs | None = None) -> Found:
        """The structure of a module, or why it has none.

        Args:
            module: the live module.
            inputs: what it is called with; a tensor for each parameter without a default if not given.
        """
        with _lock:
            return self._found(module, inputs)

    def known(self, module: nn.Module, inputs: Inputs | None) -> Found | None:
        """What was found of such a module before, without reading it."""
        return _known.get(self._key(module, inputs))

    def _key(self, module: nn.Module, inputs: Inputs | None) -> Any:
        return self.fingerprint(module), _aliases(module), inputs

    def _found(self, module: nn.Module, inputs: Inputs | None) -> Found:
        key = self._key(module, inputs)
        known = _known.get(key)
        if known is None or (isinstance(known, Structure) and not known.reading.is_of_code()):
            try:
                known = self.read(module, inputs)
            except Exception as error:
                if switches.STRICT:
                    raise
                known = f"its forward is of a kind that was not foreseen ({type(error).__name__}: {error})"
            _known[key] = known
        return known

    def read(self, module: nn.Module, inputs: Inputs | None) -> Found:
        try:
            reading = read(module, inputs, inlines=self.inlines, training=self.training)
            match_ = self.matched(reading, module)
            inlined = {path for path, place in reading.paths.items() if path and reading.seen[place].inlined}
            below = map(module.get_submodule, inlined - match_.crossed)
            outside = {id(inner) for inner in below if holds_norms(inner)}
            if outside:
                # What no pass joins with anything outside stands for itself.
                reading = read(
                    module, inputs, inlines=lambda m: id(m) not in outside and self.inlines(m), training=self.training
                )
                match_ = self.matched(reading, module)
        except Unreadable as why:
            name = lone_input(module) if inputs is None else None
            # Perhaps it takes a list, and does not say so.
            found = self.read(module, Inputs(((name, 2),))) if name is not None else str(why)
            return found if isinstance(found, Structure) else str(why)
        structure = Structure(reading, match_, len(_all))
        _all.append(structure)
        return structure

    def matched(self, reading: Reading, module: nn.Module) -> Match:
        return match(reading, [module.get_submodule(path) for path in reading.paths])

    def inlines(self, module: nn.Module) -> bool:
        """Whether a module's forward may be read as a part of that of the module that calls it."""
        if id(module) not in self.joins_memo:
            self.joins_memo[id(module)] = self._inlines(module)
        return self.joins_memo[id(module)]

    def _inlines(self, module: nn.Module) -> bool:
        if is_watched(module) or (isinstance(module, Fused) and not module.fused_by_structure):
            return False
        if not holds_norms(module):
            return self._computes_nothing(module)
        if is_layer(module):
            return False
        count = sum(kind_of(inner) is Kind.NORM for inner in module.modules())
        found = self.found(module) if count <= MOST_NORMS else ""
        return isinstance(found, Structure) and not found.found.adds and type(found.found.result) is Place

    def _computes_nothing(self, module: nn.Module) -> bool:
        """Whether a module without anything in it, an empty sequence or of a library's own, gives what it is given in
        this mode, or calls one activation."""
        if is_layer(module) or module._modules or module._parameters or module._buffers:
            return False
        found = self.found(module)
        return isinstance(found, Structure) and len(found.found.steps) <= 1

    def fingerprint(self, module: nn.Module) -> Any:
        """Equal for modules of which the same is read, matched and proved."""
        if id(module) not in self.prints:
            self.prints[id(module)] = self._fingerprint(module)
        return self.prints[id(module)]

    def _fingerprint(self, module: nn.Module) -> Any:
        own, kind, cls = module.__dict__, kind_of(module), plain_type(module)
        if kind is Kind.CONV:
            numbers: Any = tuple(_frozen(own.get(name)) for name in _OF_CONVS)
            grouping = "depthwise" if is_depthwise(module) else own.get("groups") != 1
            facts = (*numbers, grouping, own["_parameters"].get("bias") is None)
        elif kind is Kind.NORM:
            facts = (*(_frozen(own.get(name)) for name in _OF_NORMS), bool(own["_modules"]) and is_watched(module))
        else:
            training = own["training"] if self.training is None else self.training
            constants = tuple(
                (name, _frozen(value))
                for name, value in own.items()
                if not name.startswith(("_", "fused_")) and name != "training" and not isinstance(value, Tensor)
            )
            facts = (training, constants, is_watched(module))
        tables = tuple(
            (name, value is None) for table in ("_parameters", "_buffers") for name, value in own[table].items()
        )
        children = tuple(
            (name, None if child is None else self.fingerprint(child)) for name, child in own["_modules"].items()
        )
        return _Print((cls, facts, tables, children))


def _aliases(module: nn.Module) -> tuple[int, ...]:
    """Which of the modules below one stand in several places: by where each stands first; nothing if none does."""
    every = [id(inner) for _, inner in module.named_modules(remove_duplicate=False)]
    first: dict[int, int] = {}
    return tuple(first.setdefault(each, i) for i, each in enumerate(every)) if len(set(every)) < len(every) else ()


_OF_CONVS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
_OF_NORMS = ("eps", "momentum", "affine", "track_running_stats")


class _Print:
    """A tuple that knows its hash, since fingerprints hold each other."""

    __slots__ = ("hash", "of")

    def __init__(self, of: Any) -> None:
        self.of, self.hash = of, hash(of)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Print) and self.hash == other.hash and self.of == other.of)


def _frozen(value: Any) -> Any:
    """A constant, as something that has a hash; of an object its class and what it has of settings."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    if isinstance(value, (*CONSTANTS, *FUNCTIONS)):
        return type(value), value
    if isinstance(value, nn.Module) or callable(value):
        return type(value), id(value)
    settings = getattr(value, "__dict__", {}).items()
    return type(value), tuple((name, each) for name, each in settings if isinstance(each, CONSTANTS))
