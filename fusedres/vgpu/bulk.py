"""PTX of sm_90 and later for tensor maps, mbarriers and bulk copies, as calls into the runtime (bulk.c)."""

import re
from collections.abc import Callable, Sequence

from fusedres.vgpu.errors import NotExecutable
from fusedres.vgpu.ir import Body
from fusedres.vgpu.ptx import Address, Corner, Registers, Statement

# In the order of bulk.c.
FIELDS = (
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
    "interleave_layout", "swizzle_mode", "fill_mode",
)  # fmt: skip
MAX_RANK = 5
_SHARED = r"shared(?:::cta|::cluster)?"  # of a cluster of one block

PHASE_WAIT = re.compile(
    r"\s*\{\s*(?:@!(?P<predicate>\$\d+) bra\.uni skipWait;\s*)?\.reg \.pred complete;\s*waitLoop:\s*"
    rf"mbarrier\.try_wait\.parity\.{_SHARED}\.b64 complete, \[(?P<mbarrier>\$\d+)\], (?P<parity>\$\d+);\s*"
    r"@!complete bra\.uni waitLoop;\s*(?:skipWait:\s*)?\}\s*"
)

Typed = tuple[str, str]


class _Call:
    """One instruction under construction as a call of the runtime."""

    def __init__(self, body: Body, statement: Statement, registers: Registers) -> None:
        self._body, self._registers = body, registers
        self._operands = statement.operands
        on = "true" if statement.predicate is None else registers.value(statement.predicate)
        self._on = ("i32", body.value(f"zext i1 {on} to i32"))
        self._site = ("i32", f"%p{len(body.parameters) - 1}")

    def pointer(self, index: int) -> Typed:
        address = self._operands[index]
        if not isinstance(address, Address):
            raise NotExecutable(f"an address of the form {address!r}")
        return "ptr", self._body.at(self._registers.value(address.register), address.offset)

    def number(self, index: int, type_: str = "i32") -> Typed:
        """An immediate number or a register, a pointer's too."""
        operand = str(self._operands[index])
        if not operand.startswith("$"):
            return type_, self._registers.value(operand)
        held, value = self._registers.typed(operand)
        if held == type_:
            return held, value
        return type_, self._body.value(f"{'ptrtoint' if held == 'ptr' else 'zext'} {held} {value} to {type_}")

    def corner(self, index: int, rank: str) -> tuple[Typed, list[Typed]]:
        """A tensor map, and its rank with the coordinates of a box."""
        corner = self._operands[index]
        if not isinstance(corner, Corner) or len(corner.coordinates) != int(rank):
            raise NotExecutable(f"the corner {corner!r} of a box of {rank} dimensions")
        coordinates = [self._registers.typed(register) for register in corner.coordinates]
        padding: list[Typed] = [("i32", "0")] * (MAX_RANK - len(coordinates))
        return ("ptr", self._registers.value(corner.register)), [("i32", rank), *coordinates, *padding]

    def made(self, symbol: str, *arguments: Typed) -> None:
        self._body.call("void", symbol, self._on, *arguments, self._site)

    def met(self, symbol: str, *arguments: Typed) -> None:
        self._body.met(symbol, "void", *arguments, self._on, self._site)


def _replace(call: _Call, match: re.Match[str]) -> None:
    field = FIELDS.index(match[1])
    *which, value = range(1, 3 if match[1] in ("box_dim", "global_dim", "global_stride", "element_stride") else 2)
    place = call.number(which[0]) if which else ("i32", "0")
    call.made(
        "vgpu_tensormap_replace", call.pointer(0), ("i32", str(field)), place, call.number(value, "i64")
    )  # fmt: skip


def _load(call: _Call, match: re.Match[str]) -> None:
    map_, corner = call.corner(1, match[1])
    call.made("vgpu_bulk_load", call.pointer(0), map_, call.pointer(2), *corner)


