"""fusedres.plan.time: what launches take, held against speeds that others have published."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fusedres.compiler.code import Code, Segment
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.occupancy import occupancy, registers_for
from fusedres.operands import ConvInput, Geometry
from fusedres.ops.conv_forward import conv_forward
from fusedres.plan.gpus import GPUS
from fusedres.plan.time import BAND, CENTRAL, Work, launch_seconds, library_seconds
from fusedres.runtime.launch import launch, record


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N) out
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Triton's tutorial product in this project's words: tiles in groups of rows, for the sake of the L2 cache."""
    i, columns = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = i // (GROUP * columns) * GROUP
    high = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    i_m, i_n = first + i % (GROUP * columns) % high, i % (GROUP * columns) // high
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    o_k = tl.arange(0, BLOCK_K)
    a, b = a_ptr + o_m[:, None] * K + o_k[None, :], b_ptr + o_k[:, None] * N + o_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.cdiv(K, BLOCK_K)):
        acc = tl.dot(tl.load(a), tl.load(b), acc)
        a += BLOCK_K
        b += BLOCK_K * N
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc.to(tl.bfloat16))


def product(side, target, block, num_warps, num_stages):
    a, b, c = torch.empty(3, side, side, dtype=torch.bfloat16, device="meta")
    m, n, k = block
    sizes = {"M": side, "N": side, "K": side, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    with record(target) as trace:
        launch(
            matmul_kernel, (side // m * side // n,), {"a_ptr": a, "b_ptr": b, "c_ptr": c, **sizes},
            reads=("a_ptr", "b_ptr"), writes=("c_ptr",), flops=2 * side**3, steps=(side // k,),
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return trace.launches[0]


def convolution():
    """Inductor's benchmark: (3072, 128, 1, 202) by (384, 128, 1, 3), here with statistics in the epilogue."""
    x, w = (
        torch.empty(size, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
        for size in ((3072, 128, 1, 202), (384, 128, 1, 3))
    )
    with record("sm_90") as trace:
        conv_forward(ConvInput(x), w, Geometry(), statistics=True)
    return trace.launches[0]


# Launch, GPU, TFLOP/s that others have published of Triton there, and where.
PUBLISHED = [
    pytest.param(
        lambda: product(8192, "sm_90", (128, 256, 64), 8, 3), "h100", 600,
        id="8192^3 on an H100: 550 to 650 without TMA",
    ),
    pytest.param(
        lambda: product(4096, "sm_80", (128, 256, 64), 8, 3), "a100", 215, id="4096^3 on an A100: 200 to 230"
    ),
    pytest.param(convolution, "h100", 330, id="a convolution on an H100: pytorch#174752"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "gpu", "published"), PUBLISHED)
def test_published_speeds_of_triton(make, gpu, published):
    one, gpu = make(), GPUS[gpu]
    figures = read_figures(compile_binary(one.binary, gpu.target), gpu.target)
    work = Work(
        math.prod(one.grid), one.num_warps, figures.registers, figures.shared, one.num_stages, figures.code, one.steps,
        one.bytes_read + one.bytes_written, True,
    )  # fmt: skip
    fast, central, slow = (one.flops / launch_seconds(work, gpu, given) / 1e12 for given in BAND)
    assert central == pytest.approx(published, rel=0.15)
    assert slow < central < fast
    assert slow < published < 1.02 * fast


def test_a_stream_of_bytes_takes_as_long_as_memory():
    """A pass over rows with little to do, thousands of blocks: within the launch's gap and the norm of bandwidth."""
    code = Code(Segment(instructions=60, busiest=60, moved=512, waits=1), ())
    h100 = GPUS["h100"]
    moved = 400_000 * 4 * 512
    found = launch_seconds(Work(400_000, 4, 32, 0, 1, code, (), moved, False), h100)
    assert found == pytest.approx(moved / (0.87 * 3.35e12), rel=0.25)


def test_few_blocks_wait_for_themselves():
    """One block of a long loop takes its steps, whatever the GPU could do besides; twice the steps twice as long."""
    code = Code(Segment(100, 100), (Segment(instructions=200, busiest=200, waits=1),))
    times = [
        launch_seconds(Work(1, 4, 64, 0, 1, code, (steps,), 1000, False), GPUS["h100"]) - CENTRAL.gap
        for steps in (1000, 2000)
    ]
    assert times[1] / times[0] == pytest.approx(2, rel=0.01)
    assert times[0] == pytest.approx(1000 * (200 / 0.42 + CENTRAL.latency) / (1.83e9 * 0.95), rel=0.02)


def test_a_wave_more_takes_longer_than_a_block_more_in_it():
    code = Code(Segment(2000, 2000), ())

    def time(blocks):
        return launch_seconds(Work(blocks, 8, 255, 0, 1, code, (), 1000, False), GPUS["a100"])

    assert time(108) == time(60)
    assert time(109) > 1.5 * time(108)


def test_steps_of_a_loop_that_was_taken_apart():
    """ptxas takes four steps at once and the rest one by one: as long as what the source says, not four times."""
    one = Segment(instructions=25, busiest=25, moved=1024)
    four = Segment(instructions=80, busiest=80, moved=4096)
    together, apart = (
        launch_seconds(Work(32, 4, 32, 0, 1, Code(Segment(50), loops), (66,), 10_000, False), GPUS["h100"])
        for loops in ((one,), (four, one))
    )
    assert apart == pytest.approx(together, rel=0.35)
    assert apart < together


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "target", "expected"),
    [
        (8, 255, 98304, "sm_90", (1, "registers")),
        (8, 128, 98304, "sm_90", (2, "registers")),
        (8, 128, 118 * 1024, "sm_90", (1, "shared memory")),
        (4, 32, 0, "sm_90", (16, "registers")),
        (4, 32, 0, "sm_89", (12, "warps")),
        (4, 128, 40 * 1024, "gfx942", (1, "shared memory")),
        (4, 128, 0, "gfx942", (4, "registers")),
    ],
)
def test_occupancy(warps, registers, shared, target, expected):
    assert occupancy(warps, registers, shared, target) == expected


def test_registers_that_so_many_blocks_can_share():
    for warps in (1, 2, 4, 8):
        for blocks in range(1, 8):
            most = registers_for(blocks, warps)
            assert occupancy(warps, most, 0, "sm_90").blocks >= min(blocks, 64 // warps)
            if most < 255:
                assert occupancy(warps, most + 8, 0, "sm_90").blocks < blocks


def test_a_librarys_weight_gradient_is_slower_than_its_convolution():
    h100 = GPUS["h100"]
    forward, weight = (
        library_seconds(kind, 10**8, 10**8, 10**11, h100.peak(torch.bfloat16), h100)
        for kind in ("convolution", "weight gradient")
    )
    assert weight - CENTRAL.gap == pytest.approx((forward - CENTRAL.gap) / 0.9)
    assert library_seconds("batch norm", 10**9, 10, 0, 1.0, h100) > library_seconds(
        "batch norm", 5 * 10**8, 5 * 10**8, 0, 1.0, h100
    )
