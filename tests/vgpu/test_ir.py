"""The rewriter: numbers spelt for the host, accesses announced, and refusals that name what was refused."""

import re
from typing import Any

import pytest

from fusedres.vgpu import NotExecutable
from fusedres.vgpu.amd import AMD
from fusedres.vgpu.ir import ENTRY, Body, Rewriter, _host_syntax, _split, members_of, size_of
from fusedres.vgpu.nvidia import NVIDIA
from fusedres.vgpu.ptx import Address, Statement, parse_ptx

DIALECTS = {"nvidia": NVIDIA, "amd": AMD}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def rewritten(body: str, dialect: str = "nvidia", rest: str = "") -> str:
    module = f"{rest}define void @f(ptr addrspace(1) %0, ptr addrspace(3) %1, i32 %2) {{\n{body}\n  ret void\n}}\n"
    return Rewriter(DIALECTS[dialect]).rewrite(module, "f").text


SIZES = {
    "i1": 1,
    "i8": 1,
    "i16": 2,
    "half": 2,
    "bfloat": 2,
    "float": 4,
    "i64": 8,
    "ptr": 8,
    "<4 x i32>": 16,
    "<2 x i1>": 1,
    "<16 x i1>": 2,
}


@pytest.mark.parametrize("type_", SIZES)
def test_size_of(type_: str) -> None:
    assert size_of(type_) == SIZES[type_]


def test_size_of_what_has_none() -> None:
    with pytest.raises(NotExecutable, match="a value of LLVM type x86_fp80"):
        size_of("x86_fp80")


def test_split_keeps_brackets_together() -> None:
    pieces = _split("ptr align(4, 8) %0, { i32, i32 } %1, <2 x float> <float 0.0, float 1.0>, [2 x i8] zeroinitializer")
    assert [piece.strip() for piece in pieces] == [
        "ptr align(4, 8) %0", "{ i32, i32 } %1", "<2 x float> <float 0.0, float 1.0>", "[2 x i8] zeroinitializer",
    ]  # fmt: skip
    assert _split("") == []


def test_members_of() -> None:
    assert members_of("{ i32, float, ptr }") == ["i32", "float", "ptr"]
    assert members_of("float") == ["float"]


