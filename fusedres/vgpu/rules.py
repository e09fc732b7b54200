"""How intrinsics of either vendor become calls into the runtime."""

import re

from fusedres.vgpu.ir import Body, IntrinsicRule


def runtime(symbol: str) -> IntrinsicRule:
    """The runtime function of the same signature."""

    def rule(body: Body, match: re.Match[str]) -> None:
        arguments = [(type_, f"%p{index}") for index, type_ in enumerate(body.parameters)]
        body.give(body.call(body.returns, symbol, *arguments))

    return rule


def meeting(symbol: str) -> IntrinsicRule:
    """The operation of a warp, whose name may take parts of the intrinsic's."""

    def rule(body: Body, match: re.Match[str]) -> None:
        operation = match.expand(symbol)
        body.meet(operation, *((type_, f"%p{index}") for index, type_ in enumerate(body.parameters)))

    return rule


def nothing(body: Body, match: re.Match[str]) -> None:
    body.give()


def axis(symbol: str) -> IntrinsicRule:
    def rule(body: Body, match: re.Match[str]) -> None:
        body.give(body.call("i32", symbol, ("i32", str("xyz".index(match[1])))))

    return rule


def block_barrier(body: Body, match: re.Match[str]) -> None:
    """All threads of the block wait for each other."""
    body.call("void", "vgpu_barrier", ("i32", str(body.site)))
    body.give()


def arithmetic(template: str) -> IntrinsicRule:
    return lambda body, match: body.give(body.value(template))
