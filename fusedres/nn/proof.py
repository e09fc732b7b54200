"""Whether the steps of a structure compute what its forward does: both run on a small random input in fp64."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fusedres.nn.fused import Fused
from fusedres.nn.kinds import Kind, kind_of, plain_type
from fusedres.nn.settings import copied_setting
from fusedres.nn.sizes import input_sizes, work_of
from fusedres.nn.steps import FusedStep, Modules, Place, Step, filled, places_of
from fusedres.nn.structure import Finder, Structure

TOLERANCE = 1e-9
"""The largest difference, as a fraction of the largest value."""

MOST_WORK = 12_000_000
"""Multiplications of a forward that is tried as a whole; of a larger one, each fused pass is tried by itself, on layers
with fewer channels."""


def prove(structure: Structure, module: nn.Module, training: bool | None = None) -> str | None:
    """Why a structure is not to be trusted, or None: outputs, gradients and running statistics agree in fp64.

    Args:
        structure: of the module.
        module: the live module, of which nothing changes.
        training: in the place of every module's own mode, where it is given.
    """
    finder = Finder(training)
    wiring = _wiring(structure.found.steps, structure, module, finder), repr(structure.found.result), training
    if wiring in _trusted and not structure.reading.asks_for_classes:
        return None
    try:
        with _apart():
            reason = _prove(structure, module, training)
    except Exception as error:
        return _failed(error)
    if reason is None:
        _trusted.add(wiring)
    return reason


def prove_class(fused: type[Fused], module: nn.Module, channels: int) -> str | None:
    """The same of a fused class: whether it computes what the module's own does.

    Args:
        fused: the class.
        module: the live module, of its plain class; nothing of it changes.
        channels: of what it takes.
    """
    try:
        with _apart():
            for mode in (True, False):
                runs = []
                for cls in (plain_type(module), fused):
                    twin: Any = _Twins(mode).of(module)
                    twin.__class__ = cls
                    if cls is fused:
                        twin.fused_schedule = "moments"
                    x = _random((2, channels, 8, 8)).requires_grad_()
                    runs.append(_Run(partial(twin, x), [x], twin))
                reason = runs[0].differs(runs[1])
                if reason is not None:
                    return reason
    except Exception as error:
        return _failed(error)
    return None


def _failed(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"its fused form fails on a small input ({type(error).__name__}: {message[:160]})"


def _prove(structure: Structure, module: nn.Module, training: bool | None) -> str | None:
    asked = any(fact[0] == "training" for seen in structure.reading.seen for fact in seen.facts)
    modes = (training,) if asked or training is not None else (True, False)
    modules = structure.modules_in(module)
    folded = any(step.is_folded(modules) for step in structure.found.fused)
    small = not folded and work_of(structure.found, modules) <= MOST_WORK
    sizes = input_sizes(structure.reading, module) if small else None
    for mode in modes:
        whole = None if sizes is None else _whole(structure, module, mode, sizes)
        if whole is None and structure.reading.asks_for_classes:
            return "its forward asks for the class of what it is given, and could not be tried as a whole"
        reason = _pieces(structure, module, mode) if whole is None else whole
        if reason:
            return reason
    return None


@contextmanager
def _apart() -> Iterator[None]:
    """Whatever the caller's modes are; random numbers stay as they were."""
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), modes[0], modes[1], modes[2]:
        yield


def _whole(structure: Structure, module: nn.Module, mode: bool | None, sizes: Sequence[tuple[int, ...]]) -> str | None:
    """Why it is not to be trusted as a whole, or an empty string; None where no input was found for it."""
    inputs = structure.reading.inputs
    for scale in (1, 2, 4):
        scaled = [(n, c, h * scale, w * scale) for n, c, h, w in sizes]
        plain, fused = ([_random(size, 7 * i).requires_grad_() for i, size in enumerate(scaled)] for _ in range(2))
        try:
            twin, other = _Twins(mode).of(module), _Twins(mode).of(module)
            expected = _Run(partial(twin, **inputs.arguments(plain)), plain, twin)
        except Exception:  # it takes another size, or nothing on this machine
            continue
        run = partial(structure.run, cast(Fused, _Owner()), structure.modules_in(other), tuple(fused))
        found = _Run(run, fused, other)
        return expected.differs(found) or ""
    return None


def _pieces(structure: Structure, module: nn.Module, mode: bool | None) -> str | None:
    """Why one of the fused passes is not to be trusted, each by itself."""
    tried, finder = set(), Finder(mode)
    for step in structure.found.fused:
        key = _wiring([step], structure, module, finder)
        if key in tried:
            continue
        tried.add(key)
        first, second = (_Narrow(mode, structure, module, step) for _ in range(2))
        grads = not step.is_folded(first.modules)
        expected = _Run(partial(first.run_plain, step), first.inputs, first.holder, grads=grads)
        found = _Run(partial(second.run_fused, step, first.sizes), second.inputs, second.holder, grads=grads)
        reason = expected.differs(found)
        if reason is not None:
            return reason
    return None


