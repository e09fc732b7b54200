"""Tiles moved by tensor descriptors on sm_90: right results, and planted faults that are caught.

A fault is planted in what the compiler made of a right kernel, as in `test_faults`.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres import vgpu
from fusedres.vgpu import Deadlock, Misaligned, NeverWritten, OutOfBounds, Race, Refused, compare_orders
from tests.comparison import STORAGE, assert_as_accurate_as_eager
from tests.small_kernels import copy_boxes_kernel
from tests.vgpu import descriptor_kernels
from tests.vgpu.planting import BARRIER, Plant, count_of, substituted

TARGET = "sm_90"
ORDERS = (0, 1, 7)

ASM = r"^ .*call void asm sideeffect \"[^\"]*"
EXPECT = ASM + r"mbarrier\.arrive\.expect_tx[^\n]*"
INIT = ASM + r"mbarrier\.init[^\n]*"
PHASE_WAIT = rf"{ASM}mbarrier\.try_wait[^\n]*?i32 (?P<parity>[%\w]+)\) #[^\n]*"
FENCE = r"^ .*call void .*fence\.proxy\.async[^\n]*"
GROUP_WAIT = r"^(?P<head> .*call void @llvm\.nvvm\.cp\.async\.bulk\.wait\.group(?:\.read)?\(i32 )0(?P<tail>[^\n]*)"
ACQUIRE = r"fence\.proxy\.tensormap::generic\.acquire\.gpu \[ \$0 \+ 0 \], 0x80;"


def copied(
    rows: int = 130, c: int = 136, tile: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.bfloat16, **options: Any
) -> None:
    x, y = torch.randn(rows, c).to(dtype), torch.full((rows, c), float("nan"), dtype=dtype)
    grid = (-(-rows // tile[0]), -(-c // tile[1]))
    vgpu.run(
        copy_boxes_kernel, grid, x, y, rows, c, c, BLOCK_ROWS=tile[0], BLOCK_C=tile[1],
        target=TARGET, uninitialised=["y_ptr"], **options,
    )  # fmt: skip
    assert torch.equal(x, y)


def doubled(**options: Any) -> None:
    x, y = torch.randn(300, 64).bfloat16(), torch.full((300, 64), float("nan"), dtype=torch.bfloat16)
    arguments = {"BLOCK_ROWS": 64, "BLOCK_C": 64, "target": TARGET, "uninitialised": ["y_ptr"], **options}
    vgpu.run(descriptor_kernels.doubled_kernel, (2,), x, y, 300, 64, **arguments)
    assert torch.equal(2 * x, y)


def multiplied(
    m: int = 200, n: int = 136, k: int = 264, tile: tuple[int, int, int] = (64, 64, 64), blocks: int = 2,
    dtype: torch.dtype = torch.bfloat16, orders: tuple[int, ...] = (0,), **options: Any,
) -> vgpu.Counters:  # fmt: skip
    """Each block has several tiles of c, and each of these more steps than stages, so that phases come again."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    c = torch.full((m, n), float("nan"), dtype=dtype)
    counters = compare_orders(
        descriptor_kernels.matmul_kernel, (blocks,), a, b, c, m, n, k,
        BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_K=tile[2], orders=orders, target=TARGET, uninitialised=["c_ptr"],
        **options,
    )  # fmt: skip
    exact = a.double() @ b.double().T
    if dtype == torch.float32:
        assert ((c - exact).abs() <= 2**-9 * (a.double().abs() @ b.double().abs().T)).all()
    else:
        assert_as_accurate_as_eager(c, a @ b.T, exact)
    return counters


# Rows of a box in bytes decide the swizzle: 128, 64, 32 or none, and two boxes side by side.
COPIES = {
    "swizzle of 128 bytes": (64, 64),
    "swizzle of 64 bytes": (64, 32),
    "swizzle of 32 bytes": (32, 16),
    "no swizzle": (128, 8),
    "two boxes side by side": (16, 128),
}


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("order", ORDERS)
def test_copies(case: str, order: int) -> None:
    copied(tile=COPIES[case], warp_order=order)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_copies_of_every_type(dtype: torch.dtype) -> None:
    copied(tile=(64, 32), dtype=dtype)


