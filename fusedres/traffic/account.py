"""An account of all that moves bytes: our launches and the library's calls, in order, each with its layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fusedres.runtime.launch import Launch, record
from fusedres.runtime.torch_private import DispatchMode, current_node, in_backward
from fusedres.traffic.aten import KINDS, Call, Cost, costs, laid_out
from fusedres.traffic.bystander import Bystander


@dataclass(frozen=True)
class Entry:
    """One launch.

    Attributes:
        name: of our kernel or of the library's call.
        kind: of work, one of `aten.KINDS`.
        read, written: bytes.
        flops: floating-point operations.
        reread: as in `aten.Cost`.
        layer: the module that it belongs to.
        backward: whether the backward pass made it.
        work: the launch or call, for a prediction of its time.
    """

    name: str
    kind: str
    read: int
    written: int
    flops: int
    reread: int
    layer: str
    backward: bool
    work: Launch | Call = field(repr=False)

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of ours."""
        return isinstance(self.work, Launch)

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Account(DispatchMode):
    """What happens inside of the ``with`` block, on meta tensors.

    Args:
        names: of the modules that entries are put under, by module; the innermost one that is running counts, and in
            the backward pass the one whose forward pass made the node.
        rest: the name of what belongs to none of them and runs before any, and of what runs behind one.
        target: the GPU whose launches a dry run makes; None where no kernel of ours shall run.
        grad_twice: as in `aten.costs`.
    """

    def __init__(
        self, names: Mapping[nn.Module, str], *, rest: tuple[str, str], target: str | None, grad_twice: bool = True
    ) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.names, self.rest, self.target, self.grad_twice = names, rest, target, grad_twice
        self.running: list[str] = []
        self._behind = False
        self._owner: dict[Any, str] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Account:
        with ExitStack() as stack:
            if self.target is not None:
                trace = stack.enter_context(record(self.target))
                trace.launches = _Listening(self)
            for module, name in self.names.items():
                stack.enter_context(_removed(module.register_forward_pre_hook(Bystander(self._entering(name)))))
                stack.enter_context(_removed(module.register_forward_hook(Bystander(self._leaving(name)))))
            super().__enter__()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._cleanup.close()
        self._owner.clear()
        self.running.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = laid_out(func, args, func(*args, **(kwargs or {})))
        for cost in costs(func, args, kwargs or {}, out, grad_twice=self.grad_twice):
            self._add(cost, Call.of(cost, args))
        return out

    def launched(self, launch: Launch) -> None:
        """Take down a launch of ours."""
        cost = Cost(launch.name, launch.kind, launch.bytes_read, launch.bytes_written, launch.flops)
        self._add(cost, launch)

    def layer(self) -> str:
        """The layer that is running now."""
        node = current_node()
        if node is not None:
            return self._owner.get(node, self.rest[0])
        return self._here()

    def _here(self) -> str:
        return self.running[-1] if self.running else self.rest[self._behind]

    def _add(self, cost: Cost, work: Launch | Call) -> None:
        self.entries.append(Entry(*cost, layer=self.layer(), backward=in_backward(), work=work))

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._claim(args, self._here())
            self.running.append(name)

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._claim(out, name)
            self.running.pop()
            self._behind = True

        return hook

    def _claim(self, tensors: Any, name: str) -> None:
        """Every node of the graph below ``tensors`` that belongs to no layer yet belongs to this one."""
        values = tensors if isinstance(tensors, (tuple, list)) else [tensors]
        pending = [value.grad_fn for value in values if isinstance(value, Tensor)]
        while pending:
            node = pending.pop()
            if node is not None and node not in self._owner:
                self._owner[node] = name
                pending.extend(edge for edge, _ in node.next_functions)


class _Listening(list[Launch]):
    """A trace's launches, told on as they come."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.account = account

    def append(self, launch: Launch) -> None:
        self.account.launched(launch)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def bytes_by_kind(entries: Iterable[Entry]) -> dict[str, int]:
    """Bytes of each kind of work, in the order of `KINDS`."""
    total = dict.fromkeys(KINDS, 0)
    for entry in entries:
        total[entry.kind] += entry.bytes
    return total
