"""Planted faults are caught, each on every target that can have it; what can not be executed is refused by name.

A fault is planted in the kernel's source (`faulty_kernels`) or in what the compiler made of a right one. `NOT_CAUGHT`
lists what is not seen.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fusedres import vgpu
from fusedres.vgpu import Divergence, Misaligned, NeverWritten, NotExecutable, OutOfBounds, OutOfResources, Race
from tests.comparison import assert_as_accurate_as_eager
from tests.vgpu import faulty_kernels, kernels
from tests.vgpu.planting import BARRIER, NVIDIA, Plant, count_of, each_nvidia, each_target, substituted

COPY_WAIT = r"^ .*call void @llvm\.nvvm\.cp\.async\.wait\.group\(i32 (\d)\)[^\n]*"
WGMMA_WAIT = r"wgmma\.wait_group\.sync\.aligned \d"
SHARED_STORE = r"^ .*(?:store [^\n]*, ptr addrspace\(3\)|st\.shared)[^\n]*"
SHARED_LOAD = r"^(?P<head> .*(?:load [^\n]*|ldmatrix[^\n]*)\(?ptr addrspace\(3\) )(?:nonnull )?(?P<pointer>%\w+)"


def transposed(target: str, **options: Any) -> None:
    x, y = torch.randn(70, 90), torch.full((90, 70), float("nan"))
    arguments = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "target": target, **options}
    vgpu.run(kernels.transpose_kernel, (3, 2), x, y, 70, 90, **arguments)
    assert torch.equal(y, x.T)


def summed(target: str, **options: Any) -> None:
    x, y = torch.randn(300, 20), torch.full((2, 20), float("nan"))
    vgpu.run(kernels.column_sums_kernel, (2,), x, y, 300, 20, BLOCK_ROWS=128, BLOCK_C=16, target=target, **options)
    assert_as_accurate_as_eager(y[0], x.sum(0), x.double().sum(0))


def multiplied(target: str, depth: int = 200, square_a: bool = False, **options: Any) -> None:
    """Six or seven steps of a pipeline, so that every stage is filled more than once."""
    a, b = torch.randn(64, depth).bfloat16(), torch.randn(depth, 64).bfloat16()
    c = torch.full((64, 64), float("nan"), dtype=torch.bfloat16)
    vgpu.run(
        kernels.matmul_kernel, (1, 1), a, b, c, 64, 64, depth, *a.stride(), *b.stride(),
        SQUARE_A=square_a, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, target=target, uninitialised=["c_ptr"], **options,
    )  # fmt: skip
    left = a * a if square_a else a
    assert_as_accurate_as_eager(c, left @ b, left.double() @ b.double())


RIGHT = {"transpose": transposed, "column sums": summed, "matmul": multiplied}


@each_target
@pytest.mark.parametrize("case", RIGHT)
def test_nothing_is_caught_where_nothing_is_wrong(target: str, case: str) -> None:
    RIGHT[case](target)


# The compiler puts none too many into these, but in the matmul's prologue some versions do.
@each_target
@pytest.mark.parametrize("case, caught", [("transpose", 1), ("column sums", 6), ("matmul", 2)])
def test_each_barrier(target: str, case: str, caught: int, plant: Plant) -> None:
    """Without any one of them, some warp reads too early or writes too early."""
    barriers = count_of(BARRIER, lambda: RIGHT[case](target), plant)
    needed = 0
    for which in range(barriers):
        plant(substituted(BARRIER, "", which))
        try:
            for order in (0, 1, 2) if case == "matmul" else (0,):
                RIGHT[case](target, warp_order=order)
        except (Race, NeverWritten) as error:
            assert "shared memory" in str(error)
            needed += 1
    assert needed >= caught
    assert needed == barriers or case == "matmul"
    plant(substituted(BARRIER, ""))
    with pytest.raises((Race, NeverWritten), match="shared memory"):
        RIGHT[case](target)


@each_target
@pytest.mark.parametrize("threads, warp", [(64, "warp 2"), (5, "warp 0")], ids=["two of four warps", "five lanes"])
def test_divergent_barrier(target: str, threads: int, warp: str, plant: Plant) -> None:
    """One more barrier, at which only some threads arrive while the others go on to the next."""

    def edit(llir: str) -> str:
        barrier = re.search(BARRIER, llir, re.M)
        assert barrier is not None
        own = "nvvm.read.ptx.sreg.tid.x" if target in NVIDIA else "amdgcn.workitem.id.x"
        call = re.sub(r",? !dbg !\d+| #\d+", "", barrier[0])
        function = f"""