def _wiring(steps: Sequence[Step], structure: Structure, module: nn.Module, finder: Finder) -> Any:
    """What steps do, equal where they do the same on layers that are built alike; what runs as it is does it in any
    case, and counts by its class."""
    numbers: dict[int, str] = defaultdict(lambda: f"#{len(numbers)}")
    found: list[Any] = []
    for step in steps:
        found.append((type(step), getattr(step, "act", None)))
        for node in step.nodes:
            target = node.target
            if node.op in ("call_module", "norm"):
                called = module.get_submodule(structure.paths[target])
                layer = kind_of(called) is not Kind.OTHER or type(called) in (nn.PReLU, nn.MaxPool2d)
                target = finder.fingerprint(called) if layer else plain_type(called)
            elif node.op == "get_attr":
                target = node.names
            operands = filled((node.args, node.kwargs, Place(node.out)), cast(Any, numbers))
            found.append((node.op, target, repr(operands)))
    return tuple(found)


_trusted: set[Any] = set()
"""Wirings of structures that were seen to compute the same, with their modes."""


class _Owner(SimpleNamespace):
    """Whose steps they are: no kernel failed, and every pass is to be taken."""

    fused_schedule = "moments"
    fused_failure: str | None = None
    fused_reordered: tuple[int, ...] | None = None
    training = True


class _Run:
    """A forward and its backward."""

    def __init__(
        self, forward: Callable[[], Any], inputs: Sequence[Tensor], module: nn.Module, *, grads: bool = True
    ) -> None:
        torch.default_generator.manual_seed(0)
        with torch.set_grad_enabled(grads):
            result = forward()
        outputs: list[Any] = []
        fx.node.map_aggregate(result, lambda a: outputs.append(a) if isinstance(a, Tensor) else None)
        self.values: dict[str, Tensor] = {f"output {i}": output for i, output in enumerate(outputs)}
        self.values.update(module.named_buffers())
        self.grads: dict[str, Tensor] = {}
        if grads:
            wanted = {**{f"input {i}": x for i, x in enumerate(inputs)}, **dict(module.named_parameters())}
            wanted = {name: x for name, x in wanted.items() if x.requires_grad}
            loss = sum((z * _random(z.shape, 5).to(z.dtype)).sum() for z in outputs if z.requires_grad)
            found = torch.autograd.grad(cast(Tensor, loss), list(wanted.values()), allow_unused=True)
            self.grads = {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}

    def differs(self, other: _Run) -> str | None:
        """What is not the same, or None."""
        # The gradient of a bias before a batch norm is 0, with the rounding of what it is summed of.
        largest = max((_largest(grad) for grad in self.grads.values()), default=0.0)
        reason = _difference(self.values, other.values, 1e-3, "")
        return reason or _difference(self.grads, other.grads, 0.1 * largest, "the gradient of ")


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor], least: float, what: str) -> str | None:
    if expected.keys() != found.keys():
        names = ", ".join(sorted(expected.keys() ^ found.keys()))
        return f"its fused form gives something else on a small input: {what}{names}"
    for name, value in expected.items():
        if value.shape != found[name].shape:
            return f"its fused form gives {what}{name} another shape, {tuple(found[name].shape)}"
        error, scale = _largest(value.double() - found[name].double()), max(_largest(value), least)
        if not error <= TOLERANCE * scale:
            return f"its fused form differs in fp64: {what}{name} by {error:.1e} of {scale:.1e}"
    return None


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0


@functools.cache
def _pool() -> Tensor:
    """Random numbers of variance 1, made once."""
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.rand(2**18, generator=generator, dtype=torch.float64, device="cpu") - 0.5) * 12**0.5


def _random(size: Sequence[int], at: int = 0) -> Tensor:
    count = 1
    for side in size:
        count *= side
    pool = _pool()
    at = at * 7919 % 4096
    while count + at > pool.numel():
        pool = pool.repeat(2)
    return pool[at : at + count].reshape(tuple(size)).clone()


_OWN_OF_MODULES = frozenset(nn.Module().__dict__)


class _Twins:
    """Modules that are built as others are, in fp64 on the CPU, with random numbers in their tensors and no hooks."""

    def __init__(self, mode: bool | None) -> None:
        self.mode = mode
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) in self.modules:
            return self.modules[id(module)]
        twin: nn.Module = object.__new__(_alone(plain_type(module)))
        self.modules[id(module)] = twin
        own = twin.__dict__
        for name, value in module.__dict__.items():
            if name == "process_group":
                continue
            if name in _OWN_OF_MODULES:
                own[name] = type(value)() if isinstance(value, dict) else value
            elif isinstance(value, Tensor):
                own[name] = self.tensor(name, value)
            elif not name.startswith("fused_"):
                own[name] = copied_setting(name, value)
        for table in ("_parameters", "_buffers"):
            own[table] = {
                name: None if t is None else self.tensor(name, t) for name, t in module.__dict__[table].items()
            }
        own["_modules"] = {name: None if m is None else self.of(m) for name, m in module._modules.items()}
        if self.mode is not None:
            own["training"] = self.mode
        return twin

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        if id(tensor) in self.tensors:
            return self.tensors[id(tensor)]
        made = _tensor(name, tensor, len(self.tensors) + 1)
        self.tensors[id(tensor)] = made
        return made


