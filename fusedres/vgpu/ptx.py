"""PTX instructions of inline assembly, and their registers as values of the function under construction."""

import re
from typing import NamedTuple

from fusedres.vgpu.errors import NotExecutable
from fusedres.vgpu.ir import AsmCall


class Address(NamedTuple):
    register: str
    offset: int


class Corner(NamedTuple):
    """Where a box begins: the register of its tensor map, and those of its coordinates from the innermost out."""

    register: str
    coordinates: list[str]


Operand = str | Address | Corner | list[str]


class Statement(NamedTuple):
    """One PTX instruction: ``@predicate opcode operands``."""

    predicate: str | None
    opcode: str
    operands: list[Operand]


def parse_ptx(template: str) -> list[Statement]:
    """The instructions of an inline assembly text."""
    statements = []
    for text in re.sub(r"//[^\n]*", "", template).split(";"):
        match = re.fullmatch(r"\s*(?:@(\$\d+)\s+)?([\w.:]+)\s*(.*?)\s*", text, re.S)
        if match is not None:
            statements.append(Statement(match[1], match[2], _operands(match[3])))
        elif text.strip():
            raise NotExecutable(f"the PTX statement {text.strip()!r}")
    return statements


def _operands(text: str) -> list[Operand]:
    operands: list[Operand] = []
    for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        address = re.fullmatch(r"\[\s*(\$\d+)\s*(?:\+\s*(\d+)\s*)?\]", piece)
        corner = re.fullmatch(r"\[\s*(\$\d+)\s*,\s*\{([^}]*)\}\s*\]", piece)
        if address is not None:
            operands.append(Address(address[1], int(address[2] or 0)))
        elif corner is not None:
            operands.append(Corner(corner[1], [register.strip() for register in corner[2].split(",")]))
        elif piece.startswith("{"):
            operands.append([register.strip() for register in piece.strip("{}").split(",")])
        else:
            operands.append(piece)
    return operands


class Registers:
    """Names of PTX operands as values of the function under construction."""

    def __init__(self, call: AsmCall) -> None:
        self._call = call

    def is_output(self, operand: str) -> bool:
        return operand.startswith("$") and int(operand[1:]) < self._call.outputs

    def index(self, operand: str) -> int:
        return int(operand.removeprefix("$")) - self._call.outputs

    def value(self, operand: str) -> str:
        if not operand.startswith("$"):
            return str(int(operand, 0))
        return f"%p{self.index(operand)}"

    def type(self, operand: str) -> str:
        return self._call.parameters[self.index(operand)]

    def typed(self, operand: str) -> tuple[str, str]:
        return self.type(operand), self.value(operand)
