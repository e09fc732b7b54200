"""LLVM IR of a GPU rewritten for the host: what only a GPU can do becomes a call into the runtime.

The text of the module is read line by line. Accesses to global (1) and shared (3) memory announce themselves to the
runtime; the target's intrinsics and inline assembly become small functions, built by the rules of that target
(`nvidia`, `amd`). Whatever no rule knows is refused by name.
"""

import functools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy

from fusedres.vgpu.errors import NotExecutable

ENTRY = "vgpu_entry"
SLOT = 8  # bytes of an argument in the block that the entry point unpacks

_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


def size_of(type_: str) -> int:
    """Bytes that a scalar or vector of LLVM type ``type_`` takes in memory; a vector's elements lie bit to bit."""
    vector = re.fullmatch(r"<(\d+) x (\w+)>", type_)
    count, element = (int(vector[1]), vector[2]) if vector else (1, type_)
    whole = re.fullmatch(r"i(\d+)", element)
    if element not in _BITS and not whole:
        raise NotExecutable(f"a value of LLVM type {type_}")
    bits = int(whole[1]) if whole else _BITS[element]
    return max(count * bits // 8, 1)


class Body:
    """A function under construction that takes ``%p0``, ``%p1``... and returns ``returns``."""

    def __init__(self, returns: str, parameters: Sequence[str], rewriter: "Rewriter") -> None:
        self.returns = returns
        self.parameters = tuple(parameters)
        self._rewriter = rewriter
        self._lines: list[str] = []
        self._values = 0

    def line(self, text: str) -> None:
        self._lines.append(("" if text.endswith(":") else "  ") + text)

    def value(self, text: str) -> str:
        """Emit an instruction and name its result."""
        self._values += 1
        self.line(f"%v{self._values} = {text}")
        return f"%v{self._values}"

    def call(self, returns: str, symbol: str, *arguments: tuple[str, str]) -> str:
        """Call a function of the runtime or of the C library; (type, value) arguments."""
        self._rewriter.declare(returns, symbol, [type_ for type_, _ in arguments])
        text = f"call {returns} @{symbol}({', '.join(f'{t} {v}' for t, v in arguments)})"
        if returns == "void":
            self.line(text)
            return ""
        return self.value(text)

    def at(self, pointer: str, offset: int) -> str:
        return self.value(f"getelementptr i8, ptr {pointer}, i64 {offset}")

    def meet(self, operation: str, *members: tuple[str, str]) -> None:
        """All lanes of the warp bring ``members`` to ``operation`` and return what it gives each of them."""
        self.give(self.met(operation, self.returns, *members))

    def met(self, operation: str, returns: str, *members: tuple[str, str]) -> str:
        """What ``operation``, to which all lanes of the warp bring ``members``, gives this one."""
        widened = [
            ("i32", self.value(f"zext i1 {value} to i32")) if type_ == "i1" else (type_, value)
            for type_, value in members
        ]
        block = "{ " + ", ".join(type_ for type_, _ in widened) + " }" if widened else "{ i32 }"
        given = self.value(f"alloca {block}, align 32")
        result = "null" if returns == "void" else self.value(f"alloca {returns}, align 32")
        for index, (type_, value) in enumerate(widened):
            member = self.value(f"getelementptr {block}, ptr {given}, i32 0, i32 {index}")
            self.line(f"store {type_} {value}, ptr {member}, align {min(4, size_of(type_))}")
        self.join(operation, given, result)
        return "" if returns == "void" else self.value(f"load {returns}, ptr {result}, align 4")

    def join(self, operation: str, given: str, result: str) -> None:
        """Meet with the block of memory ``given``, and take the result in the block ``result``."""
        self._rewriter.declare("void", operation, ["ptr", "i32"])
        self.call("void", "vgpu_meet", ("ptr", f"@{operation}"), ("ptr", given), ("ptr", result))

    @property
    def site(self) -> int:
        """Number of the place in the kernel that this function is made for."""
        return self._rewriter.site

    def give(self, value: str = "") -> None:
        """Return."""
        self.line(f"ret {self.returns} {value}".rstrip())

    def give_members(self, values: Sequence[str]) -> None:
        """Return one value, or a struct of several."""
        types = members_of(self.returns)
        if not self.returns.startswith("{"):
            self.give(values[0])
            return
        whole = "poison"
        for index, (type_, value) in enumerate(zip(types, values, strict=True)):
            whole = self.value(f"insertvalue {self.returns} {whole}, {type_} {value}, {index}")
        self.give(whole)

    def text(self, name: str) -> str:
        parameters = ", ".join(f"{type_} %p{index}" for index, type_ in enumerate(self.parameters))
        lines = "\n".join(self._lines)
        return f"define internal {self.returns} @{name}({parameters}) alwaysinline {{\n{lines}\n}}\n"


def members_of(type_: str) -> list[str]:
    """The member types of a struct of scalars, or the type itself."""
    return [member.strip() for member in type_.strip("{} ").split(",")] if type_.startswith("{") else [type_]


class AsmCall(NamedTuple):
    """An inline assembly statement: its text, its constraints, and the types of what it gives and takes."""

    template: str
    constraints: str
    returns: str
    parameters: tuple[str, ...]

    @property
    def outputs(self) -> int:
        return sum(constraint.startswith("=") for constraint in self.constraints.split(","))


class IntrinsicRule(Protocol):
    """Builds the body of an intrinsic from the match of its name; the parameters are those of its declaration."""

    def __call__(self, body: Body, match: re.Match[str]) -> None: ...


# Builds the body of an inline assembly statement, whose last parameter is the number of the place it stands at.
AsmRule = Callable[[Body, AsmCall], None]


class Dialect(NamedTuple):
    """How the IR of one vendor names what only its GPUs can do."""

    prefix: str
    intrinsics: Sequence[tuple[str, IntrinsicRule]]
    asm: AsmRule | None
    # What the vendor's library of functions asks the compiler about the target, and the answers.
    reflected: Mapping[str, int]


class Site(NamedTuple):
    """A place in the kernel where memory is accessed or threads wait."""

    line: int  # of the kernel's source, 0 if the compiler did not say


_TYPE = r"(?:\{[^}]*\}|<[^>]*>|\w+(?: addrspace\(\d+\))?)"
_NAME = r"%[\w.$-]+"
_ASM = re.compile(
    rf'call (?P<returns>{_TYPE}) asm (?:sideeffect )?"(?P<template>(?:[^"\\]|\\.)*)", "(?P<constraints>[^"]*)"'
    r"\((?P<arguments>.*?)\)(?=,? ?!|,? ?#|$)"
)
_LOAD = re.compile(
    rf"^\s*{_NAME} = load (?P<type>{_TYPE}), ptr addrspace\((?P<space>\d+)\) (?P<pointer>{_NAME}), align (?P<align>\d+)"
)
_STORE = re.compile(
    rf"^\s*store (?!volatile |atomic )(?P<type>{_TYPE}) (?P<value>.+), "
    rf"ptr addrspace\((?P<space>\d+)\) (?P<pointer>{_NAME}), align (?P<align>\d+)"
)
_CONSTANT = re.compile(
    r"\b(?P<op>getelementptr|ptrtoint)(?: inbounds| nuw| nusw)* \((?P<inside>(?:addrspace\(\d+\)|[^()])*)\)"
)
_ARGUMENT = re.compile(rf"\s*({_TYPE})\s+((?:[a-z]\w*(?:\([^)]*\))? )*)(\S.*?)\s*$")
_STRING = re.compile(r'^(@[\w.]+) = .*\bconstant \[\d+ x i8\] c"(\w+)\\00"')
_REFLECT = re.compile(r"call i32 @__nvvm_reflect\(ptr (?:\w+ )*(@[\w.]+)\)")
GLOBAL, SHARED, CONSTANT = "1", "3", "4"


class Module(NamedTuple):
    """IR for the host, and what its runtime will need to know."""

    text: str
    parameters: tuple[str, ...]  # LLVM types of the kernel's arguments, the compiler's own two included
    sites: tuple[Site, ...]


class Rewriter:
    """One module on its way to the host."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._declared: dict[str, str] = {}
        self._functions: dict[object, tuple[str, str]] = {}
        self._sites: list[Site] = []
        self._lines_of_locations: dict[str, int] = {}
        self._strings: dict[str, str] = {}

    def declare(self, returns: str, symbol: str, parameters: Sequence[str]) -> None:
        self._declared[symbol] = f"declare {returns} @{symbol}({', '.join(parameters)})\n"

    def rewrite(self, llir: str, name: str) -> Module:
        """The host's version of ``llir``, whose kernel is called ``name``."""
        locations = re.findall(r"^!(\d+) = .*?DILocation\(line: (\d+)", llir, re.M)
        self._lines_of_locations = {number: int(line) for number, line in locations}
        out: list[str] = []
        signatures = self._signatures(llir)
        lines = iter(llir.splitlines())
        for line in lines:
            if line.startswith("define "):
                body = []
                for inner in lines:
                    if inner == "}":
                        break
                    body.append(inner)
                out += [_host_syntax(line), *self._function(body, signatures), "}"]
            elif line.startswith("declare ") and f"@llvm.{self._dialect.prefix}." not in line:
                out.append(_host_syntax(line))
            elif string := _STRING.match(line):
                self._strings[string[1]] = string[2]
            elif line.startswith("@") and not re.match(r"@global_smem = .*external", line):
                raise NotExecutable(f"the global {line.split(' ')[0]}")
        parameters = self._kernel_parameters(llir, name)
        functions = [text for _, text in self._functions.values()]
        text = "\n".join(out) + "\n" + "".join([*functions, *self._declared.values(), _entry(name, parameters)])
        return Module(text, parameters, tuple(self._sites))

    def _signatures(self, llir: str) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return and parameter types of each intrinsic that the module declares."""
        found = {}
        for head, name, parameters in re.findall(r"^declare (.*?) ?@(llvm\.[\w.]+)\(([^\n]*)\)", llir, re.M):
            returns = re.search(rf"({_TYPE})$", _plain(head))
            types = [re.match(rf"\s*({_TYPE})", _plain(p)) for p in _split(parameters)]
            assert returns is not None
            found[name] = (returns[1], tuple(t[1] for t in types if t is not None))
        return found

    def _kernel_parameters(self, llir: str, name: str) -> tuple[str, ...]:
        header = re.search(rf"^define [^\n]*@{re.escape(name)}\(([^\n]*)\)[^\n(]*\{{$", _no_attributes(llir), re.M)
        if header is None:
            raise NotExecutable(f"a module without a kernel called {name}")
        types = [re.match(rf"\s*({_TYPE})", _plain(parameter)) for parameter in _split(header[1])]
        return tuple(type_[1] for type_ in types if type_ is not None)

    def _site(self, line: str) -> int:
        location = re.search(r"!dbg !(\d+)", line)
        self._sites.append(Site(self._lines_of_locations.get(location[1], 0) if location else 0))
        return len(self._sites) - 1

    def _function(self, body: list[str], signatures: dict[str, tuple[str, tuple[str, ...]]]) -> list[str]:
        body, prologue = _with_shared_memory(body)
        scratch: dict[str, str] = {}
        out = []
        for line in body:
            out += self._instruction(line, signatures, scratch)
        prologue += [f"  {name} = alloca {type_}, align 16" for type_, name in scratch.items()]
        if any("%vgpu.shared" in line for line in prologue):
            self.declare("ptr", "vgpu_shared", [])
        first = 1 if out and re.match(r"^[\w.\"-]+:", out[0]) else 0
        return out[:first] + prologue + out[first:]

    def _instruction(
        self, line: str, signatures: dict[str, tuple[str, tuple[str, ...]]], scratch: dict[str, str]
    ) -> list[str]:
        line = _REFLECT.sub(self._reflection, line)
        asm = _ASM.search(line)
        if asm is None and re.search(r"\basm\b", line):
            raise NotExecutable(f"inline assembly: {line.strip()}")
        if asm is not None:
            return [_host_syntax(line[: asm.start()] + self._asm_call(asm, line) + line[asm.end() :])]
        for word in ("atomicrmw", "cmpxchg"):
            if re.search(rf"\b{word}\b", line):
                raise NotExecutable(f"the atomic operation {word}")
        name = re.search(rf"@(llvm\.{self._dialect.prefix}\.[\w.]+)\(", line)
        if name is not None:
            function = self._intrinsic(name[1], signatures[name[1]], line)
            return [_host_syntax(line.replace(f"@{name[1]}(", f"@{function}("))]
        load, store = _LOAD.match(line), _STORE.match(line)
        if load is not None and load["space"] == CONSTANT:
            return [_host_syntax(line)]
        if load is not None:
            return [self._announce("read", load, line), _host_syntax(line)]
        if store is not None and store["space"] == SHARED:
            return self._shared_store(store, line, scratch)
        if store is not None:
            return [self._announce("write", store, line), _host_syntax(line)]
        if re.match(rf"\s*(?:{_NAME} = load|store) ", line):
            raise NotExecutable(f"the access {line.strip()}")
        return [_host_syntax(line)]

    def _reflection(self, call: re.Match[str]) -> str:
        question = self._strings.get(call[1], call[1])
        if question not in self._dialect.reflected:
            raise NotExecutable(f"the compiler's answer to {question}")
        return f"add i32 0, {self._dialect.reflected[question]}"

    def _announce(self, verb: str, access: re.Match[str], line: str) -> str:
        memory = {GLOBAL: "global", SHARED: "shared"}.get(access["space"])
        if memory is None:
            raise NotExecutable(f"memory of address space {access['space']}: {line.strip()}")
        self.declare("void", f"vgpu_{memory}_{verb}", ["ptr", "i32", "i32", "i32"])
        size = size_of(access["type"])
        return (
            f"  call void @vgpu_{memory}_{verb}(ptr {access['pointer']}, i32 {size}, i32 {access['align']}, "
            f"i32 {self._site(line)})"
        )

    def _shared_store(self, store: re.Match[str], line: str, scratch: dict[str, str]) -> list[str]:
        type_ = store["type"]
        held = scratch.setdefault(type_, f"%vgpu.held.{len(scratch)}")
        self.declare("void", "vgpu_shared_write", ["ptr", "ptr", "i32", "i32", "i32"])
        return [
            _host_syntax(f"  store {type_} {store['value']}, ptr {held}"),
            f"  call void @vgpu_shared_write(ptr {store['pointer']}, ptr {held}, i32 {size_of(type_)}, "
            f"i32 {store['align']}, i32 {self._site(line)})",
        ]

    def _intrinsic(self, name: str, signature: tuple[str, tuple[str, ...]], line: str) -> str:
        short = name.removeprefix(f"llvm.{self._dialect.prefix}.")
        for pattern, rule in self._dialect.intrinsics:
            match = re.fullmatch(pattern, short)
            if match is None:
                continue
            # Two barriers are two places: warps that wait at different ones have diverged. So are two accesses.
            key = (name, self._site(line)) if re.search("barrier|buffer", name) else name
            return self._define(key, *signature, functools.partial(rule, match=match))
        raise NotExecutable(f"the intrinsic {name}")

    @property
    def site(self) -> int:
        """The place that the function under construction was asked for."""
        return len(self._sites) - 1

    def _asm_call(self, asm: re.Match[str], line: str) -> str:
        arguments = [_ARGUMENT.match(_no_space(argument)) for argument in _split(asm["arguments"])]
        found = [argument for argument in arguments if argument is not None]
        template = asm["template"].replace("\\0A", "\n").replace("\\09", "\t").replace("\\22", '"')
        returns = _no_space(asm["returns"])
        call = AsmCall(template, asm["constraints"], returns, tuple(argument[1] for argument in found))
        if self._dialect.asm is None:
            raise NotExecutable(f"inline assembly {template!r}")
        rule = self._dialect.asm
        name = self._define(call, returns, (*call.parameters, "i32"), lambda body: rule(body, call))
        values = [f"{argument[1]} {argument[3]}" for argument in found]
        return f"call {returns} @{name}({', '.join([*values, f'i32 {self._site(line)}'])})"

    def _define(self, key: object, returns: str, parameters: Sequence[str], build: Callable[[Body], None]) -> str:
        if key not in self._functions:
            body = Body(_no_space(returns), [_no_space(p) for p in parameters], self)
            build(body)
            name = f"vgpu.{len(self._functions)}"
            self._functions[key] = (name, body.text(name))
        return self._functions[key][0]


def _with_shared_memory(body: list[str]) -> tuple[list[str], list[str]]:
    """Each thread of the host has its own shared memory: constants made from its address become values."""
    if not any("@global_smem" in line for line in body):
        return body, []
    prologue = ["  %vgpu.shared = call ptr @vgpu_shared()"]
    names: dict[str, str] = {}

    def hoisted(match: re.Match[str]) -> str:
        if "%vgpu.shared" not in match["inside"]:
            return match[0]
        inside = match["inside"].replace(" addrspace(3)", "")
        if inside not in names:
            names[inside] = f"%vgpu.shared.{len(names)}"
            prologue.append(f"  {names[inside]} = {match['op']} {inside}")
        return names[inside]

    out = []
    for line in body:
        line = line.replace("@global_smem", "%vgpu.shared")
        while (changed := _CONSTANT.sub(hoisted, line)) != line:
            line = changed
        out.append(line)
    return out, prologue


def _split(text: str) -> list[str]:
    """Comma-separated pieces, brackets kept together."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            pieces.append(current)
            current = ""
        else:
            current += character
    return [piece for piece in [*pieces, current] if piece.strip()]


def _no_space(text: str) -> str:
    return re.sub(r" addrspace\(\d+\)", "", text)


def _plain(text: str) -> str:
    """A type without its attributes."""
    text = re.sub(
        r"\b(?:noundef|nonnull|immarg|readonly|writeonly|readnone|nofree|inreg|signext|zeroext)\b ?", "", text
    )
    return _no_space(re.sub(r"\b(?:range|captures|align|dereferenceable)\([^)]*\) ?", "", text)).strip()


def _no_attributes(text: str) -> str:
    """Without function attributes and metadata, which describe the GPU."""
    text = re.sub(r",? !(?:\w+(?:\.\w+)* )?!\d+", "", text)
    text = re.sub(r",? ![\w.]+ !\{[^}]*\}", "", text)
    return re.sub(r" (?:#\d+|local_unnamed_addr|unnamed_addr)", "", text)


# The bits of special numbers, and how the host's LLVM spells bits of that many: a float is spelt as a double.
_SPECIAL = {
    "half": {"inf": "0x7C00", "-inf": "0xFC00", "nan": "0x7E00"},
    "bfloat": {"inf": "0x7F80", "-inf": "0xFF80", "nan": "0x7FC0"},
    "float": {"inf": "0x7F800000", "-inf": "0xFF800000", "nan": "0x7FC00000"},
    "double": {"inf": "0x7FF0000000000000", "-inf": "0xFFF0000000000000", "nan": "0x7FF8000000000000"},
}
_NUMBER = re.compile(
    r"(?<=[ (<])"
    r"(?:(?P<bits>f0x[0-9A-F]+)"
    r"|(?P<decimal>-?\d+\.\d+e[+-]\d+)"
    r"|(?P<sign>[+-]?)(?P<word>inf|[qs]?nan)(?:\(0x[0-9A-F]+\))?)"
    r"(?=[,)> ]|$)"
)


def _spelt(type_: str, bits: str) -> str:
    """A floating-point number given by its bits."""
    if type_ == "float":
        return _as_double(*struct.unpack(">f", bytes.fromhex(bits.removeprefix("0x"))))
    return bits.replace("0x", {"half": "0xH", "bfloat": "0xR"}.get(type_, "0x"))


def _as_double(number: float) -> str:
    return "0x" + struct.pack(">d", number).hex().upper()


def _number(match: re.Match[str]) -> str:
    """A number that the host's LLVM does not read, spelt anew. Its type is the last that was named before it."""
    named = re.findall(r"\b(half|bfloat|float|double)\b", match.string[: match.start()])
    if not named:
        return match[0]
    if match["decimal"]:
        # Not rounded to the type, which the host asks for: newer compilers write the shortest digits that say which.
        return _as_double(float(numpy.float32(match["decimal"]))) if named[-1] == "float" else match[0]
    if match["bits"]:
        return _spelt(named[-1], match["bits"].removeprefix("f"))
    return _spelt(named[-1], _SPECIAL[named[-1]]["nan" if "nan" in match["word"] else match["sign"].strip("+") + "inf"])


def _host_syntax(line: str) -> str:
    """One line as the host's LLVM reads it: no GPU attributes, one address space, older spelling of numbers."""
    line = _no_space(_no_attributes(line))
    line = line.replace(" addrspacecast ptr ", " bitcast ptr ")
    line = re.sub(r"\b(?:ptx_kernel|amdgpu_kernel|inreg|tail|musttail|noalias) (?=\S)", "", line)
    return _NUMBER.sub(_number, line)


def _entry(name: str, parameters: Sequence[str]) -> str:
    """A function that unpacks a block of 8-byte slots and calls the kernel."""
    lines = [f"define void @{ENTRY}(ptr %block) {{"]
    for index, type_ in enumerate(parameters):
        lines.append(f"  %at{index} = getelementptr i8, ptr %block, i64 {SLOT * index}")
        lines.append(f"  %a{index} = load {type_}, ptr %at{index}, align 1")
    arguments = ", ".join(f"{type_} %a{index}" for index, type_ in enumerate(parameters))
    return "\n".join([*lines, f"  call void @{name}({arguments})", "  ret void", "}"]) + "\n"