def test_what_is_beyond_a_tensor_is_zero_and_not_stored() -> None:
    """Rows of y lie apart in memory; a copy's last boxes reach beyond its last row and column."""
    x, y = torch.randn(70, 72).bfloat16(), torch.ones(80, 96).bfloat16()
    vgpu.run(
        copy_boxes_kernel, (2, 2), x, y, 70, 72, 96, BLOCK_ROWS=64, BLOCK_C=64, target=TARGET
    )  # fmt: skip
    assert torch.equal(y[:70, :72], x)
    assert (y[70:] == 1).all() and (y[:, 72:] == 1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_windows_of_an_image(order: int) -> None:
    """Four dimensions, corners before the beginning and windows beyond the end: zeros around the image."""
    n, h, w, c = 2, 5, 6, 32
    x, y = torch.randn(n, h, w, c).half(), torch.full((4, 4, 8, c), float("nan"), dtype=torch.half)
    vgpu.run(
        descriptor_kernels.window_kernel, (4,), x, y, n, h, w, C=c, BLOCK_H=4, BLOCK_W=8, target=TARGET,
        warp_order=order,
    )  # fmt: skip
    padded = torch.nn.functional.pad(x[-1], (0, 0, 2, 8, 1, 4))
    for i in range(4):
        assert torch.equal(y[i], padded[i : i + 4, i : i + 8])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_matmul(num_stages: int) -> None:
    multiplied(orders=ORDERS, num_stages=num_stages)


MATMULS: dict[str, dict[str, Any]] = {
    "eight warps": {"tile": (128, 128, 64), "num_warps": 8},
    "narrow steps": {"tile": (64, 64, 16)},
    "one warp group, wide": {"tile": (64, 256, 32)},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32, "tile": (64, 64, 32)},
    "one step": {"k": 64},
    "one tile": {"m": 16, "n": 8, "k": 16, "blocks": 1},
}


@pytest.mark.parametrize("case", MATMULS)
def test_matmuls(case: str) -> None:
    multiplied(orders=(0, 1), **MATMULS[case])


def test_doubled() -> None:
    for order in ORDERS:
        doubled(warp_order=order)


