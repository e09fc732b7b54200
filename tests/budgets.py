"""Where Triton's versions make different code of a kernel: budgets that some of them do not keep.

A budget stands in its test, and whatever version is not listed here is held to it. One that is, is held to what was
seen of it, rounded up.
"""

from fusedres.compiler.targets import triton_version

SEEN = {
    # Between warps 3.6 passes the sums of a reduction value by value, the channels of eight threads by one bank: 2688
    # conflicts for 8294 sectors, where 3.8 has 576.
    "bank conflicts of statistics": {(3, 6): 0.14},
    # Where a tile has fewer words than threads 3.6 loads each for every thread that uses it, 2048 sectors for 256.
    "sectors of a narrow tile's words": {(3, 6): 8.0},
    # 3.6 branches around the copies that few threads make, of scales, shifts and padding: 275 instructions, 3.8's 254.
    "sm_90 128, formed, 3x3": {(3, 6): 1.08},
    # Ten of 282 instructions move numbers that 3.8 keeps in place.
    "sm_90, u, 3x3": {(3, 6): 1.11},
    # Of 44 registers 3.6 stores 43, in as many words of private memory as there are registers.
    "registers that have a place and are not stored": {(3, 6): 1},
}


def seen(what: str) -> float | None:
    """Of the Triton at hand; None where it keeps the budget."""
    return SEEN.get(what, {}).get(triton_version())


def held_to(budget: float, what: str) -> float:
    """The budget, or what was seen of the Triton at hand."""
    found = seen(what)
    return budget if found is None else found
