"""Fused passes as nodes of a compiler's graph: the forward and the backward pass of each Function as an op of PyTorch.

A node holds what the pass is told as text (`runtime.text`), and does what the Function does in eager mode, by the same
code. What is kept for the backward pass are outputs of the forward op: activations and masks one by one, all vectors of
a dtype as one. What a pass keeps of its inputs is no output, but given to the backward op again.

An op writes to nothing that it is given: where a batch norm measures, the moved running statistics are its first
output behind z, and `fusedres::move_statistics` puts them, and the counts of batches, where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.layouts import arrived
from fusedres.autograd.saved import Given, Packed, Structure
from fusedres.context import context
from fusedres.operands import NormNumbers
from fusedres.ops.rows import channels_last
from fusedres.runtime.autocast import no_autocast
from fusedres.runtime.call import Call, gpu_of
from fusedres.runtime.launch import target_of, wants_kernels
from fusedres.runtime.replay import replayed
from fusedres.runtime.text import known, text_of, value_of
from fusedres.runtime.torch_private import copy_all, storage_id

LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
"""The namespace of the ops; they are there as soon as fusedres is imported."""

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# As exported programs hold it, its version: another one may tell the same differently.
_LAID_OUT = 1


class Passing(NamedTuple):
    """What a node is told.

    Attributes:
        version: of the way to tell it.
        spec: of the pattern.
        dtype, residual_dtype: of x and of the residual.
        places: which of the pattern's tensors are given.
        running: which are running statistics that it moves; all others are None.
        total: how many it has.
    """

    version: int
    spec: Any
    dtype: torch.dtype
    residual_dtype: torch.dtype | None
    places: tuple[int, ...]
    running: tuple[int, ...]
    total: int

    def every(self, given: Sequence[Any]) -> list[Any]:
        """One entry for each of the pattern's tensors."""
        every: list[Any] = [None] * self.total
        for place, one in zip(self.places, given, strict=True):
            every[place] = one
        return every


known(Passing, Call)

Norms = Sequence[tuple[int, NormNumbers]]
"""Where the tensors of a `Norm` begin among those of a pattern, and its numbers."""


class Kept(NamedTuple):
    """Where a backward pass finds what was packed.

    ``where`` tells of each packed tensor the kind of place, ``"x"``, ``"residual"``, ``"given"``, ``"z"``, ``"kept"``,
    or a dtype; and its index, or where it begins and ends among the vectors of that dtype.
    """

    where: tuple[tuple[Any, ...], ...]
    kept: int

    @property
    def of_x(self) -> bool:
        return any(one[0] == "x" for one in self.where)

    @property
    def of_residual(self) -> bool:
        return any(one[0] == "residual" for one in self.where)

    @property
    def of_z(self) -> bool:
        return any(one[0] == "z" for one in self.where)


# Whoever differentiates asks after the forward pass, on fake tensors too; what depends on no size but on these.
_kept: dict[tuple[Any, ...], Kept] = {}
# What a backward pass finds tensors in may hold sizes, which are known where a forward pass has run.
_structures: dict[tuple[Any, ...], tuple[Structure, Kept]] = {}
MOST_KEPT = 4096


