"""What a launch is said to have done, against what shapes and addresses predict."""

from typing import Any

import pytest
import torch

from fusedres import vgpu
from fusedres.vgpu import ArgumentTraffic, Counters
from tests.vgpu import kernels
from tests.vgpu.planting import BARRIER, NVIDIA, Plant, count_of, each_nvidia, each_target

SECTOR = 32


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("n", [1024, 1000, 1])
def test_contiguous_access_is_ideal(target: str, dtype: torch.dtype, n: int) -> None:
    """128 threads take an element each. Masked lanes touch nothing; a sector begun is a sector."""
    x, y = torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype)
    counters = vgpu.run(kernels.strided_copy_kernel, (-(-n // 128),), x, y, n, STRIDE=1, BLOCK=128, target=target)
    bytes_ = n * dtype.itemsize
    sectors = -(-bytes_ // SECTOR)
    assert counters.arguments == {
        "x_ptr": ArgumentTraffic(bytes_, 0, sectors, sectors),
        "y_ptr": ArgumentTraffic(0, bytes_, sectors, sectors),
    }
    assert (counters.bytes_read, counters.bytes_written) == (bytes_, bytes_)


@each_target
@pytest.mark.parametrize("stride", [2, 8, 16])
def test_strided_access(target: str, stride: int) -> None:
    """Every 4-byte number read drags in a sector that it shares with 8 / stride others."""
    n = 1024
    x, y = torch.ones(n * stride), torch.zeros(n)
    counters = vgpu.run(kernels.strided_copy_kernel, (8,), x, y, n, STRIDE=stride, BLOCK=128, target=target)
    read, written = counters.arguments["x_ptr"], counters.arguments["y_ptr"]
    assert read == ArgumentTraffic(4 * n, 0, n * min(stride, 8) // 8, n // 8)
    assert written == ArgumentTraffic(0, 4 * n, n // 8, n // 8)


@each_target
def test_what_several_blocks_read_counts_once(target: str) -> None:
    """Two tiles of rows and three of columns: a is read three times, b twice."""
    m, n, k = 128, 192, 64
    a, b, c = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((m, k), (k, n), (m, n)))
    counters = vgpu.run(
        kernels.matmul_kernel, (2, 3), a, b, c, m, n, k, *a.stride(), *b.stride(),
        SQUARE_A=False, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, target=target,
    )  # fmt: skip
    traffic = counters.arguments
    assert (traffic["a_ptr"].bytes_read, traffic["b_ptr"].bytes_read) == (2 * m * k, 2 * k * n)
    assert (traffic["a_ptr"].sectors, traffic["b_ptr"].sectors) == (3 * 2 * m * k // SECTOR, 2 * 2 * k * n // SECTOR)
    assert (traffic["c_ptr"].bytes_read, traffic["c_ptr"].bytes_written) == (0, 2 * m * n)


# Multiplications in one instruction of a warp.
MACS = {"sm_80": 16 * 8 * 16, "sm_90": 16 * 64 * 16, "gfx1100": 16 * 16 * 16}


@each_target
def test_matrix_units(target: str) -> None:
    """Tiles are multiplied whole: 100 x 90 x 72 in tiles of 64 x 64 x 32."""
    m, n, k = 100, 90, 72
    a, b, c = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((m, k), (k, n), (m, n)))
    counters = vgpu.run(
        kernels.matmul_kernel, (2, 2), a, b, c, m, n, k, *a.stride(), *b.stride(),
        SQUARE_A=False, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, target=target,
    )  # fmt: skip
    assert counters.tensor_macs == 128 * 128 * 96
    assert counters.tensor_ops == 128 * 128 * 96 // MACS[target]


@each_target
def test_barriers(target: str, plant: Plant) -> None:
    """One in each of six blocks; all that the compiler set, in each of three steps of two blocks."""
    x, y = torch.randn(70, 90), torch.zeros(90, 70)
    arguments: dict[str, Any] = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "target": target}
    assert vgpu.run(kernels.transpose_kernel, (3, 2), x, y, 70, 90, **arguments).barriers == 6

    def summed() -> Counters:
        x, y = torch.randn(300, 20), torch.zeros(2, 20)
        return vgpu.run(kernels.column_sums_kernel, (2,), x, y, 300, 20, BLOCK_ROWS=128, BLOCK_C=16, target=target)

    barriers = count_of(BARRIER, summed, plant)
    assert barriers >= 6
    assert summed().barriers == 3 * 2 * barriers


@each_target
def test_nothing_is_counted_unless_asked(target: str) -> None:
    x, y = torch.ones(128), torch.zeros(128)
    arguments: dict[str, Any] = {"STRIDE": 1, "BLOCK": 128, "target": target}
    counters = vgpu.run(kernels.strided_copy_kernel, (1,), x, y, 128, uninitialised=["y_ptr"], count=False, **arguments)
    assert counters == Counters()
    assert (y == 1).all()


def module(target: str, body: str) -> str:
    """A kernel in the compiler's words, in place of `grid_kernel`; ``%t`` is the number of the thread."""
    nvidia = target in NVIDIA
    thread = "llvm.nvvm.read.ptx.sreg.tid.x" if nvidia else "llvm.amdgcn.workitem.id.x"
    ldmatrix = "declare { i32, i32, i32, i32 } @llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.b16.p3(ptr addrspace(3))\n"
    parameters = ", ".join(f"ptr addrspace(1) %{index}" for index in range(3))
    return f"""
@global_smem = external addrspace(3) global [0 x i8], align 16
define {"ptx" if nvidia else "amdgpu"}_kernel void @grid_kernel({parameters}) {{
  %t = call i32 @{thread}()
{body}
  ret void
}}
declare i32 @{thread}()
{ldmatrix if nvidia else ""}"""


def shared_passes(target: str, body: str, plant: Plant) -> tuple[int, int]:
    plant(lambda llir: module(target, body), shared_bytes=32 << 10)
    y = torch.zeros(2, dtype=torch.int32)
    counters = vgpu.run(kernels.grid_kernel, (1,), y, target=target, num_warps=1)
    assert counters.bank_conflicts == counters.shared_passes - counters.ideal_shared_passes
    return counters.shared_passes, counters.ideal_shared_passes


ALIGN = {"i8": 1, "i32": 4, "<2 x i32>": 8, "<4 x i32>": 16}

# Bytes from lane to lane, type: passes, and the fewest for as many bytes, of one access of a warp.
STORES = {
    "neighbouring words": (4, "i32", 1, 1),
    "neighbouring bytes": (1, "i8", 1, 1),
    "every second word": (8, "i32", 2, 1),
    "every third word, all banks": (12, "i32", 1, 1),
    "one bank": (128, "i32", 32, 1),
    "one bank, padded": (132, "i32", 1, 1),
    "8 bytes, two halves of a warp": (8, "<2 x i32>", 2, 2),
    "16 bytes, four quarters": (16, "<4 x i32>", 4, 4),
    "16 bytes in rows of 128": (128, "<4 x i32>", 32, 4),
    "16 bytes in rows of 64": (64, "<4 x i32>", 16, 4),
    "16 bytes in rows of 144": (144, "<4 x i32>", 4, 4),
}


@each_target
@pytest.mark.parametrize("case", STORES)
def test_bank_conflicts(target: str, case: str, plant: Plant) -> None:
    """Per bank and pass one word of 4 bytes is served, to all lanes that ask for it."""
    stride, type_, passes, ideal = STORES[case]
    body = f"""
  %o = mul i32 %t, {stride}
  %p = getelementptr i8, ptr addrspace(3) @global_smem, i32 %o
  store {type_} zeroinitializer, ptr addrspace(3) %p, align {ALIGN[type_]}"""
    assert shared_passes(target, body, plant) == (passes, ideal)
    body += f"\n  %v = load {type_}, ptr addrspace(3) %p, align {ALIGN[type_]}"
    assert shared_passes(target, body, plant) == (2 * passes, 2 * ideal)


@each_target
def test_lanes_that_ask_for_one_word(target: str, plant: Plant) -> None:
    body = "  store i32 7, ptr addrspace(3) @global_smem, align 4\n"
    body += "  %v = load i32, ptr addrspace(3) @global_smem, align 4"
    assert shared_passes(target, body, plant) == (2, 2)


@each_nvidia
@pytest.mark.parametrize("stride, passes", [(16, 4), (128, 32), (64, 16), (144, 4)])
def test_bank_conflicts_of_matrix_loads(target: str, stride: int, passes: int, plant: Plant) -> None:
    """Four matrices of eight rows of 16 bytes: each matrix is one pass if its rows are in different banks."""
    body = f"""
  %o = mul i32 %t, {stride}
  %p = getelementptr i8, ptr addrspace(3) @global_smem, i32 %o
  store <4 x i32> zeroinitializer, ptr addrspace(3) %p, align 16"""
    before = shared_passes(target, body, plant)
    load = "call { i32, i32, i32, i32 } @llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.b16.p3(ptr addrspace(3) %p)"
    after = shared_passes(target, f"{body}\n  %v = {load}", plant)
    assert (after[0] - before[0], after[1] - before[1]) == (passes, 4)
