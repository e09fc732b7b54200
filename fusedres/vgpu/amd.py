"""AMD's intrinsics, as calls into the runtime."""

import re

from .errors import NotExecutable
from .ir import Body, Dialect, IntrinsicRule
from .rules import arithmetic, axis, block_barrier, meeting, nothing, runtime

_AS_BITS = {"float": "i32", "half": "i16", "bfloat": "i16"}


def _exchange(operation: str, exchanged: int) -> IntrinsicRule:
    """A warp's exchange of 32-bit values, for any type that fits: the first ``exchanged`` arguments are values."""

    def rule(body: Body, match: re.Match[str]) -> None:
        members = []
        for index, type_ in enumerate(body.parameters):
            value = f"%p{index}"
            members.append(("i32", _widened(body, type_, value)) if index < exchanged else (type_, value))
        if body.returns == "i32":
            body.meet(operation, *members)
            return
        raise NotExecutable(f"{match[0]}, which exchanges values of type {body.returns}")

    return rule


def _widened(body: Body, type_: str, value: str) -> str:
    if type_ in _AS_BITS:
        value = body.value(f"bitcast {type_} {value} to {_AS_BITS[type_]}")
        type_ = _AS_BITS[type_]
    return value if type_ == "i32" else body.value(f"zext {type_} {value} to i32")


INTRINSICS: list[tuple[str, IntrinsicRule]] = [
    (r"workitem\.id\.x", runtime("vgpu_thread")),
    (r"workgroup\.id\.([xyz])", axis("vgpu_block")),
    (r"s\.barrier", block_barrier),
    (r"wave\.barrier", meeting("vgpu_warp_barrier")),
    (r"s\.waitcnt|sched\.barrier|sched\.group\.barrier|iglp\.opt|s\.setprio", nothing),
    (r"readfirstlane\.i32", _exchange("vgpu_first_lane", 1)),
    (r"readlane\.i32", _exchange("vgpu_read_lane", 1)),
    (r"ds\.bpermute", _exchange("vgpu_bpermute", 2)),
    (r"update\.dpp\.i32", _exchange("vgpu_dpp", 2)),
    (r"permlane(x?)16\.i32", lambda body, match: _exchange(f"vgpu_permlane{match[1]}16", 2)(body, match)),
    (r"wmma\.f32\.16x16x16\.(bf16|f16)\..*", meeting(r"vgpu_wmma_\1")),
    (r"perm", runtime("vgpu_perm")),
    (r"exp2\.f32", runtime("exp2f")),
    (r"log\.f32", runtime("log2f")),
    (r"sqrt\.f32", runtime("sqrtf")),
    (r"rsq\.f32", runtime("vgpu_rsqrt")),
    (r"rcp\.f32", arithmetic("fdiv float 1.0, %p0")),
]

AMD = Dialect("amdgcn", INTRINSICS, None)