def _alone(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a twin: of a batch norm that waits for other processes, the same that waits for nobody."""
    return nn.BatchNorm2d if cls is nn.SyncBatchNorm else cls


def _tensor(name: str, tensor: Tensor, at: int, size: tuple[int, ...] | None = None) -> Tensor:
    size = tuple(tensor.shape) if size is None else size
    if not tensor.is_floating_point():
        return torch.zeros(size, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor.detach().cpu().clone()
    made = _random(size, at)
    if len(size) > 1:
        made /= max(1, made[0].numel()) ** 0.5
    else:
        made = made * 0.3 + (0.0 if name in ("running_mean", "bias") else 1.0)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


class _Narrow:
    """The layers of one fused pass, with few channels."""

    def __init__(self, mode: bool | None, structure: Structure, module: nn.Module, step: FusedStep) -> None:
        self.mode = mode
        self.channels: dict[int, int] = {}
        self.inputs: list[Tensor] = []
        self.sizes: dict[int, tuple[int, ...]] = {}
        called = [node.target for node in step.nodes if node.op in ("call_module", "norm")]
        found = {place: self.layer(module.get_submodule(structure.paths[place])) for place in called}
        self.holder = nn.ModuleList(found.values())
        self.modules = Modules(cast(Any, found), structure.paths)

    def layer(self, live: Any) -> nn.Module:
        """A layer like a live one."""
        twin: Any = object.__new__(_alone(plain_type(live)))
        twin.__dict__.update(_Twins(self.mode).of(nn.Identity()).__dict__)
        settings = ((name, value) for name, value in live.__dict__.items() if name not in twin.__dict__)
        twin.__dict__.update(settings)
        twin.__dict__["_modules"] = {name: _Twins(self.mode).of(child) for name, child in live._modules.items()}
        twin.__dict__["training"] = live.training if self.mode is None else self.mode
        kind = kind_of(live)
        if kind is Kind.CONV:
            groups = 1 if live.groups == 1 else 2
            narrow = self.narrow(live.in_channels), self.narrow(live.out_channels)
            twin.__dict__.update(groups=groups, in_channels=narrow[0], out_channels=narrow[1])
        each = kind is Kind.NORM or (type(live) is nn.PReLU and live.num_parameters > 1)
        width = self.narrow(_width_of(live)) if each else 0

        def size_of(tensor: Tensor) -> tuple[int, ...]:
            if kind is Kind.CONV:
                return (twin.out_channels, twin.in_channels // groups, *tensor.shape[2:])[: tensor.dim()]
            return (width,) if each and tensor.dim() else tuple(tensor.shape)

        for table in ("_parameters", "_buffers"):
            for at, (name, tensor) in enumerate(live.__dict__[table].items()):
                twin.__dict__[table][name] = None if tensor is None else _tensor(name, tensor, at + 11, size_of(tensor))
        return cast(nn.Module, twin)

    def narrow(self, channels: int) -> int:
        """Few channels in the place of so many: as few for as many."""
        return self.channels.setdefault(channels, 4 * (len(self.channels) + 1))

    def run_plain(self, step: FusedStep) -> Tensor:
        """The nodes; what they take from others is made for them."""
        values: dict[int, Any] = {}
        for node in step.nodes:
            for place in places_of(node.args):
                if place not in values:
                    values[place] = self.input(place, self.size_for(node, values))
            values[node.out] = node.run(self.modules.found, cast(Any, values))
        z: Tensor = values[step.nodes[-1].out]
        return z

    def size_for(self, node: Any, values: dict[int, Any]) -> tuple[int, ...]:
        beside = [values[place] for place in places_of(node.args) if place in values]
        if beside:
            return tuple(beside[0].shape)
        layer: Any = self.modules.found[node.target] if node.op in ("call_module", "norm") else None
        if isinstance(layer, nn.Conv2d):
            height, width = (11 + d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
            return 2, layer.in_channels, height, width - 1
        return 2, next(iter(self.channels.values()), 4), 6, 5

    def input(self, place: int, size: tuple[int, ...]) -> Tensor:
        self.sizes[place] = size
        made = _random(size, 17 + place).requires_grad_()
        self.inputs.append(made)
        return made * 1.0  # which may be written over

    def run_fused(self, step: FusedStep, sizes: dict[int, tuple[int, ...]]) -> Tensor:
        """The fused pass, on inputs of the same sizes."""
        values: dict[int, Any] = {place: self.input(place, size) for place, size in sizes.items()}
        values[-1] = set()
        z = step.attempt(cast(Fused, _Owner()), self.modules, cast(Any, values))
        if z is None:
            raise RuntimeError(step.why_not(self.modules) or "the pass can not be taken")
        return z


def _width_of(norm: nn.Module) -> int:
    """How many channels a batch norm or a PReLU takes."""
    own = norm.__dict__
    tensors = (*own["_parameters"].values(), *own["_buffers"].values())
    width = next((tensor.numel() for tensor in tensors if tensor is not None), own.get("num_features", 4))
    return int(width)