# How one compiler or another writes a number, and how the host's LLVM reads it: a float as the double of its value.
NUMBERS = {
    "float 1.000000e+00": "float 0x3FF0000000000000",
    "float 1.000000e-01": "float 0x3FB99999A0000000",
    "float -3.402823e+38": "float 0xC7EFFFFFA0000000",
    "float 0x3FB99999A0000000": "float 0x3FB99999A0000000",
    "float f0x3DCCCCCD": "float 0x3FB99999A0000000",
    "float f0x7F800000": "float 0x7FF0000000000000",
    "float +inf": "float 0x7FF0000000000000",
    "float inf": "float 0x7FF0000000000000",
    "float -inf": "float 0xFFF0000000000000",
    "float +qnan": "float 0x7FF8000000000000",
    "float nan": "float 0x7FF8000000000000",
    "float +nan(0x400000)": "float 0x7FF8000000000000",
    "double 1.000000e-01": "double 1.000000e-01",
    "double f0x3FF8000000000000": "double 0x3FF8000000000000",
    "double -inf": "double 0xFFF0000000000000",
    "half f0x3C00": "half 0xH3C00",
    "half 0xH3C00": "half 0xH3C00",
    "half -inf": "half 0xHFC00",
    "bfloat f0x3F80": "bfloat 0xR3F80",
    "bfloat inf": "bfloat 0xR7F80",
    "bfloat qnan": "bfloat 0xR7FC0",
    "<2 x float> <float 5.000000e-01, float -inf>": "<2 x float> <float 0x3FE0000000000000, float 0xFFF0000000000000>",
    "<2 x bfloat> splat (bfloat f0xBF80)": "<2 x bfloat> splat (bfloat 0xRBF80)",
    "i32 2139095040": "i32 2139095040",
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(number: str) -> None:
    assert _host_syntax(f"  %3 = call float @g({number}, i32 0)") == f"  %3 = call float @g({NUMBERS[number]}, i32 0)"


@pytest.mark.parametrize("number", [number for number in NUMBERS if not number.startswith("i32")])
def test_numbers_are_read_by_the_host(number: str) -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    type_ = re.match(r"<[^>]*>|\w+", number)
    assert type_ is not None
    line = _host_syntax(f"  ret {number}")
    module = llvm.parse_assembly(f"define {type_[0]} @f() {{\n{line}\n}}")
    module.verify()


LINES = {
    # Functions of the GPU are called as any others, in one address space, and without what describes the GPU.
    "  tail call void @g(ptr addrspace(3) %1) #2, !dbg !21": "  call void @g(ptr %1)",
    "  %5 = load i32, ptr addrspace(4) %3, align 4, !invariant.load !6, !dbg !7": "  %5 = load i32, ptr %3, align 4",
    "  br i1 %3, label %4, label %5, !dbg !8, !llvm.loop !9": "  br i1 %3, label %4, label %5",
    "declare void @g(ptr addrspace(1) inreg noalias %0) local_unnamed_addr #1": "declare void @g(ptr %0)",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines(line: str) -> None:
    assert _host_syntax(line) == LINES[line]


def test_accesses_are_announced() -> None:
    text = rewritten(
        "  %3 = load <4 x i32>, ptr addrspace(1) %0, align 16, !dbg !5\n"
        "  store <2 x i16> splat (i16 3), ptr addrspace(3) %1, align 4",
        rest="!5 = !DILocation(line: 42, column: 3, scope: !4)\n",
    )
    assert "call void @vgpu_global_read(ptr %0, i32 16, i32 16, i32 0)\n  %3 = load <4 x i32>, ptr %0" in text
    assert "call void @vgpu_shared_write(ptr %1, ptr %vgpu.held.0, i32 4, i32 4, i32 1)" in text
    assert "store <2 x i16> splat (i16 3), ptr %vgpu.held.0" in text
    assert "store <2 x i16> splat (i16 3), ptr %1" not in text


def test_places_know_their_lines() -> None:
    module = (
        "define void @f(ptr addrspace(1) %0) {\n"
        "  %2 = load i32, ptr addrspace(1) %0, align 4, !dbg !5\n"
        "  store i32 %2, ptr addrspace(1) %0, align 4\n  ret void\n}\n"
        "!5 = !DILocation(line: 42, column: 3, scope: !4)\n"
    )
    rewritten = Rewriter(NVIDIA).rewrite(module, "f")
    assert [site.line for site in rewritten.sites] == [42, 0]
    assert rewritten.parameters == ("ptr",)
    assert f"define void @{ENTRY}(ptr %block)" in rewritten.text


def test_constants_made_from_a_shared_address() -> None:
    """Each thread of the host has shared memory of its own, so that they are values there; equal ones are one."""
    inner = "getelementptr inbounds nuw (i8, ptr addrspace(3) @global_smem, i32 512)"
    text = rewritten(
        f"  %3 = load i32, ptr addrspace(3) {inner}, align 4\n"
        f"  %4 = add i32 ptrtoint (ptr addrspace(3) {inner} to i32), 8\n"
        "  %5 = getelementptr i8, ptr addrspace(3) @global_smem, i32 %4",
        rest="@global_smem = external addrspace(3) global [0 x i8], align 16\n",
    )
    assert "  %vgpu.shared = call ptr @vgpu_shared()\n" in text
    assert "  %vgpu.shared.0 = getelementptr i8, ptr %vgpu.shared, i32 512\n" in text
    assert "  %vgpu.shared.1 = ptrtoint ptr %vgpu.shared.0 to i32\n" in text
    assert "call void @vgpu_shared_read(ptr %vgpu.shared.0, i32 4, i32 4, i32 0)\n" in text
    assert "  %4 = add i32 %vgpu.shared.1, 8\n" in text
    assert "  %5 = getelementptr i8, ptr %vgpu.shared, i32 %4\n" in text
    assert "global_smem" not in text


def test_two_barriers_are_two_places() -> None:
    barrier = "  call void @llvm.amdgcn.s.barrier()\n"
    text = rewritten(barrier * 2, "amd", "declare void @llvm.amdgcn.s.barrier()\n")
    assert re.findall(r"call void @vgpu_barrier\(i32 (\d)\)", text) == ["0", "1"]


def test_the_library_of_the_vendor_asks_about_the_target() -> None:
    question = '@.str = private constant [11 x i8] c"__CUDA_FTZ\\00"\n'
    assert "%3 = add i32 0, 1" in rewritten("  %3 = call i32 @__nvvm_reflect(ptr @.str)", rest=question)


# What no rule knows: its place in a module, and what the refusal calls it.
REFUSED: dict[str, tuple[str, str, str, str]] = {
    "an intrinsic of NVIDIA": (
        "nvidia", "  call void @llvm.nvvm.mbarrier.init(ptr %1, i32 1)",
        "declare void @llvm.nvvm.mbarrier.init(ptr, i32)\n", "the intrinsic llvm.nvvm.mbarrier.init",
    ),
    "an intrinsic of AMD": (
        "amd", "  call void @llvm.amdgcn.s.sleep(i32 1)",
        "declare void @llvm.amdgcn.s.sleep(i32)\n", "the intrinsic llvm.amdgcn.s.sleep",
    ),
    "an exchange of wide values": (
        "amd", "  %3 = call i64 @llvm.amdgcn.readfirstlane.i64(i64 0)",
        "declare i64 @llvm.amdgcn.readfirstlane.i64(i64)\n", "readfirstlane.i64, which exchanges values of type i64",
    ),
    "PTX": (
        "nvidia", '  %3 = call i32 asm "lop3.b32 $0, $1, $1, $1, 0x80;", "=r,r"(i32 %2)', "",
        "the PTX statement 'lop3.b32 $0, $1, $1, $1, 0x80;'",
    ),
    "PTX of two statements": (
        "nvidia", '  %3 = call i32 asm "add.s32 $0, $1, 1; mul.lo.s32 $0, $0, 3;", "=r,r"(i32 %2)', "",
        "the PTX statements 'add.s32",
    ),
    "PTX that reads what it wrote": (
        "nvidia", '  %3 = call i32 asm "shl.b32 $0, $1, 4; or.b32 $0, $0, $1;", "=r,r"(i32 %2)', "",
        "the PTX statements 'shl.b32",
    ),
    "a multiplication of another shape": (
        "nvidia",
        '  %3 = call i32 asm "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {$0}, {$1}, {$1}, {$1};", "=r,r"(i32 %2)',
        "", "m8n8k4",
    ),
    "assembly of AMD": ("amd", '  call void asm sideeffect "s_nop 0", ""()', "", "inline assembly 's_nop 0'"),
    "an atomic operation": (
        "amd", "  %3 = atomicrmw add ptr addrspace(1) %0, i32 1 monotonic", "", "the atomic operation atomicrmw",
    ),
    "memory of another kind": (
        "amd", "  %3 = load i32, ptr addrspace(5) %1, align 4", "", "memory of address space 5",
    ),
    "an access that does not say to which memory": (
        "nvidia", "  %3 = load i32, ptr %1, align 4", "", "the access %3 = load i32, ptr %1, align 4",
    ),
    "a volatile access": (
        "amd", "  store volatile i32 1, ptr addrspace(1) %0, align 4", "", "the access store volatile",
    ),
    "a table of constants": (
        "nvidia", "", "@table = internal constant [2 x i32] [i32 1, i32 2]\n", "the global @table",
    ),
    "a question of the vendor's library": (
        "nvidia", "  %3 = call i32 @__nvvm_reflect(ptr @.str)",
        '@.str = private constant [12 x i8] c"__CUDA_ARCH\\00"\n', "the compiler's answer to __CUDA_ARCH",
    ),
    "a type": ("nvidia", "  %3 = load fp128, ptr addrspace(1) %0, align 16", "", "a value of LLVM type fp128"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    dialect, body, rest, named = REFUSED[case]
    with pytest.raises(NotExecutable, match="not executable on the CPU: .*" + re.escape(named)):
        rewritten(body, dialect, rest)


def test_a_module_without_the_kernel() -> None:
    with pytest.raises(NotExecutable, match="without a kernel called g"):
        Rewriter(NVIDIA).rewrite("define void @f() {\n  ret void\n}\n", "g")


STATEMENTS: dict[str, list[Statement]] = {
    "@$2 st.global.v2.b32 [ $1 + 16 ], { $0, $3 };": [
        Statement("$2", "st.global.v2.b32", [Address("$1", 16), ["$0", "$3"]]),
    ],
    "mov.u32 $0, 0x0;\n\t@$3 ld.global.b32 { $0 }, [ $2 + 0 ];": [
        Statement(None, "mov.u32", ["$0", "0x0"]),
        Statement("$3", "ld.global.b32", [["$0"], Address("$2", 0)]),
    ],
    "cp.async.cg.shared.global [ $0 ], [ $1 + 32 ], 0x10, $2;  // 16 bytes": [
        Statement(None, "cp.async.cg.shared.global", [Address("$0", 0), Address("$1", 32), "0x10", "$2"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("template", STATEMENTS)
def test_parse_ptx(template: str) -> None:
    assert parse_ptx(template) == STATEMENTS[template]


def test_ptx_that_is_not_a_statement() -> None:
    with pytest.raises(NotExecutable, match=re.escape("the PTX statement '{ .reg .b32 x'")):
        parse_ptx("{ .reg .b32 x; }")


def test_body() -> None:
    """A function of the rules: numbered values, declared callees, structs put together member by member."""
    rewriter: Any = Rewriter(NVIDIA)
    body = Body("{ i32, float }", ["i32"], rewriter)
    value = body.call("float", "exp2f", ("float", "0.0"))
    body.give_members(["%p0", value])
    assert body.text("g").splitlines() == [
        "define internal { i32, float } @g(i32 %p0) alwaysinline {",
        "  %v1 = call float @exp2f(float 0.0)",
        "  %v2 = insertvalue { i32, float } poison, i32 %p0, 0",
        "  %v3 = insertvalue { i32, float } %v2, float %v1, 1",
        "  ret { i32, float } %v3",
        "}",
    ]
