"""AMD's intrinsics, as calls into the runtime."""

import re

from fusedres.vgpu.errors import NotExecutable
from fusedres.vgpu.ir import Body, Dialect, IntrinsicRule, size_of
from fusedres.vgpu.rules import arithmetic, axis, block_barrier, meeting, nothing, runtime

_AS_BITS = {"float": "i32", "half": "i16", "bfloat": "i16"}


def _exchange(operation: str, exchanged: int) -> IntrinsicRule:
    """A warp's exchange of values of at most 32 bits: the first ``exchanged`` arguments are values."""

    def rule(body: Body, match: re.Match[str]) -> None:
        if size_of(body.returns) > 4:
            raise NotExecutable(f"{match[0]}, which exchanges values of type {body.returns}")
        operation_ = match.expand(operation)
        members = []
        for index, type_ in enumerate(body.parameters):
            value = f"%p{index}"
            members.append(("i32", _widened(body, type_, value)) if index < exchanged else (type_, value))
        body.give(_narrowed(body, body.met(operation_, "i32", *members)))

    return rule


def _widened(body: Body, type_: str, value: str) -> str:
    if type_ in _AS_BITS:
        value = body.value(f"bitcast {type_} {value} to {_AS_BITS[type_]}")
        type_ = _AS_BITS[type_]
    return value if type_ == "i32" else body.value(f"zext {type_} {value} to i32")


def _narrowed(body: Body, value: str) -> str:
    """The inverse of `_widened`, to the type that ``body`` returns."""
    whole = _AS_BITS.get(body.returns, body.returns)
    if whole != "i32":
        value = body.value(f"trunc i32 {value} to {whole}")
    return value if whole == body.returns else body.value(f"bitcast {whole} {value} to {body.returns}")


def _buffer_access(body: Body, buffer: str, offset: str, scalar_offset: str, type_: str, verb: str) -> str:
    """Branch to where the offset lies inside the buffer, and announce the access there."""
    size, site = ("i32", str(size_of(type_))), ("i32", str(body.site))
    place = (("ptr", buffer), ("i32", offset), ("i32", scalar_offset), size, site)
    at = body.call("ptr", "vgpu_in_buffer", *place)
    inside = body.value(f"icmp ne ptr {at}, null")
    body.line(f"br i1 {inside}, label %on, label %off")
    body.line("on:")
    # The hardware wants addresses of its 4-byte words aligned, and no more.
    align = ("i32", str(min(size_of(type_), 4)))
    body.call("void", f"vgpu_global_{verb}", ("ptr", at), size, align, site)
    return at


def _buffer_end(body: Body) -> None:
    body.line("br label %end")
    body.line("off:")
    body.call("void", "vgpu_idle", ("i32", str(body.site)))
    body.line("br label %end")
    body.line("end:")


def buffer_load(body: Body, match: re.Match[str]) -> None:
    """Out of range, the hardware gives zero; Triton masks a lane by sending its offset there."""
    at = _buffer_access(body, "%p0", "%p1", "%p2", body.returns, "read")
    loaded = body.value(f"load {body.returns}, ptr {at}, align 1")
    _buffer_end(body)
    body.give(body.value(f"phi {body.returns} [ {loaded}, %on ], [ zeroinitializer, %off ]"))


def buffer_store(body: Body, match: re.Match[str]) -> None:
    """Out of range, the hardware drops the store."""
    at = _buffer_access(body, "%p1", "%p2", "%p3", body.parameters[0], "write")
    body.line(f"store {body.parameters[0]} %p0, ptr {at}, align 1")
    _buffer_end(body)
    body.give()


def make_buffer(body: Body, match: re.Match[str]) -> None:
    """A buffer is its first address: the runtime refuses other sizes than the one Triton asks for."""
    records = "%p2"
    if body.parameters[2] != "i64":
        records = body.value(f"zext {body.parameters[2]} %p2 to i64")
    stride = body.value("zext i16 %p1 to i32")
    body.give(body.call("ptr", "vgpu_make_buffer", ("ptr", "%p0"), ("i32", stride), ("i64", records)))


def dot_of_two(body: Body, match: re.Match[str]) -> None:
    """a0 b0 + a1 b1 + c in bfloat, rounded once; the compiler multiplies single numbers by it too."""
    total = body.value("fpext bfloat %p2 to float")
    for index in range(2):
        factors = []
        for vector in ("%p0", "%p1"):
            element = body.value(f"extractelement <2 x bfloat> {vector}, i32 {index}")
            factors.append(("float", body.value(f"fpext bfloat {element} to float")))
        total = body.call("float", "fmaf", *factors, ("float", total))
    body.give(body.value(f"fptrunc float {total} to bfloat"))


INTRINSICS: list[tuple[str, IntrinsicRule]] = [
    (r"workitem\.id\.x", runtime("vgpu_thread")),
    (r"workgroup\.id\.([xyz])", axis("vgpu_block")),
    (r"implicitarg\.ptr", runtime("vgpu_implicit_arguments")),
    (r"s\.barrier", block_barrier),
    (r"wave\.barrier", meeting("vgpu_warp_barrier")),
    (r"s\.waitcnt|sched\.barrier|sched\.group\.barrier|iglp\.opt|s\.setprio", nothing),
    (r"readfirstlane\.\w+", _exchange("vgpu_first_lane", 1)),
    (r"readlane\.\w+", _exchange("vgpu_read_lane", 1)),
    (r"ds\.bpermute", _exchange("vgpu_bpermute", 2)),
    (r"update\.dpp\.\w+", _exchange("vgpu_dpp", 2)),
    (r"permlane(x?)16\.\w+", _exchange(r"vgpu_permlane\g<1>16", 2)),
    (r"make\.buffer\.rsrc\.p8\.p1", make_buffer),
    (r"raw\.ptr\.buffer\.load\.\w+", buffer_load),
    (r"raw\.ptr\.buffer\.store\.\w+", buffer_store),
    (r"wmma\.f32\.16x16x16\.(bf16|f16)\..*", meeting(r"vgpu_wmma_\1")),
    (r"perm", runtime("vgpu_perm")),
    (r"fdot2\.bf16\.bf16", dot_of_two),
    (r"exp2\.f32", runtime("exp2f")),
    (r"log\.f32", runtime("log2f")),
    (r"sqrt\.f32", runtime("sqrtf")),
    (r"rsq\.f32", runtime("vgpu_rsqrt")),
    (r"rcp\.f32", arithmetic("fdiv float 1.0, %p0")),
]

AMD = Dialect("amdgcn", INTRINSICS, None, {})