def defined(function: Any) -> None:
    """Make the ops of a Function."""
    name = function.op
    LIBRARY.define(
        f"{name}(Tensor x, Tensor? residual, Tensor[] given, Tensor[] running, str spec) -> (Tensor, Tensor[])",
        tags=TAGS,
    )
    LIBRARY.define(
        f"{name}_backward(Tensor dz, Tensor? x, Tensor? residual, Tensor[] given, Tensor? z, Tensor[] kept, str spec, "
        "SymInt[] size, bool[] asked) -> Tensor[]", tags=TAGS,
    )  # fmt: skip

    def forward(*operands: Any) -> tuple[Tensor, list[Tensor]]:
        return _forward(function, *operands)

    def fake(*operands: Any) -> tuple[Tensor, list[Tensor]]:
        # By the formulas, whatever computes in the end: shapes and dtypes are the same.
        with context(backend="reference", replays=False, graphed=False):
            return _forward(function, *operands)

    def backward(dz: Tensor, *others: Any) -> list[Tensor]:
        return _backward(function, dz, *others)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
        x, residual, given, _, spec = inputs
        z, kept = output
        of = _kept.get(_key(function, spec, x))
        if of is None:
            ctx.spec = None
            return
        ctx.spec, ctx.size, ctx.counts = spec, x.shape, (len(given), len(kept))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if of.of_x else None, residual if of.of_residual else None, z if of.of_z else None, *given, *kept
        )

    def differentiated(ctx: Any, dz: Tensor | None, _: Any) -> tuple[Any, ...]:
        of_x, of_residual, of_given, of_running, _ = ctx.needs_input_grad
        none = [None] * len(of_running)
        if ctx.spec is None:
            raise RuntimeError(f"fusedres::{name}: the graph was made for a call without gradients, and kept nothing")
        if dz is None:
            return None, None, [None] * len(of_given), none, None
        x, residual, z, *others = ctx.saved_tensors
        given, kept = others[: ctx.counts[0]], others[ctx.counts[0] :]
        asked = [of_x, of_residual, *of_given]
        op = getattr(torch.ops.fusedres, f"{name}_backward").default
        found = iter(op(dz, x, residual, given, z, kept, ctx.spec, ctx.size, asked))
        grads = [next(found) if wanted else None for wanted in asked]
        return grads[0], grads[1], grads[2:], none, None

    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedres::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"fusedres::{name}_backward", _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"fusedres::{name}", differentiated, setup_context=setup, lib=LIBRARY)


def passed(function: Any, x: Tensor, residual: Tensor | None, spec: Any, tensors: Sequence[Tensor | None]) -> Tensor:
    """A call of a Function as a node of the graph that is made at this moment, and the moved statistics behind it.

    Raises:
        Untold: of constants that a graph can not carry.
    """
    spec = _alone(spec)
    running, counters = _moved(function.norms(spec), tensors)
    apart = {*running, *counters}
    given = {i: one for i, one in enumerate(tensors) if one is not None and i not in apart}
    residual_dtype = None if residual is None else residual.dtype
    passing = Passing(_LAID_OUT, spec, x.dtype, residual_dtype, tuple(given), tuple(running), len(tensors))
    held: list[Tensor] = []
    text = text_of(passing, held)
    assert not held
    if not spec.call.kernels:  # which read an image of few channels as it is
        x = channels_last(x)
    residual = None if residual is None else channels_last(residual)
    op = getattr(torch.ops.fusedres, function.op).default
    z: Tensor
    z, kept = op(x, residual, list(given.values()), list(running.values()), text)
    if running or counters:
        moved = kept[0].detach() if running else x.new_empty(0)
        with torch.no_grad():
            torch.ops.fusedres.move_statistics.default(list(running.values()), list(counters.values()), moved)
    return z


def _alone(spec: Any) -> Any:
    """A spec without what passes leave for each other in eager mode, by tensors."""
    own = {one.name for one in fields(spec)}
    without = {"partials": None, "measured": False, "hands_over": False}
    changed = {name: value for name, value in without.items() if name in own and getattr(spec, name)}
    return replace(spec, **changed) if changed else spec