def test_bytes_are_counted_once_each_and_scratch_memory_is_nobodys() -> None:
    counters = multiplied()
    assert set(counters.arguments) == {"a_ptr", "b_ptr", "c_ptr"}
    assert counters.arguments["a_ptr"].bytes_read == 200 * 264 * 2
    assert counters.arguments["b_ptr"].bytes_read == 136 * 264 * 2
    assert counters.arguments["c_ptr"].bytes_written == 200 * 136 * 2
    # Every column tile of c reads all of a again.
    assert counters.arguments["a_ptr"].ideal_sectors == 3 * 200 * -(-264 * 2 // 32)


def each(pattern: str, run: Any, plant: Plant) -> range:
    found = count_of(pattern, run, plant)
    assert found
    return range(found)


def test_each_missing_arrival(plant: Plant) -> None:
    for which in each(EXPECT, multiplied, plant):
        plant(substituted(EXPECT, "", which))
        with pytest.raises(Deadlock, match=r"parity [01] at the mbarrier at byte .* lacks 1 arrivals"):
            multiplied()


@pytest.mark.parametrize(
    "expected, error, message",
    [
        (16384 + 16, Deadlock, "lacks 0 arrivals and expects 16400 bytes, of which 16384 were sent"),
        (8192, NeverWritten, "asynchronous copy has not filled yet"),
    ],
    ids=["too many", "too few"],
)
def test_wrong_number_of_bytes(expected: int, error: type[Exception], message: str, plant: Plant) -> None:
    plant(substituted("(?<=_, \\[\\$1\\], )16384", str(expected), 0))
    with pytest.raises(error, match=message):
        multiplied()


def test_one_arrival_too_many(plant: Plant) -> None:
    plant(substituted(f"(?P<arrival>{EXPECT})", r"\g<arrival>\n\g<arrival>", 0))
    with pytest.raises(Refused, match="1 arrivals at an mbarrier whose phase expects 0 more"):
        multiplied()


@pytest.mark.parametrize("parity", [0, 1])
def test_wrong_phase(parity: int, plant: Plant) -> None:
    """The wait in the loop, whose phases take turns, always for the same one: it does not wait for every other."""

    def edit(llir: str) -> str:
        for match in re.finditer(PHASE_WAIT, llir, re.M):
            if match["parity"].startswith("%"):
                begin, end = match.span("parity")
                return llir[:begin] + str(parity) + llir[end:]
        return llir

    plant(edit)
    with pytest.raises(NeverWritten, match="asynchronous copy has not filled yet"):
        multiplied()


def test_wait_for_a_phase_that_does_not_come(plant: Plant) -> None:
    wait = rf"(?P<wait>(?P<head>{ASM}mbarrier\.try_wait[^\n]*)i32 0(?P<tail>\) #[^\n]*))"
    plant(substituted(wait, r"\g<wait>\n\g<head>i32 1\g<tail>", 0))
    with pytest.raises(Deadlock, match=r"parity 1 at the mbarrier at byte 8192 .*, whose phase 1 lacks 1 arrivals"):
        copied()


def test_each_missing_wait_for_a_phase(plant: Plant) -> None:
    for run in (copied, multiplied):
        for which in each(PHASE_WAIT, run, plant):
            plant(substituted(PHASE_WAIT, "", which))
            with pytest.raises((NeverWritten, Refused), match=r"not filled yet|copy is to arrive"):
                run()


def test_each_missing_fence(plant: Plant) -> None:
    """Before a copy overwrites what was stored, and before a store's tile is read."""
    for run in (doubled, multiplied):
        for which in each(FENCE, run, plant):
            plant(substituted(FENCE, "", which))
            with pytest.raises(NeverWritten, match="stored to with no fence after it"):
                run()


OVERWRITTEN = "shared memory was overwritten while an asynchronous copy read it"
NOT_WAITED_FOR = "ends without having waited for an asynchronous copy"


@pytest.mark.parametrize("replacement", ["", r"\g<head>1\g<tail>"], ids=["removed", "for an older group"])
def test_each_wait_for_stores(replacement: str, plant: Plant) -> None:
    """Before the buffer of a tile is written again, and before the block ends."""
    seen = set()
    for run in (doubled, multiplied):
        for which in each(GROUP_WAIT, run, plant):
            plant(substituted(GROUP_WAIT, replacement, which))
            with pytest.raises((Race, NeverWritten), match=f"{OVERWRITTEN}|{NOT_WAITED_FOR}") as caught:
                run()
            seen.add(str(caught.value).split(": ", 1)[1])
    assert seen == {OVERWRITTEN, NOT_WAITED_FOR}


def test_each_missing_barrier_around_stores(plant: Plant) -> None:
    needed = 0
    barriers = each(BARRIER, doubled, plant)
    for which in barriers:
        plant(substituted(BARRIER, "", which))
        try:
            for order in (0, 1, 2):
                doubled(warp_order=order)
        except (Race, NeverWritten):
            needed += 1
    assert needed >= 2


def test_missing_acquisition_of_a_tensor_map(plant: Plant) -> None:
    plant(substituted(ACQUIRE, "fence.proxy.tensormap::generic.acquire.gpu [ $0 + 128 ], 0x80;", 0))
    with pytest.raises(NeverWritten, match="tensor map that no fence has acquired"):
        copied()


def test_missing_initialisation_of_an_mbarrier(plant: Plant) -> None:
    plant(substituted(INIT, "", 0))
    with pytest.raises((NeverWritten, Refused), match=r"nothing had been written to|no mbarrier"):
        copied()


def views(offset: int, c: int) -> tuple[Tensor, Tensor]:
    return torch.randn(offset + 64 * c).bfloat16()[offset:].view(64, c), torch.zeros(64, c).bfloat16()


@pytest.mark.parametrize(
    "offset, c, message",
    [(4, 64, "address is not a multiple of 16"), (0, 100, "a stride of 200 bytes, which is not a multiple of 16")],
    ids=["address", "stride"],
)
def test_tensors_that_have_no_descriptor(offset: int, c: int, message: str) -> None:
    x, y = views(offset, c)
    with pytest.raises(Refused, match=message):
        vgpu.run(copy_boxes_kernel, (1, 1), x, y, 64, c, c, BLOCK_ROWS=64, BLOCK_C=64, target=TARGET)


@pytest.mark.parametrize(
    "pattern, replacement, message",
    [
        (r"(box_dim.*?i32) 64", r"\1 512", "box has 512 elements"),
        (r"(box_dim.*?i32) 64", r"\1 128", "rows of 256 bytes, with swizzle 3"),
        (r"(elemtype[^,]*\], )0xa", r"\g<1>0x8", "element type 8"),
        (r"(interleave_layout[^,]*\], )0x0", r"\g<1>0x1", "interleave 1"),
        (r"(element_stride.*?i32) 1", r"\1 2", "element stride of 2"),
        (r"(tile\.rank[^,]*\], )0x1", r"\g<1>0x2", "a tensor map of 3 dimensions, and the copy has 2"),
    ],
)
def test_tensor_maps_that_the_hardware_refuses(pattern: str, replacement: str, message: str, plant: Plant) -> None:
    plant(substituted(pattern, replacement, 0))
    with pytest.raises(Refused, match=message):
        copied()


def test_box_at_an_odd_place(plant: Plant) -> None:
    place = r"(cp\.async\.bulk\.tensor\.2d\.shared[^\n]*i1 %\d+, ptr addrspace\(3\)) @global_smem"
    elsewhere = r"\1 getelementptr (i8, ptr addrspace(3) @global_smem, i32 64)"
    plant(substituted(place, elsewhere, 0), shared_bytes=16384)
    with pytest.raises(Misaligned, match="not a multiple of 128"):
        copied()


def test_a_tensor_that_is_smaller_than_its_descriptor_says() -> None:
    x, y = torch.randn(63, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    with pytest.raises(OutOfBounds, match="x_ptr at byte 8064 of 8064"):
        vgpu.run(copy_boxes_kernel, (1, 1), x, y, 64, 64, 64, BLOCK_ROWS=64, BLOCK_C=64, target=TARGET)