define internal void @sometimes() {{
  %thread = call i32 @llvm.{own}()
  %arrives = icmp ult i32 %thread, {threads}
  br i1 %arrives, label %wait, label %on
wait:
{call}
  br label %on
on:
  ret void
}}
"""
        return llir.replace(barrier[0], f"  call void @sometimes()\n{barrier[0]}", 1) + function

    plant(edit)
    with pytest.raises(Divergence, match=f"threads of {warp} do not arrive"):
        transposed(target)


@each_nvidia
@pytest.mark.parametrize("longer", [None, 2], ids=["removed", "for an older group"])
def test_each_wait_for_copies(target: str, longer: int | None, plant: Plant) -> None:
    waits = count_of(COPY_WAIT, lambda: multiplied(target), plant)
    assert waits >= 2
    for which in range(waits):

        def edit(llir: str, which: int = which) -> str:
            match = list(re.finditer(COPY_WAIT, llir, re.M))[which]
            wait = "" if longer is None else match[0].replace(f"(i32 {match[1]})", f"(i32 {int(match[1]) + longer})")
            return llir[: match.start()] + wait + llir[match.end() :]

        if longer is not None and which == waits - 1:
            # What is on its way there is masked off and read by nobody.
            continue
        plant(edit)
        with pytest.raises(NeverWritten, match="asynchronous copy has not filled yet"):
            multiplied(target)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_each_wait_for_multiplications(num_stages: int, plant: Plant) -> None:
    """In the loop it keeps the next copies off the operands; after the loop it is the last thing of a block."""

    def run() -> None:
        multiplied("sm_90", depth=192, num_stages=num_stages)

    waits = count_of(WGMMA_WAIT, run, plant)
    assert waits >= 2
    for which in range(waits):
        plant(substituted(WGMMA_WAIT, "wgmma.wait_group.sync.aligned 7", which))
        with pytest.raises((NeverWritten, Race), match=r"asynchronous (copy|multiplication)|shared memory"):
            run()


def test_missing_fence_between_stores_and_multiplications(plant: Plant) -> None:
    """What threads store to shared memory reaches the matrix units only behind it."""
    plant(substituted(r"^ .*call void .*fence\.proxy\.async[^\n]*", ""))
    with pytest.raises(NeverWritten, match="stored to with no fence after it"):
        multiplied("sm_90")


@each_target
def test_shared_memory_never_written(target: str, plant: Plant) -> None:
    plant(substituted(SHARED_STORE, "", 0))
    with pytest.raises(NeverWritten, match="reads shared memory that nothing had been written to"):
        transposed(target)


@each_target
@pytest.mark.parametrize("case", ["transpose", "matmul"])
@pytest.mark.parametrize(
    "offset, caught",
    [
        (16, (AssertionError, vgpu.VgpuError)),  # another piece of the swizzled tile: wrong numbers, if nothing else
        (1, (Misaligned,)),
        (1 << 18, (OutOfBounds,)),
        (-(1 << 16), (OutOfBounds,)),
    ],
)
def test_shared_offset(target: str, case: str, offset: int, caught: tuple[type[Exception], ...], plant: Plant) -> None:
    """One load from shared memory goes elsewhere."""
    elsewhere = rf"  %fault = getelementptr i8, ptr addrspace(3) \g<pointer>, i32 {offset}\n\g<head>%fault"
    plant(substituted(SHARED_LOAD, elsewhere, 0))
    with pytest.raises(caught):
        RIGHT[case](target)


def test_swizzle_of_a_descriptor(plant: Plant) -> None:
    """The mode in the two highest bits of a wgmma descriptor: 64 bytes taken for 32."""

    def edit(llir: str) -> str:
        found = re.findall(r"(?:or|or disjoint|add|add nsw|add nuw nsw) i64 %\w+, (-?\d{10,})", llir)
        assert found
        for constant in set(found):
            bits = int(constant) % 2**64
            if bits >> 62:
                other = bits & (2**62 - 1) | (bits >> 62 ^ 1) << 62
                llir = llir.replace(constant, str(other - 2**64 if other >= 2**63 else other))
        return llir

    plant(edit)
    with pytest.raises((AssertionError, vgpu.VgpuError)):
        multiplied("sm_90")


# (mask the load, mask the store): argument, and the bytes of the first lane beyond 1000 numbers.
DROPPED_MASKS = {"load": (False, True, "x_ptr"), "store": (True, False, "y_ptr")}


@each_target
@pytest.mark.parametrize("which", DROPPED_MASKS)
@pytest.mark.parametrize("count", [True, False], ids=["counted", "not counted"])
def test_dropped_mask(target: str, which: str, count: bool) -> None:
    """The message names kernel, line, argument and offset, the tensors are untouched, and the process goes on."""
    mask_load, mask_store, name = DROPPED_MASKS[which]
    x, y = torch.randn(1000), torch.full((1000,), 7.0)
    arguments: dict[str, Any] = {"MASK_LOAD": mask_load, "MASK_STORE": mask_store, "BLOCK": 256, "target": target}
    pattern = (
        rf"^unmasked_kernel, block 3, thread \d+, line \d+: \d+ bytes out of bounds: {name} at byte (\d+) of 4000$"
    )
    with pytest.raises(OutOfBounds, match=pattern) as caught:
        vgpu.run(faulty_kernels.unmasked_kernel, (4,), x, y, 1000, count=count, **arguments)
    match = re.search(pattern, str(caught.value))
    assert match is not None
    assert 4000 - 16 < int(match[1]) < 4096
    assert (y == 7).all()
    vgpu.run(faulty_kernels.unmasked_kernel, (4,), x, y, 1000, **{**arguments, "MASK_LOAD": True, "MASK_STORE": True})
    assert torch.equal(x, y)


@each_target
def test_dropped_mask_before_the_beginning(target: str) -> None:
    x, y = torch.randn(1000), torch.empty(1000)
    with pytest.raises(OutOfBounds, match=r"tile_step_kernel, .*: x_ptr at byte -\d+ of 4000"):
        vgpu.run(faulty_kernels.tile_step_kernel, (4,), x, y, 1000, STEP=256, FIRST=-9, BLOCK=256, target=target)


@each_target
def test_tile_off_by_one(target: str) -> None:
    """Tiles that overlap are two blocks at one place; a gap between tiles is what nothing was written to."""
    kernel, x, y = faulty_kernels.tile_step_kernel, torch.randn(901), torch.full((900,), float("nan"))
    with pytest.raises(Race, match=r"block \d and block \d touch the same byte: y_ptr at byte \d+ of 3600"):
        vgpu.run(kernel, (4,), x, y, 900, STEP=255, FIRST=0, BLOCK=256, target=target)
    vgpu.run(kernel, (4,), x, y, 900, STEP=257, FIRST=0, BLOCK=256, target=target, uninitialised=["y_ptr"])
    assert y.isnan().nonzero().flatten().tolist() == [256, 513, 770]
    with pytest.raises(OutOfBounds, match=r"y_ptr at byte \d+ of 3600"):
        vgpu.run(kernel, (4,), x, y, 901, STEP=256, FIRST=0, BLOCK=256, target=target)


@each_target
def test_uninitialised_tensor_is_read(target: str) -> None:
    x, y = torch.randn(300), torch.zeros(300)
    arguments: dict[str, Any] = {"BLOCK": 256, "target": target}
    vgpu.run(faulty_kernels.accumulate_kernel, (2,), x, y, 300, **arguments)
    assert torch.equal(x, y)
    for count in (True, False):
        with pytest.raises(NeverWritten, match=r"^accumulate_kernel, .*: y_ptr at byte"):
            vgpu.run(
                faulty_kernels.accumulate_kernel, (2,), x, y, 300, uninitialised=["y_ptr"], count=count, **arguments
            )


@each_target
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_blocks_write_to_one_place(target: str, workers: int) -> None:
    for _ in range(5):
        with pytest.raises(Race, match=r"block \d+ and block \d+ touch the same byte: y_ptr at byte \d of 4"):
            y = torch.zeros(1, dtype=torch.int32)
            vgpu.run(faulty_kernels.one_place_kernel, (64,), y, target=target, num_warps=1, workers=workers)


@each_target
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("warp_order", [0, 1])
def test_blocks_read_what_others_write(target: str, workers: int, warp_order: int) -> None:
    for _ in range(5):
        x = torch.zeros(64 * 32)
        with pytest.raises(Race, match="touch the same byte: x_ptr"):
            vgpu.run(
                faulty_kernels.neighbour_kernel, (64,), x,
                BLOCK=32, target=target, num_warps=1, workers=workers, warp_order=warp_order,
            )  # fmt: skip


@each_target
def test_result_depends_on_the_order_of_warps(target: str) -> None:
    x, y = torch.randn(256), torch.empty(256)
    with pytest.raises(Race, match="reverse_in_place_kernel: y_ptr differs between warp orders 0 and 1"):
        vgpu.compare_orders(faulty_kernels.reverse_in_place_kernel, (1,), x, y, BLOCK=256, target=target)


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx1100"))]
)
def test_more_shared_memory_than_the_target_has(target: str) -> None:
    a, c = torch.zeros(32, 4096, dtype=torch.bfloat16), torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(OutOfResources, match=rf"matmul_kernel: \d+ bytes of shared memory, and {target} has \d+"):
        vgpu.run(
            kernels.matmul_kernel, (1, 1), a, a.T, c, 32, 32, 4096, *a.stride(), *a.T.stride(),
            SQUARE_A=False, BLOCK_M=32, BLOCK_N=32, BLOCK_K=1024, target=target,
        )  # fmt: skip


@each_target
def test_more_threads_than_a_block_may_have(target: str) -> None:
    y = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(OutOfResources, match=f"grid_kernel: 2048 threads in a block, and {target} has 1024"):
        vgpu.run(kernels.grid_kernel, (1,), y, num_warps=64, target=target)


ATOMICS = {"sm_80": r"atom\.global", "sm_90": r"atom\.global", "gfx1100": "atomicrmw"}


@each_target
def test_operation_that_is_not_known(target: str) -> None:
    with pytest.raises(NotExecutable, match=f"not executable on the CPU: .*{ATOMICS[target]}"):
        vgpu.run(faulty_kernels.atomic_kernel, (1,), torch.ones(64), torch.zeros(1), BLOCK=64, target=target)


class Unseen(NamedTuple):
    """A fault that execution does not show."""

    why: str
    # Plants the fault and runs the kernel, whose numbers are right in spite of it; None if there is no way to plant it.
    stays_unseen: Callable[[str, Plant], None] | None = None
    targets: tuple[str, ...] = vgpu.TARGETS


def without(pattern: str, check: Callable[..., None], **options: Any) -> Callable[[str, Plant], None]:
    def stays_unseen(target: str, plant: Plant) -> None:
        plant(substituted(pattern, ""))
        check(target, **options)

    return stays_unseen


def warps_pass_numbers(target: str, plant: Plant) -> None:
    x, y = torch.randn(256), torch.empty(256)
    vgpu.run(faulty_kernels.reverse_in_place_kernel, (1,), x, y, BLOCK=256, target=target)


def write_between_rows(target: str, plant: Plant) -> None:
    whole = torch.zeros(4, 10)
    vgpu.run(
        faulty_kernels.tile_step_kernel, (1,), torch.ones(40), whole[:, :8], 36,
        STEP=64, FIRST=0, BLOCK=64, target=target,
    )  # fmt: skip
    assert (whole[:3, 8:] == 2).all()


def blocks_race_uncounted(target: str, plant: Plant) -> None:
    y = torch.zeros(1, dtype=torch.int32)
    vgpu.run(faulty_kernels.one_place_kernel, (64,), y, target=target, num_warps=1, workers=1, count=False)
    assert y.item() == 63


def subnormals(target: str, plant: Plant) -> None:
    x, y = torch.full((1,), 100.0), torch.zeros(6)
    vgpu.run(kernels.functions_kernel, (1,), x, y, 1, BLOCK=32, target=target, num_warps=1)
    assert 0 < y[0].item() < torch.finfo(torch.float32).tiny


def registers_before_the_wait(target: str, plant: Plant) -> None:
    plant(substituted(WGMMA_WAIT, "wgmma.wait_group.sync.aligned 7", 0))
    multiplied(target, square_a=True)


NOT_CAUGHT = {
    "a missing wgmma.fence": Unseen(
        "registers are read by an asynchronous multiplication when it is issued",
        without(r"^ .*call void @llvm\.nvvm\.wgmma\.fence[^\n]*", multiplied),
        ("sm_90",),
    ),
    "missing memory fences around a barrier": Unseen(
        "memory has one order here, which every thread sees",
        without(r"^ *fence syncscope[^\n]*", multiplied),
        ("gfx1100",),
    ),
    "a missing barrier of one warp": Unseen(
        "lanes meet at the matrix load that follows, whether they have met before or not",
        without(r"^ .*call void @llvm\.nvvm\.bar\.warp\.sync[^\n]*", transposed, num_warps=1),
        NVIDIA,
    ),
    "warps that pass numbers through global memory without a barrier": Unseen(
        "in one order of warps this gives one result; only `compare_orders` shows that another gives another",
        warps_pass_numbers,
    ),
    "blocks that race, where nothing is counted": Unseen(
        "the marks that show it are kept for uninitialised tensors, and for the others with count=True",
        blocks_race_uncounted,
    ),
    "a write between the rows of a strided view": Unseen(
        "an argument's bounds are those of its memory, from its first element to its last",
        write_between_rows,
    ),
    "subnormal results that the GPU flushes to zero": Unseen(
        "approximate functions are the host's exact ones, which keep subnormal numbers",
        subnormals,
        NVIDIA,
    ),
    "an access so wild that it hits another argument": Unseen(
        "arguments lie a megabyte or more apart, at distances that the system chooses",
    ),
    "registers touched before the multiplication that uses them was waited for": Unseen(
        "products are there as soon as they are asked for, and operands in registers are read then; what is seen is an "
        "operand in shared memory that changes before the wait, and a block that ends without a wait",
        registers_before_the_wait,
        ("sm_90",),
    ),
    "blocks that wait for each other": Unseen(
        "blocks run to their end on a few threads, so such a wait never ends",
    ),
    "what the assembler does": Unseen(
        "execution begins with the compiler's last LLVM IR; register allocation, spills, scheduling and the hazards of "
        "the instruction set come later",
    ),
    "rounding inside the matrix units": Unseen(
        "sums are in fp32, rounded to nearest; GPUs truncate some bits of the partial sums of one instruction",
    ),
}  # fmt: skip

PLANTED = [(name, target) for name, fault in NOT_CAUGHT.items() if fault.stays_unseen for target in fault.targets]


@pytest.mark.parametrize("name, target", PLANTED)
def test_not_caught(name: str, target: str, plant: Plant) -> None:
    """A fault that begins to be seen has to leave the table."""
    stays_unseen = NOT_CAUGHT[name].stays_unseen
    assert stays_unseen is not None
    stays_unseen(target, plant)