def _moved(norms: Norms, tensors: Sequence[Tensor | None]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The running statistics that a pass moves, and the counters of batches, by their places."""
    measured = [at for at, numbers in norms if numbers.batch_stats]
    places = [(at + 2, at + 3) for at in measured], [(at + 5,) for at in measured]
    running, counters = (
        {place: tensor for at in of for place in at if (tensor := tensors[place]) is not None} for of in places
    )
    return running, counters


def _told(spec: str, x: Tensor) -> Passing:
    """What a node was told; what runs its kernels is the device that its tensors are on now.

    Raises:
        ValueError: another version of fusedres wrote it.
    """
    passing = value_of(spec)
    if not isinstance(passing, Passing) or passing.version != _LAID_OUT:
        raise ValueError(f"spec: expected the text of a pass of this version of fusedres, got {spec!r}")
    call: Call = passing.spec.call
    if call.kernels and wants_kernels(x):
        call = replace(call, device=x.device.type, target=target_of(x), gpu=gpu_of(x))
    elif (call.device, call.kernels) != (x.device.type, False):
        call = replace(call, device=x.device.type, kernels=call.kernels and x.device.type == call.device)
    return passing._replace(spec=replace(passing.spec, call=call))


def _key(function: Any, spec: str, x: Tensor) -> tuple[Any, ...]:
    return function.op, spec, x.is_contiguous(memory_format=torch.channels_last)


def _remember(store: dict[Any, Any], key: Any, value: Any) -> None:
    if len(store) >= MOST_KEPT and key not in store:
        store.pop(next(iter(store)))
    store[key] = value


def _forward(
    function: Any, x: Tensor, residual: Tensor | None, given: list[Tensor], running: list[Tensor], spec: str
) -> tuple[Tensor, list[Tensor]]:
    passing = _told(spec, x)
    if residual is x:  # by whom they are told apart what a compiler found to be one tensor stays two
        residual = x.view_as(x)
    tensors = passing.every(given)
    statistics = torch.cat(running) if running else None
    if statistics is not None:
        parts = statistics.split([one.shape[0] for one in running])
        for place, part in zip(passing.running, parts, strict=True):
            tensors[place] = part
    with torch.no_grad(), no_autocast(x.device.type):
        run = replayed(function.run, x, residual, passing.spec, tuple(tensors), None)
        outputs = _Outputs(x, residual, given, run.z, statistics)
        if run.saved is None:
            return outputs.z, outputs.kept
        where = tuple([outputs.place(tensor) for tensor in run.saved.tensors])
        every = [*outputs.kept, *outputs.joined()]
    kept = Kept(where, len(outputs.kept))
    _remember(_kept, _key(function, spec, x), kept)
    if not _is_fake(x):
        _remember(_structures, _full_key(function, spec, x.shape, every), (run.saved.structure, kept))
    return outputs.z, every


def _full_key(function: Any, spec: str, size: Sequence[int], kept: Sequence[Tensor]) -> tuple[Any, ...]:
    return function.op, spec, tuple(size), tuple([tensor.shape for tensor in kept])


def _is_fake(x: Tensor) -> bool:
    return type(x) is not Tensor and not isinstance(x, torch.nn.Parameter)


class _Outputs:
    """What an op gives, none of it in the memory of another or of an input."""

    def __init__(
        self, x: Tensor, residual: Tensor | None, given: list[Tensor], z: Tensor, statistics: Tensor | None
    ) -> None:
        self.z = _in_rows(z)
        self.kept = [] if statistics is None else [statistics]
        self._taken = {storage_id(self.z)}
        self._places: dict[int, tuple[Any, ...]] = {id(one): ("given", i) for i, one in enumerate(given)}
        self._places |= {id(z): ("z",), id(x): ("x",)}
        if residual is not None:
            self._places[id(residual)] = ("residual",)
        self._vectors: dict[torch.dtype, list[Tensor]] = {}
        self._held: list[Tensor] = []

    def place(self, tensor: Tensor) -> tuple[Any, ...]:
        """Where the backward pass finds a tensor that was packed."""
        if id(tensor) not in self._places:
            self._places[id(tensor)] = self._new(tensor)
            self._held.append(tensor)  # so that no other has its id meanwhile
        return self._places[id(tensor)]

    def _new(self, tensor: Tensor) -> tuple[Any, ...]:
        if tensor.dim() == 1:
            vectors = self._vectors.setdefault(tensor.dtype, [])
            begin = sum(vector.shape[0] for vector in vectors)
            vectors.append(tensor)
            return tensor.dtype, begin, begin + tensor.shape[0]
        own = _in_rows(tensor)
        if storage_id(own) in self._taken:
            own = own.clone()
        self._taken.add(storage_id(own))
        self.kept.append(own)
        return "kept", len(self.kept) - 1

    def joined(self) -> list[Tensor]:
        """The vectors of each dtype."""
        return [torch.cat(vectors) for vectors in self._vectors.values()]


def _in_rows(tensor: Tensor) -> Tensor:
    """Laid out as every op leaves it."""
    if tensor.dim() != 4 or not tensor.dtype.is_floating_point:
        return tensor.contiguous()
    return channels_last(tensor)


def _backward(
    function: Any, dz: Tensor, x: Tensor | None, residual: Tensor | None, given: list[Tensor], z: Tensor | None,
    kept: list[Tensor], spec: str, size: Sequence[int], asked: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    passing = _told(spec, dz)
    key = _full_key(function, spec, size, kept)
    if key not in _structures:
        raise RuntimeError(f"fusedres::{function.op}_backward: its forward op has not run in this process")
    structure, where = _structures[key]
    dtypes = list(dict.fromkeys(one[0] for one in where.where if isinstance(one[0], torch.dtype)))
    vectors = dict(zip(dtypes, kept[where.kept :], strict=True))

    def found(kind: Any, *at: int) -> Any:
        if kind == "x" or kind == "residual" or kind == "z":
            return {"x": x, "residual": residual, "z": z}[kind]
        if kind == "given" or kind == "kept":
            return (given if kind == "given" else kept)[at[0]]
        return vectors[kind][slice(*at)]

    packed = Packed(structure, tuple([found(*one) for one in where.where]))
    told = (asked[0], asked[1], False, *[bool(one) for one in passing.every(asked[2:])])
    of = Given(passing.dtype, tuple(size), passing.residual_dtype, told)
    with torch.no_grad(), no_autocast(dz.device.type):
        gradients = replayed(function.go_back, arrived(dz, passing.spec.call, None), None, passing.spec, packed, of)
        every = [gradients.dx, gradients.dresidual, *[gradients.tensors[place] for place in passing.places]]
        taken = {storage_id(one) for one in (dz, x, residual, z, *given, *kept) if one is not None}
        outputs: list[Tensor] = []
        for wanted, grad, like in zip(asked, every, _likes(dz, given, passing, size), strict=True):
            if not wanted:
                continue
            own = _as(grad, *like, dz.device)
            if storage_id(own) in taken:
                own = own.clone()
            taken.add(storage_id(own))
            outputs.append(own)
    return outputs


Like = tuple[Sequence[int], Sequence[int] | None, torch.dtype]
"""The size, strides and dtype of a gradient; without strides it is channels_last."""


def _likes(dz: Tensor, given: Sequence[Tensor], passing: Passing, size: Sequence[int]) -> list[Like]:
    """Of the gradients of x, of the residual and of all that is given."""
    of_residual: Like = (dz.shape, None, passing.residual_dtype or dz.dtype)
    return [(size, None, passing.dtype), of_residual, *[(one.shape, one.stride(), one.dtype) for one in given]]


def _as(
    grad: Tensor | None, size: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype, device: Any
) -> Tensor:
    """A gradient in its layout; nothing that was asked for is left out."""
    if grad is None:
        return _empty(size, strides, dtype, device).zero_()
    if strides is None:
        return channels_last(grad.to(dtype))
    if grad.stride() == tuple(strides) and grad.dtype == dtype:
        return grad
    return _empty(size, strides, dtype, device).copy_(grad)


def _empty(size: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype, device: Any) -> Tensor:
    if strides is None:
        return torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)
    return torch.empty_strided(size, strides, dtype=dtype, device=device)


def _fake_backward(
    dz: Tensor, x: Tensor | None, residual: Tensor | None, given: list[Tensor], z: Tensor | None, kept: list[Tensor],
    spec: str, size: Sequence[int], asked: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    likes = _likes(dz, given, value_of(spec), size)
    return [_empty(*like, dz.device) for like, wanted in zip(likes, asked, strict=True) if wanted]


LIBRARY.define("move_statistics(Tensor(a!)[] running, Tensor(b!)[] counters, Tensor moved) -> ()", tags=TAGS[:1])


def _move(running: list[Tensor], counters: list[Tensor], moved: Tensor) -> None:
    for counter in counters:
        counter.add_(1)
    if running:
        copy_all(running, list(moved.split([one.shape[0] for one in running])))


LIBRARY.impl("move_statistics", _move, "CompositeExplicitAutograd")
torch.library.register_fake("fusedres::move_statistics", lambda running, counters, moved: None, lib=LIBRARY)