def _store(call: _Call, match: re.Match[str]) -> None:
    map_, corner = call.corner(0, match[1])
    call.made("vgpu_bulk_store", map_, call.pointer(1), *corner)


_ONE, _NONE = ("i32", "1"), ("i32", "0")
_RULES: dict[str, Callable[[_Call, re.Match[str]], None]] = {
    rf"tensormap\.replace\.tile\.(\w+)\.{_SHARED}\.b1024\.b(?:32|64)": _replace,
    rf"tensormap\.cp_fenceproxy\.global\.{_SHARED}\.tensormap::generic\.release\.gpu\.sync\.aligned": (
        lambda call, match: call.met("vgpu_tensormap_publish", call.pointer(0), call.pointer(1))
    ),
    r"fence\.proxy\.tensormap::generic\.acquire\.gpu": (
        lambda call, match: call.made("vgpu_tensormap_acquire", call.pointer(0))
    ),
    rf"mbarrier\.init\.{_SHARED}\.b64": (
        lambda call, match: call.made("vgpu_mbarrier_init", call.pointer(0), call.number(1))
    ),
    rf"mbarrier\.inval\.{_SHARED}\.b64": lambda call, match: call.made("vgpu_mbarrier_inval", call.pointer(0)),
    rf"mbarrier\.arrive\.{_SHARED}\.b64": (
        lambda call, match: call.made("vgpu_mbarrier_arrive", call.pointer(1), _ONE, _NONE)
    ),
    rf"mbarrier\.arrive\.expect_tx\.{_SHARED}\.b64": (
        lambda call, match: call.made("vgpu_mbarrier_arrive", call.pointer(1), _ONE, call.number(2))
    ),
    rf"cp\.async\.bulk\.tensor\.([1-5])d\.{_SHARED}\.global\.mbarrier::complete_tx::bytes": _load,
    rf"cp\.async\.bulk\.tensor\.([1-5])d\.global\.{_SHARED}\.bulk_group": _store,
    r"cp\.async\.bulk\.commit_group": lambda call, match: call.made("vgpu_bulk_commit"),
    r"cp\.async\.bulk\.wait_group(?:\.read)?": lambda call, match: call.made("vgpu_bulk_wait", call.number(0)),
}


def _rule(statement: Statement) -> tuple[Callable[[_Call, re.Match[str]], None], re.Match[str]] | None:
    matches = ((rule, re.fullmatch(pattern, statement.opcode)) for pattern, rule in _RULES.items())
    return next(((rule, match) for rule, match in matches if match is not None), None)


def knows(statements: Sequence[Statement]) -> bool:
    """Whether all of these are instructions of this file."""
    return all(_rule(statement) is not None for statement in statements)


def emit(body: Body, statements: Sequence[Statement], registers: Registers) -> None:
    """The body of an inline assembly statement of these instructions, which give nothing."""
    for statement in statements:
        found = _rule(statement)
        assert found is not None
        rule, match = found
        rule(_Call(body, statement, registers), match)
    body.give()


def wait_for_phase(body: Body, match: re.Match[str], registers: Registers) -> None:
    """The body of the loop that waits at an mbarrier, found by `PHASE_WAIT`."""
    statement = Statement(match["predicate"], "", [Address(match["mbarrier"], 0), match["parity"]])
    call = _Call(body, statement, registers)
    call.met("vgpu_mbarrier_wait", call.pointer(0), call.number(1))
    body.give()


def commit(body: Body, match: re.Match[str]) -> None:
    """The intrinsic that ends a group of stores."""
    body.call("void", "vgpu_bulk_commit", _ONE, ("i32", "-1"))
    body.give()


def wait(body: Body, match: re.Match[str]) -> None:
    """The intrinsic that waits for groups of stores."""
    body.call("void", "vgpu_bulk_wait", _ONE, ("i32", "%p0"), ("i32", "-1"))
    body.give()
