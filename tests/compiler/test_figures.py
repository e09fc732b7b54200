"""fusedres.compiler.figures: figures of kernels whose binaries are known, and budgets that planted faults break."""

import dataclasses
import math
import subprocess

import pytest
import torch

from fusedres.compiler.binary import Binary, Specialisation
from fusedres.compiler.budgets import owes_wide_access, violations
from fusedres.compiler.figures import Figures, _disassembled, main_loops, read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS, Unavailable
from tests.budgets import held_to
from tests.small_kernels import copy, copy_kernel, hoard, matmul

# Multiply-adds of 16-bit numbers that tensor cores do in a cycle, from NVIDIA's 312 and 989 TFLOPS:
# 312e12 / (2 * 108 multiprocessors * 1.41 GHz), and 989e12 / (2 * 132 * 1.83 GHz).
PEAK = {"sm_80": 1024, "sm_90": 2048}


def compiled(binary, target):
    return compile_binary(binary, target)


def figures(binary, target):
    return read_figures(compiled(binary, target), target)


@pytest.mark.parametrize("target", ["sm_80", "gfx942", "gfx1100"])
@pytest.mark.parametrize(
    ("binary", "expected"),
    [
        pytest.param(copy(), 16, id="aligned"),
        pytest.param(copy(channels=63), 2, id="C not a multiple of 16"),
        pytest.param(copy(torch.float32, channels=63), 4, id="the same in fp32"),
        pytest.param(copy(torch.uint8, block=(4, 64), num_warps=8), 1, id="one byte per thread"),
        pytest.param(copy(torch.float64, block=(4, 32), num_warps=4), 8, id="eight bytes per thread"),
    ],
)
def test_widest_access(binary, expected, target):
    if target == "gfx942":  # 64 threads in a warp
        binary = binary._replace(num_warps=binary.num_warps // 2)
    assert figures(binary, target).access == expected


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx90a", "gfx942"])
def test_spills(target):
    # 512 values per thread: twice the registers that NVIDIA has, the whole file of AMD's (vector and accumulation).
    spilling = figures(hoard(32768 if target.startswith("gfx") else 16384), target)
    assert spilling.spill_stores > 0
    assert spilling.spill_loads > 0
    assert spilling.stack > 0
    assert spilling.tensor_core == 0  # sm_80 has HFMA2.MMA, which is no tensor-core instruction
    if target.startswith("gfx"):
        # A spilled vector register is stored once.
        unused = held_to(0, "registers that have a place and are not stored")
        assert spilling.spill_stores == 4 * (spilling.spilled_registers - unused)
        assert spilling.registers == 512


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_spilled_bytes_are_those_that_the_assembler_states(target, tmp_path):
    from triton import knobs

    kernel = compiled(hoard(), target)
    ptx = tmp_path / "hoard.ptx"
    ptx.write_text(kernel.asm["ptx"])
    ptxas = (knobs.nvidia.ptxas if target == "sm_80" else knobs.nvidia.ptxas_blackwell).path
    arch = target if target == "sm_80" else f"{target}a"
    log = subprocess.run(
        [ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={arch}", str(ptx), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    read = read_figures(kernel, target)
    assert f"{read.stack} bytes stack frame, {read.spill_stores} bytes spill stores" in log
    assert f"{read.spill_loads} bytes spill loads" in log
    assert f"Used {read.registers} registers" in log


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx950"])
def test_pipelining_shows_in_async_copies_and_shared_memory(target, monkeypatch):
    if target == "gfx950":
        monkeypatch.setenv("TRITON_HIP_USE_ASYNC_COPY", "1")  # where Triton 3.6 makes none unasked
    one, two, four = (figures(matmul(num_stages=stages), target) for stages in (1, 2, 4))
    assert one.async_copies == 0
    assert four.async_copies > two.async_copies or target == "gfx950"
    assert four.async_copies > 0
    tile = 2 * (128 * 32 + 32 * 64)  # bytes of one stage
    assert four.shared >= two.shared + tile


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_kernel_and_a_contraction_on_every_target(target):
    binary = copy()
    moved = figures(binary, target)
    assert violations(binary, target, moved) == []
    assert dataclasses.replace(moved, registers=0, scalar_registers=None, spilled_registers=None) == Figures(
        registers=0, scalar_registers=None, spilled_registers=None, spill_stores=0, spill_loads=0, stack=0, shared=0,
        tensor_core=0, async_copies=0, access=16, contracts=False, issue=None, code=moved.code,
    )  # fmt: skip
    assert 4 <= moved.registers <= 64
    assert (moved.scalar_registers is None) == target.startswith("sm")
    multiplied = figures(matmul(block=(64, 64, 32)), target)
    assert multiplied.contracts
    assert multiplied.tensor_core > 0
    assert (multiplied.issue is not None) == (target in ("sm_80", "sm_90"))
    # Nothing static besides, and what CUDA reserves is left out.
    assert multiplied.shared == compiled(matmul(block=(64, 64, 32)), target).metadata.shared > 0


@pytest.mark.parametrize(
    ("binary", "target", "expected"),
    [
        (matmul(torch.float32, precision="tf32"), "sm_80", True),
        (matmul(torch.float32, precision="ieee"), "sm_80", False),
        (matmul(torch.float32, precision="ieee"), "gfx1100", False),
        (matmul(torch.float16), "gfx1100", True),
    ],
)
def test_which_contractions_need_tensor_cores(binary, target, expected):
    read = figures(binary, target)
    assert read.contracts == expected
    assert (read.tensor_core > 0) == expected


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "block", "num_warps", "num_stages"),
    [
        pytest.param(torch.bfloat16, (128, 64, 32), 4, 3, id="pipelined"),
        pytest.param(torch.float16, (64, 64, 64), 4, 1, id="not pipelined"),
        pytest.param(torch.bfloat16, (128, 128, 64), 8, 3, id="two warpgroups"),
        pytest.param(torch.bfloat16, (32, 32, 32), 4, 3, id="too low for warpgroups"),
        pytest.param(torch.float32, (64, 64, 32), 4, 3, id="TF32"),
    ],
)
def test_the_main_loop_multiplies_the_tile(target, dtype, block, num_warps, num_stages):
    precision = "tf32" if dtype == torch.float32 else None
    binary = matmul(dtype, precision=precision, block=block, num_stages=num_stages, num_warps=num_warps)
    kernel = compiled(binary, target)
    (loop,) = main_loops(_disassembled(kernel.asm["cubin"]))
    cost = 2 if precision else 1
    assert loop.multiply_adds * num_warps == math.prod(block) * cost
    issuing, multiplying = loop.instructions * num_warps / 4, math.prod(block) * cost / PEAK[target]
    assert read_figures(kernel, target).issue == pytest.approx(issuing / multiplying)


def test_issue_grows_with_the_operands_loaded():
    # A tile of 128 x 128 outputs loads a quarter of what one of 32 x 32 does for each multiplication.
    large, small = (matmul(block=(side, side, 32)) for side in (128, 32))
    assert 0.3 < figures(large, "sm_80").issue < 1 < figures(small, "sm_80").issue < 5
    assert 0.3 < figures(large, "sm_90").issue < 1.5


LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   LDG.E.128 R4, [R2.64+0x10] ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R68.reuse, R2, R4 ;
        /*0050*/               @P1 BRA 0x70 ;
        /*0060*/                   HMMA.1688.F32 R4, R68, R2, R4 ;
        /*0070*/             @!UP0 BRA.U 0x40 ;
        /*0080*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;
        /*0090*/              @!P2 BRA 0x10 ;
        /*00a0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*00b0*/                   BRA 0xa0 ;
        /*00c0*/                   HMMA.1684.F32.TF32 R4, R68, R2, R4 ;
        /*00d0*/                   BRA 0xd0 ;
"""


def test_main_loops_are_the_innermost_that_multiply():
    """A loop that only loads, and two in a row of which the first lies in another."""
    assert main_loops(LOOPS) == [(4, 16 * 8 * 16 + 16 * 8 * 8), (2, 64 * 256 * 16 // 4)]
    assert main_loops(LOOPS.replace("BRA 0xd0", "BRA 0xc0"))[2:] == [(2, 2 * 16 * 8 * 4)]


def test_figures_are_kept_beside_the_binary(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(copy(), "sm_80")
    first = read_figures(kernel, "sm_80")
    (kept,) = tmp_path.rglob("figures-*.json")
    assert kept.parent == next(tmp_path.rglob("*.cubin")).parent
    monkeypatch.setattr(subprocess, "run", None)
    assert read_figures(kernel, "sm_80") == first


class FakeKnobs:
    def __init__(self, tool):
        self.tool = tool

    @property
    def path(self):
        if self.tool is None:
            raise RuntimeError("Cannot find cuobjdump")
        return self.tool


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "cuobjdump was not found"),
        ("echo 'Function mm: 20 registers'", "its output on a kernel for sm_80 has another form"),
        ("echo unknown option >&2; exit 3", "failed with exit status 3: unknown option"),
    ],
)
def test_a_missing_or_strange_disassembler_is_named(script, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(copy(), "sm_80")
    tool = None
    if script is not None:
        tool = tmp_path / "cuobjdump"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setattr("triton.knobs.nvidia", type("Nvidia", (), {"cuobjdump": FakeKnobs(tool)}))
    with pytest.raises(Unavailable, match=message):
        read_figures(kernel, "sm_80")


def test_assembly_without_metadata_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(copy(), "gfx942")
    kernel.asm["amdgcn"] = kernel.asm["amdgcn"].replace(".vgpr_spill_count", ".spills")
    with pytest.raises(Unavailable, match="for gfx942 does not state vgpr_spill_count"):
        read_figures(kernel, "gfx942")


CLEAN = Figures(
    registers=32, scalar_registers=None, spilled_registers=None, spill_stores=0, spill_loads=0, stack=0, shared=1024,
    tensor_core=8, async_copies=4, access=16, contracts=True, issue=0.5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "fault", "message"),
    [
        ("sm_80", {"spill_stores": 8}, "spills 8 B stored, 0 B loaded"),
        ("sm_80", {"spill_loads": 4}, "spills 0 B stored, 4 B loaded"),
        ("gfx942", {"spilled_registers": 3}, "spills 3 registers, 0 B stored, 0 B loaded"),
        ("sm_80", {"stack": 16}, "stack of 16 B where none is needed"),
        ("sm_86", {"shared": 99 * 1024 + 1}, "shared memory of 101377 B exceeds the limit of 101376 B"),
        ("gfx942", {"shared": 65537}, "shared memory of 65537 B exceeds the limit of 65536 B"),
        ("sm_80", {"tensor_core": 0}, "multiplies matrices without tensor-core instructions"),
        ("sm_80", {"access": 8}, "widest global access is 8 B where alignment allows 16 B"),
        ("sm_80", {"access": None}, "widest global access is 0 B where alignment allows 16 B"),
        ("sm_90", {"serialised": ("C7514",)}, "wgmma waits for its products one by one (C7514)"),
    ],
)
def test_planted_violations(target, fault, message):
    assert violations(copy(), target, CLEAN) == []
    assert violations(copy(), target, dataclasses.replace(CLEAN, **fault)) == [message]


def test_limits_are_inclusive_and_faults_add_up():
    for target, spec in TARGETS.items():
        assert violations(copy(), target, dataclasses.replace(CLEAN, shared=spec.shared_bytes)) == []
    assert len(violations(copy(), "sm_80", dataclasses.replace(CLEAN, stack=8, spill_loads=8, access=4))) == 3


def test_real_faults_are_found():
    # Five stages of 32 KiB: fits sm_80's 163 KiB, not sm_86's 99.
    binary = matmul(block=(128, 128, 64), num_stages=6)
    assert "shared memory" in " ".join(violations(binary, "sm_86", figures(binary, "sm_86")))
    assert [fault.split()[0] for fault in violations(hoard(), "sm_80", figures(hoard(), "sm_80"))] == [
        "spills",
        "stack",
    ]


def made(signature, constants=(), aligned=(), num_warps=4):
    pairs = tuple(part.split(":") for part in signature.split())
    specialisation = Specialisation(tuple(map(tuple, pairs)), tuple(constants), tuple(aligned.split()), ())
    return Binary(copy_kernel, specialisation, num_warps, 3)


TILE = (("BLOCK_ROWS", 16), ("BLOCK_C", 64))


@pytest.mark.parametrize(
    ("binary", "sm_80", "gfx942"),
    [
        pytest.param(made("x:*bf16 rows:i32 C:i32", TILE, "x C"), True, False, id="half a tile on 64-thread warps"),
        pytest.param(made("x:*bf16 rows:i32 C:i32", TILE, "x C", 1), True, True, id="fewer warps"),
        pytest.param(made("x:*bf16 rows:i32 C:i32", TILE, "x rows", 1), False, False, id="16 does not divide C"),
        pytest.param(made("x:*bf16 rows:i32 C:i32", TILE, "rows C", 1), False, False, id="pointer not aligned"),
        pytest.param(made("x:*u8 C:i32", TILE, "x C", 1), False, False, id="bytes"),
        pytest.param(made("x:*u8 y:*fp32 C:i32", TILE, "x y C", 1), True, True, id="bytes besides fp32"),
        pytest.param(made("x:*fp32 C:constexpr", (("C", 32), *TILE), "x", 1), True, True, id="C is a constant"),
        pytest.param(made("x:*fp32 C:constexpr", (("C", 1), *TILE), "x", 1), False, False, id="one channel"),
        pytest.param(made("x:*fp32 C:i32 K:i32", TILE, "x C", 1), False, False, id="K odd"),
        pytest.param(made("x:*bf16 C:i32", (("C_MULTIPLE", 8), *TILE), "x", 1), True, True, id="8 divides C"),
        pytest.param(made("x:*bf16 C:i32", (("C_MULTIPLE", 4), *TILE), "x", 1), False, False, id="4 divides C"),
        pytest.param(made("x:*fp32 C:i32", (("C_MULTIPLE", 4), *TILE), "x", 1), True, True, id="4 divides C, fp32"),
        pytest.param(
            made("x:*bf16 C:i32", (("BLOCK_M", 16), ("BLOCK_K", 16), ("BLOCK_C", 32)), "x C"),
            False,
            False,
            id="the largest tile of a contraction is too small",
        ),
        pytest.param(
            made("x:*bf16 C:i32", (("BLOCK_PIXELS", 64), ("BLOCK_K", 32), ("BLOCK_C", 16)), "x C"),
            True,
            False,
            id="AMD writes outputs as its matrix units leave them",
        ),
        pytest.param(made("x:*fp32 n:i32", (("BLOCK", 4096),), "x n"), True, True, id="flat"),
        pytest.param(made("x:*fp32 n:i32", (("BLOCK", 4096),), "x"), False, False, id="flat, odd length"),
        pytest.param(made("x:*fp32 n:i32", (), "x n"), False, False, id="no tile"),
    ],
)
def test_rule_of_wide_accesses(binary, sm_80, gfx942):
    assert owes_wide_access(binary, "sm_80") == sm_80
    assert owes_wide_access(binary, "gfx942") == gfx942
