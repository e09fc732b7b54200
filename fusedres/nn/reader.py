"""Reading a forward: it runs once on symbols, on a shadow of its module.

A shadow is a module of a derived class that shares the tensors and settings of the live one and notes what is asked of
it; the live one is not touched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from fusedres.nn.inputs import Inputs, forward_of
from fusedres.nn.kinds import Kind, idle_facts, is_idle, kind_of, plain_type
from fusedres.nn.norms import behind_norm
from fusedres.nn.reading import MISSING, ClassFact, Reading, Seen, is_watched
from fusedres.nn.settings import FUNCTIONS, Unreadable, copied, is_constant
from fusedres.nn.symbols import Symbol


def read(
    module: nn.Module,
    inputs: Inputs | None = None,
    *,
    inlines: Callable[[nn.Module], bool] = lambda module: False,
    training: bool | None = None,
) -> Reading:
    """What a forward computes.

    Args:
        module: the live module, of which nothing changes.
        inputs: what it is called with; one tensor for each parameter without a default if not given.
        inlines: whether a module below it is to be read too; else its call is one node.
        training: in the place of every module's own mode, where it is given.

    Raises:
        Unreadable: with the reason.
    """
    return _Reader(module, inlines, training).read(inputs)


_TABLES = ("_parameters", "_buffers", "_modules")


class _Shadow:
    """Before a module's own class: notes what the forward asks of the module, and who is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _note_of(self).reader.called(self, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in ("__dict__", "__class__"):
            return own if name == "__dict__" else object.__getattribute__(self, name)
        note: _Note = own[_NOTE]
        if name in own:
            if name in _TABLES:
                if name == "_modules":
                    note.children = tuple(own[name])
                return own[name]
            return note.reader.constant(note, name, own[name])
        value = object.__getattribute__(self, name)
        note.reader.of_class(note.cls, name, value)
        return value

    def __getattr__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        note: _Note = own[_NOTE]
        for table in _TABLES:
            if name in own[table]:
                value = own[table][name]
                note.nones[table, name] = value is None
                is_tensor = value is not None and table != "_modules"
                return note.reader.tensor(note, name) if is_tensor else value
        note.facts[name] = MISSING
        note.nones.update(((table, name), True) for table in _TABLES)
        raise AttributeError(f"{note.cls.__name__} has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise Unreadable(f"its forward sets self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Unreadable(f"its forward deletes self.{name}")


_NOTE = "_fused_note"


def _note_of(shadow: Any) -> _Note:
    note: _Note = object.__getattribute__(shadow, "__dict__")[_NOTE]
    return note


class _Settings:
    """An object of a module that has its settings, such as a configuration."""

    def __init__(self, note: _Note, name: str, of: Any) -> None:
        self.__dict__.update(_note=note, _name=name, _of=of)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        if not is_constant(value):
            raise Unreadable(f"its forward reads self.{self._name}.{name}, a {type(value).__name__}")
        self._note.settings[self._name, name] = copied(value)
        return copied(value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Unreadable(f"its forward sets self.{self._name}.{name}")


@dataclass(eq=False)
class _Note:
    """Of a module that is read: itself, where it is, and what was asked of it."""

    reader: _Reader
    module: nn.Module
    path: str
    cls: type[nn.Module]
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[tuple[str, str], Any] = field(default_factory=dict)
    nones: dict[tuple[str, str], bool] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    children: tuple[str, ...] | None = None
    called: bool = False
    inlined: bool = False
    opaque: bool = False

    @property
    def is_asked(self) -> bool:
        """Whether the forward asked anything of it."""
        return bool(self.called or self.facts or self.settings or self.nones or self.children is not None)


_shadows: dict[type[nn.Module], type[nn.Module]] = {}


def _shadow_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _shadows:
        for base in cls.__mro__:
            if base is nn.Module:
                break
            for name in ("__getattr__", "__getattribute__"):
                if name in base.__dict__:
                    raise Unreadable(f"{base.__name__} has its own {name}")
        try:
            metaclass: Any = type(cls)
            made = metaclass(cls.__name__, (_Shadow, cls), {"__module__": cls.__module__})
        except Exception as error:
            raise Unreadable(f"{cls.__name__} can not be derived from: {error}") from error
        _shadows[cls] = made
    return _shadows[cls]


class _Reader(TracerBase):
    def __init__(self, module: nn.Module, inlines: Callable[[nn.Module], bool], training: bool | None) -> None:
        self.module, self.inlines, self.training = module, inlines, training
        self.graph = fx.Graph()
        self.notes: list[_Note] = []
        self.within: list[str] = []
        self.tensors: dict[tuple[str, str], Any] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self.modes = _modes()
        self.asks_for_classes = False

    def read(self, inputs: Inputs | None) -> Reading:
        forward = forward_of(plain_type(self.module))
        if isinstance(forward, str):
            raise Unreadable(forward)
        if "forward" in self.module.__dict__:
            raise Unreadable("its forward was replaced")
        inputs = forward.without_options() if inputs is None else inputs
        shadow = self.shadow(self.module, "", {})
        note = _note_of(shadow)
        note.called = note.inlined = True
        self.of_forward(note.cls)
        with _draws_kept(), _failing_as_unreadable():
            symbols = [self.create_proxy("placeholder", name, (), {}) for name in inputs.names]
            given, before = inputs.arguments(symbols), inputs.arguments(symbols)
            result = type(shadow).forward(shadow, **given)
            for name, count in inputs.tensors:
                if count >= 0 and _differ(given[name], before[name]):
                    raise Unreadable(f"its forward writes to the list {name}")
            self.graph.output(self.create_arg(result))
            for each in self.notes:
                written = next((name for name, value in each.given.items() if not _same(value, each.facts[name])), None)
                if written is not None:
                    raise Unreadable(f"its forward writes to self.{written}")
        return self.reading(inputs)

    def reading(self, inputs: Inputs) -> Reading:
        asked = [note for note in self.notes if note.is_asked]
        wanted = {""}
        for note in asked:
            steps = note.path.split(".")
            wanted.update(".".join(steps[:i]) for i in range(1, len(steps) + 1))
        seen: list[Seen] = []
        paths = {"": 0}
        for note in self.notes:
            if note.path not in wanted:
                continue
            parent, _, name = note.path.rpartition(".")
            paths[note.path] = len(seen)
            cls = None if note.opaque else note.cls
            facts, nones = tuple(note.facts.items()), tuple((*key, none) for key, none in note.nones.items())
            place = paths[parent] if note.path else -1
            settings = tuple((*key, value) for key, value in note.settings.items())
            seen.append(Seen(place, name, cls, facts, settings, nones, note.children, note.inlined))
        of_classes = tuple(ClassFact(*key, value) for key, value in self.of_classes.items())
        nodes = tuple(self.graph.nodes)
        return Reading(inputs, nodes, tuple(seen), paths, of_classes, self.graph, self.asks_for_classes)

    def shadow(self, module: nn.Module, path: str, made: dict[int, Any]) -> Any:
        """A module and everything below it, parents first."""
        if id(module) in made:
            return made[id(module)]
        cls = plain_type(module)
        shadow: Any = object.__new__(_shadow_class(cls))
        own = object.__getattribute__(shadow, "__dict__")
        own.update(module.__dict__)
        made[id(module)] = shadow
        note = _Note(self, module, path, cls)
        own[_NOTE] = note
        if self.training is not None:
            own["training"] = self.training
        self.notes.append(note)
        prefix = f"{path}." if path else ""
        own["_modules"] = {
            name: None if child is None else self.shadow(child, f"{prefix}{name}", made)
            for name, child in module._modules.items()
        }
        return shadow

    def constant(self, note: _Note, name: str, value: Any) -> Any:
        """An entry of a module's dictionary."""
        if name == _NOTE or name.startswith("_forward") or name.startswith("_backward"):
            return value
        if is_constant(value):
            note.facts[name] = copied(value)
            return note.given.setdefault(name, copied(value)) if isinstance(value, list | dict) else value
        if isinstance(value, FUNCTIONS):
            note.facts[name] = value
            return value
        if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
            return _Settings(note, name, value)
        raise Unreadable(f"its forward reads self.{name}, a {type(value).__name__}")

    def of_class(self, cls: type[nn.Module], name: str, value: Any) -> None:
        """An attribute of a module's class."""
        found = getattr(cls, name, MISSING)
        if found is not MISSING and name != "forward" and not isinstance(getattr(nn.Module, name, None), FunctionType):
            if not is_constant(found) and not callable(found) and not isinstance(found, property):
                raise Unreadable(f"its forward reads {cls.__name__}.{name}, a {type(found).__name__}")
            self.of_classes[cls, name] = found

    def of_forward(self, cls: type[nn.Module]) -> None:
        """The forward of a class, and those that it may call of its bases."""
        for base in cls.__mro__:
            if "forward" in base.__dict__ and base is not nn.Module:
                self.of_classes[base, "forward"] = base.__dict__["forward"]

    def tensor(self, note: _Note, name: str) -> Any:
        """A parameter or buffer of a module, as a symbol."""
        key = note.path, name
        if key not in self.tensors:
            target = f"{note.path}.{name}" if note.path else name
            self.tensors[key] = self.create_proxy("get_attr", target, (), {})
        return self.tensors[key]

    def called(self, shadow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a module below the one that is read."""
        note = _note_of(shadow)
        note.called = True
        module, kind = note.module, kind_of(note.module)
        layer = kind in (Kind.CONV, Kind.ACT) or (kind is Kind.NORM and not module._modules)
        if is_watched(module) and not layer:
            return self.opaque(note, args, kwargs)
        if kind is Kind.IDLE:
            training = module.training if self.training is None else self.training
            note.facts.update(idle_facts(module, training))
            if is_idle(module, training) and not self.is_folded(module, training, args) and len(args) == 1:
                return args[0]
            return self.create_proxy("call_module", note.path, args, kwargs)
        if kind is Kind.NORM:
            z = self.create_proxy("call_module", note.path, args, kwargs)
            return self.behind_norm(note, shadow, z)
        if kind in (Kind.CONV, Kind.ACT):
            if kind is Kind.ACT:
                own = module.__dict__
                note.facts.update((name, own[name]) for name in own if not name.startswith("_") and name != "training")
            return self.create_proxy("call_module", note.path, args, kwargs)
        if not self.inlines(module):
            return self.opaque(note, args, kwargs)
        note.inlined = True
        self.of_forward(note.cls)
        self.within.append(note.path)
        try:
            return type(shadow).forward(shadow, *args, **kwargs)
        finally:
            self.within.pop()

    def behind_norm(self, note: _Note, shadow: Any, z: Any) -> Any:
        """What a batch norm of a library runs behind the norm itself."""
        for name, _ in behind_norm(note.module):
            note.nones["_modules", name] = False
            z = object.__getattribute__(shadow, "__dict__")["_modules"][name](z)
        return z

    def opaque(self, note: _Note, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        note.opaque = True
        return self.create_proxy("call_module", note.path, args, kwargs)

    def is_folded(self, module: nn.Module, training: bool, args: tuple[Any, ...]) -> bool:
        """Whether an Identity stands where a batch norm was, which is in the convolution before it by now."""
        before = args[0].node if args and isinstance(args[0], fx.Proxy) else None
        if type(module) is not nn.Identity or training or before is None or before.op != "call_module":
            return False
        conv: Any = self.module.get_submodule(str(before.target))
        return kind_of(conv) is Kind.CONV and conv.bias is not None

    # What torch.fx asks of who follows a forward.

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Symbol(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        if _modes() != self.modes:
            raise Unreadable("its forward changes autograd's or autocast's mode")
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["within"] = tuple(self.within)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            raise Unreadable("its forward uses a tensor that is neither a parameter nor a buffer")
        if isinstance(a, nn.Module):
            raise Unreadable(f"its forward gives a {type(a).__name__} to a function")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Unreadable("its forward depends on values or shapes of tensors")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise Unreadable("its forward goes through a tensor or a list of unknown length")


def _differ(found: list[Any], before: list[Any]) -> bool:
    return len(found) != len(before) or any(one is not other for one, other in zip(found, before, strict=True))


def _same(value: Any, before: Any) -> bool:
    return is_constant(value) and bool(value == before)


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"), \
        torch.is_autocast_enabled("cpu")  # fmt: skip


@contextmanager
def _draws_kept() -> Iterator[None]:
    """Refuses what draws random numbers, and puts them back."""
    python, ours = random.getstate(), torch.get_rng_state()
    drew = False
    try:
        yield
    finally:
        if random.getstate() != python:
            drew = True
            random.setstate(python)
        if not torch.equal(torch.get_rng_state(), ours):
            drew = True
            torch.set_rng_state(ours)
    if drew:
        raise Unreadable("its forward draws random numbers to decide by")


@contextmanager
def _failing_as_unreadable() -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("its forward calls itself") from error
    except Exception as error:
        message = " ".join(str(error).split())
        raise Unreadable(f"its forward can not be followed ({type(error).__name__}: {message[:120]})") from error
