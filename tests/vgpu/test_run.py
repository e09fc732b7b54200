"""Compiled kernels on the CPU: right results on every target, arguments of every kind, counts that shapes predict."""

import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedres import vgpu
from fusedres.vgpu import compare_orders
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close
from tests.vgpu import kernels

each_target = pytest.mark.parametrize("target", vgpu.TARGETS)
# Compiling is what takes the time, so that where types differ in nothing but a conversion, two of the three will do.
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
ORDERS = (0, 1, 7)


def each_case(
    names: Iterable[str], quick: Collection[str], quick_in_all_types: str | None = None
) -> pytest.MarkDecorator:
    """Case and type: all but the quick cases in bf16, and one in every type, are slow."""
    parameters = [
        pytest.param(
            name,
            dtype,
            marks=() if name == quick_in_all_types or (name in quick and dtype == torch.bfloat16) else pytest.mark.slow,
            id=f"{name}-{dtype}",
        )
        for name in names
        for dtype in STORAGE
    ]
    return pytest.mark.parametrize("case, dtype", parameters)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that shows where nothing was written."""
    return torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


AFFINE = {"NEGATE": False, "BLOCK": 256}


@each_target
@each_dtype
@pytest.mark.parametrize("n", [1, 31, 1000], ids=["one", "less than a warp", "a tail"])
def test_affine(target: str, dtype: torch.dtype, n: int) -> None:
    x, shift, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype), empty(n, dtype=dtype)
    compare_orders(
        kernels.affine_kernel, (cdiv(n, 256),), x, shift, y, n, 0.3, 0, orders=ORDERS, target=target, **AFFINE
    )
    assert_as_accurate_as_eager(y, x * 0.3 + shift, x.double() * 0.3 + shift.double())


@each_target
@pytest.mark.parametrize("skip", [0, 1, 3, 16])
def test_whole_numbers(target: str, skip: int) -> None:
    """1 is a constant of the compiled kernel, multiples of 16 are promises to the compiler, others are neither."""
    n = 48 + skip % 2
    x, y = torch.randn(n + skip), empty(n)
    vgpu.run(kernels.affine_kernel, (1,), x, None, y, n, -1.5, skip, target=target, **AFFINE)
    assert_close(y, -1.5 * x[skip:].double(), 1e-6)


@each_target
@pytest.mark.parametrize("number", [1, 16, -5, -(2**31), 2**31 + 16, -(2**40) + 1, 2**61 + 1])
def test_wide_numbers(target: str, number: int) -> None:
    y = torch.zeros(1, dtype=torch.int64)
    vgpu.run(kernels.wide_number_kernel, (1,), y, number, target=target, num_warps=1)
    assert y.item() == ((3 * number + 2**63) % 2**64) - 2**63


@each_target
@pytest.mark.parametrize("first", [True, False])
def test_bool_and_overlapping_arguments(target: str, first: bool) -> None:
    """a and b share half of their memory; y is where b was, which is safe, as every thread reads before it writes."""
    whole = torch.randn(150)
    a, b, y = whole[:100], whole[50:], torch.empty(100)
    vgpu.run(kernels.select_kernel, (1,), a, b, y, 100, first, target=target, BLOCK=128)
    assert torch.equal(y, a if first else b)
    vgpu.run(kernels.select_kernel, (1,), y, b, b, 100, first, target=target, BLOCK=128)
    assert torch.equal(b, y)


@each_target
def test_views(target: str) -> None:
    """Rows with other memory between them, which a launch leaves as it was; an odd offset: nothing is aligned."""
    x, y = torch.randn(9, 40)[1:, 3:20:2], torch.zeros(9, 40)
    kernel, grid = kernels.strided_copy_kernel, (1,)
    for row in range(8):
        vgpu.run(kernel, grid, x[row], y[row, 5:14], 9, STRIDE=2, BLOCK=16, target=target, num_warps=1)
    assert torch.equal(y[:8, 5:14], x)
    assert not y[:, :5].any() and not y[:, 14:].any() and not y[8].any()


@each_target
def test_what_lies_between_the_rows_of_an_output_is_not_poisoned(target: str) -> None:
    x, y = torch.randn(9), torch.ones(4, 40)
    arguments = (x, y[:, 5:14], 9)
    vgpu.run(kernels.strided_copy_kernel, (1,), *arguments, STRIDE=1, BLOCK=16, target=target, uninitialised=["y_ptr"])
    assert torch.equal(y[0, 5:14], x)
    assert (y[:, :5] == 1).all() and (y[:, 14:] == 1).all() and (y[1:] == 1).all()


@each_target
def test_grid_of_three_dimensions(target: str) -> None:
    y = torch.zeros(2, 3, 5, 2, dtype=torch.int32)
    vgpu.run(kernels.grid_kernel, (5, 3, 2), y, target=target, num_warps=1)
    assert torch.equal(y[..., 0].flatten(), torch.arange(30, dtype=torch.int32))
    assert (y[..., 1] == 30).all()


@each_target
def test_no_elements(target: str) -> None:
    x, y = torch.empty(0), torch.empty(0)
    counters = vgpu.run(kernels.affine_kernel, (1,), x, None, y, 0, 1.0, 0, target=target, **AFFINE)
    assert counters.bytes_read == counters.bytes_written == 0


@pytest.mark.parametrize(
    ("kernel", "change", "error", "message"),
    [
        (None, {"grid": 2}, TypeError, r"grid: expected one to three numbers of blocks, such as \(4,\), got 2"),
        (None, {"grid": lambda meta: (2,)}, TypeError, "grid: expected one to three numbers of blocks"),
        (None, {"grid": ("2",)}, TypeError, r"grid: expected one to three numbers of blocks.*\('2',\)"),
        (None, {"grid": (0,)}, ValueError, r"grid: expected one to three positive numbers, got \(0,\)"),
        (None, {"grid": (1, 1, 1, 1)}, ValueError, "grid: expected one to three positive numbers"),
        (None, {"num_warps": 3}, ValueError, "num_warps: expected a power of two, got 3"),
        (None, {"num_warps": 0}, ValueError, "num_warps: expected a power of two, got 0"),
        (None, {"num_warps": "4"}, ValueError, "num_warps: expected a power of two, got '4'"),
        (torch.exp, {}, TypeError, "kernel: expected a function of triton.jit, got "),
        ("functions_kernel", {}, TypeError, "kernel: expected a function of triton.jit, got 'functions_kernel'"),
    ],
)
def test_a_launch_that_is_none_is_refused(kernel: Any, change: dict[str, Any], error: type, message: str) -> None:
    x, y = torch.ones(500), empty(6, 500)
    before = y.clone()
    arguments = {"grid": (2,), "x_ptr": x, "y_ptr": y, "n": 500, "BLOCK": 256} | change
    with pytest.raises(error, match=message):
        vgpu.run(kernel or kernels.functions_kernel, arguments.pop("grid"), **arguments)
    torch.testing.assert_close(y, before, rtol=0, atol=0, equal_nan=True)


@each_target
def test_functions(target: str) -> None:
    """The GPU's approximations are at most 2 units off; the host's stand-ins for them no more."""
    x, y = torch.rand(500) * 8 + 1e-3, empty(6, 500)
    vgpu.run(kernels.functions_kernel, (2,), x, y, 500, BLOCK=256, target=target)
    exact = x.double()
    expected = torch.stack([(-exact).exp(), exact.log(), exact.sqrt(), exact.rsqrt(), 1 / exact, exact.sigmoid()])
    assert ((y - expected).abs() <= 4e-7 * (1 + expected.abs())).all()


@each_target
def test_whole_numbers_of_a_tensor(target: str) -> None:
    x, y = torch.arange(1, 301, dtype=torch.int32), torch.zeros(300, dtype=torch.int32)
    compare_orders(kernels.collatz_kernel, (2,), x, y, 300, 40, BLOCK=256, target=target)
    for start, steps in zip(x.tolist(), y.tolist(), strict=True):
        expected = 0
        while start > 1 and expected < 40:
            start, expected = (start // 2 if start % 2 == 0 else 3 * start + 1), expected + 1
        assert steps == expected


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n", [2, 1000, 777], ids=["two", "wide accesses", "an odd number"])
def test_ptx_on_pairs_of_values(target: str, n: int) -> None:
    x = torch.randn(n).bfloat16()
    x[:2] = torch.tensor([float("nan"), -float("inf")])
    keep = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16)
    wide, kept = torch.empty(n), torch.empty_like(x)
    vgpu.run(kernels.halves_kernel, (-(-n // 256),), x, keep, wide, kept, n, target=target, num_warps=2, BLOCK=256)
    torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(kept.view(torch.int16), x.view(torch.int16) & keep)


@each_target
@each_dtype
def test_bytes(target: str, dtype: torch.dtype) -> None:
    x, bits = torch.randn(8 * 200).to(dtype), torch.zeros(200, dtype=torch.uint8)
    vgpu.run(kernels.pack_signs_kernel, (2,), x, bits, 200, BLOCK=128, target=target, uninitialised=["bits_ptr"])
    expected = ((x > 0).view(200, 8).int() << torch.arange(8)).sum(1)
    assert torch.equal(bits.int(), expected.int())


# (rows, C), tile, num_warps
COLUMN_SUMS = {
    "one warp": ((70, 24), (16, 32), 1),
    "warps side by side along the rows": ((300, 20), (128, 16), 4),
    "more warps than rows": ((3, 64), (16, 64), 8),
    "one column": ((37, 1), (32, 16), 4),
}


@each_target
@each_dtype
@pytest.mark.parametrize("case", COLUMN_SUMS)
def test_column_sums(target: str, dtype: torch.dtype, case: str) -> None:
    (rows, c), (block_rows, block_c), num_warps = COLUMN_SUMS[case]
    x, y = torch.randn(rows, c).to(dtype), empty(2, c)
    compare_orders(
        kernels.column_sums_kernel, (cdiv(c, block_c),), x, y, rows, c, BLOCK_ROWS=block_rows, BLOCK_C=block_c,
        target=target, num_warps=num_warps, orders=ORDERS,
    )  # fmt: skip
    eager = torch.stack([x.float().sum(0), x.float().square().sum(0)])
    exact = torch.stack([x.double().sum(0), x.double().square().sum(0)])
    assert_as_accurate_as_eager(y, eager, exact)


@each_target
@each_dtype
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_softmax(target: str, dtype: torch.dtype, num_warps: int) -> None:
    x, y = (4 * torch.randn(5, 300)).to(dtype), empty(5, 300, dtype=dtype)
    compare_orders(kernels.softmax_kernel, (5,), x, y, 300, BLOCK_C=512, target=target, num_warps=num_warps)
    assert_as_accurate_as_eager(y, x.softmax(1), x.double().softmax(1), floor=5e-7 if dtype.itemsize == 4 else None)


@each_target
@each_dtype
@pytest.mark.parametrize("num_warps", [1, 4])
def test_running_sum(target: str, dtype: torch.dtype, num_warps: int) -> None:
    x, y = torch.randn(4, 256).to(dtype), empty(4, 256, dtype=dtype)
    compare_orders(kernels.running_sum_kernel, (1,), x, y, ROWS=4, C=256, target=target, num_warps=num_warps)
    assert_as_accurate_as_eager(y, x.cumsum(1), x.double().cumsum(1))


@each_target
@each_dtype
def test_transpose(target: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(70, 90).to(dtype), empty(90, 70, dtype=dtype)
    compare_orders(
        kernels.transpose_kernel, (3, 2), x, y, 70, 90, BLOCK_ROWS=32, BLOCK_COLUMNS=64, target=target, orders=ORDERS
    )
    assert torch.equal(y, x.T)


class Matmul(NamedTuple):
    """A product of matrices and how to tile it."""

    size: tuple[int, int, int] = (100, 90, 72)  # M, N, K
    tile: tuple[int, int, int] = (64, 64, 32)
    num_warps: int = 4
    num_stages: int = 3
    a_transposed: bool = False
    b_transposed: bool = False
    square_a: bool = False


MATMULS = {
    "tails of every dimension": Matmul(),
    "a tail of eight in depth": Matmul((64, 64, 104)),
    "a by columns": Matmul(a_transposed=True),
    "b by columns": Matmul(b_transposed=True),
    "both by columns": Matmul(a_transposed=True, b_transposed=True),
    "a from registers": Matmul(square_a=True),
    "a from registers, b by columns": Matmul(square_a=True, b_transposed=True),
    "one warp, no pipeline": Matmul(tile=(32, 32, 16), num_warps=1, num_stages=1),
    "two stages": Matmul(num_stages=2),
    "four stages": Matmul((64, 64, 200), num_stages=4),
    "eight warps": Matmul((128, 128, 64), (128, 128, 32), num_warps=8),
    "eight warps along one dimension": Matmul((256, 32, 64), (256, 32, 16), num_warps=8),
    "narrowest instruction": Matmul((64, 16, 64), (64, 16, 32)),
    "widest instruction": Matmul((64, 256, 64), (64, 256, 16)),
    "deep tile": Matmul((64, 64, 128), (64, 64, 128), num_stages=2),
}


def check_matmul(target: str, dtype: torch.dtype, case: Matmul, orders: tuple[int, ...] = (0, 1)) -> vgpu.Counters:
    m, n, k = case.size
    a = torch.randn(m, k).to(dtype) if not case.a_transposed else torch.randn(k, m).to(dtype).T
    b = torch.randn(k, n).to(dtype) if not case.b_transposed else torch.randn(n, k).to(dtype).T
    c = empty(m, n, dtype=dtype)
    block_m, block_n, block_k = case.tile
    counters = compare_orders(
        kernels.matmul_kernel, (cdiv(m, block_m), cdiv(n, block_n)), a, b, c, m, n, k, *a.stride(), *b.stride(),
        SQUARE_A=case.square_a, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        target=target, num_warps=case.num_warps, num_stages=case.num_stages, orders=orders,
    )  # fmt: skip
    left = a * a if case.square_a else a
    exact = left.double() @ b.double()
    if dtype == torch.float32 and target != "gfx1100":
        # Of each factor of a tf32 product, 10 bits after the leading one are kept.
        assert ((c - exact).abs() <= 2**-9 * (left.double().abs() @ b.double().abs())).all()
    else:
        assert_as_accurate_as_eager(c, left @ b, exact)
    if dtype != torch.float32 or target != "gfx1100":  # no matrix units for fp32 there
        assert (
            counters.tensor_macs == cdiv(m, block_m) * block_m * cdiv(n, block_n) * block_n * cdiv(k, block_k) * block_k
        )
    return counters


QUICK_MATMULS = (
    "tails of every dimension", "a by columns", "b by columns", "a from registers",
    "eight warps along one dimension", "narrowest instruction", "widest instruction",
)  # fmt: skip


@each_target
@each_case(MATMULS, QUICK_MATMULS, "one warp, no pipeline")
def test_matmul(target: str, case: str, dtype: torch.dtype) -> None:
    check_matmul(target, dtype, MATMULS[case])


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_three_products_in_tf32_keep_the_digits_of_fp32(target: str) -> None:
    a, b, c = torch.randn(40, 72), torch.randn(72, 48), empty(40, 48)
    vgpu.run(
        kernels.matmul_kernel, (2, 2), a, b, c, 40, 48, 72, *a.stride(), *b.stride(), SQUARE_A=False,
        BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, PRECISION="tf32x3", target=target,
    )  # fmt: skip
    assert_as_accurate_as_eager(c, a @ b, a.double() @ b.double())


@pytest.mark.slow
@each_target
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("transposed", ["neither", "a", "b"])
def test_matmul_of_every_pipeline(
    target: str, dtype: torch.dtype, num_warps: int, num_stages: int, transposed: str
) -> None:
    case = Matmul(
        (64, 64, 136), (64, 64, 32), num_warps, num_stages,
        a_transposed=transposed == "a", b_transposed=transposed == "b",
    )  # fmt: skip
    check_matmul(target, dtype, case, orders=ORDERS)


class Conv(NamedTuple):
    """A 3×3 convolution and how to tile it."""

    size: tuple[int, int, int, int, int]  # N, H, W, C, K
    stride: int = 1
    tile: tuple[int, int, int] = (64, 32, 32)  # pixels, K, C
    num_warps: int = 4
    num_stages: int = 3
    normalise: bool = True


CONVS = {
    "one tile": Conv((1, 8, 8, 32, 32)),
    "strided, odd size": Conv((2, 9, 7, 16, 24), stride=2),
    "tails of C and K": Conv((1, 6, 6, 40, 20)),
    "one pixel": Conv((1, 1, 1, 16, 32)),
    "eight warps, no prologue": Conv((1, 12, 12, 64, 64), tile=(128, 64, 32), num_warps=8, normalise=False),
}


def check_conv(target: str, dtype: torch.dtype, case: Conv, **options: Any) -> vgpu.Counters:
    n, h, w, c, k = case.size
    x, weight = torch.randn(n, h, w, c).to(dtype), (torch.randn(k, 3, 3, c) / (9 * c) ** 0.5).to(dtype)
    scale, shift = torch.rand(c) + 0.5, torch.randn(c)
    p, q = (h - 1) // case.stride + 1, (w - 1) // case.stride + 1
    block_pixels, block_k, block_c = case.tile
    tiles = cdiv(n * p * q, block_pixels)
    y, sums = empty(n, p, q, k, dtype=dtype), empty(tiles, k)
    counters = compare_orders(
        kernels.conv_kernel, (tiles, cdiv(k, block_k)), x, weight, y, scale, shift, sums, h, w, c, p, q, k, n * p * q,
        R=3, S=3, STRIDE=case.stride, PAD=1, NORMALISE=case.normalise,
        BLOCK_PIXELS=block_pixels, BLOCK_K=block_k, BLOCK_C=block_c,
        target=target, num_warps=case.num_warps, num_stages=case.num_stages, **options,
    )  # fmt: skip

    def convolved(wide: torch.dtype) -> Tensor:
        u = torch.relu(torch.addcmul(shift, x.float(), scale)).to(dtype) if case.normalise else x
        u, kernel = u.to(wide).permute(0, 3, 1, 2), weight.to(wide).permute(0, 3, 1, 2)
        return torch.nn.functional.conv2d(u, kernel, stride=case.stride, padding=1).permute(0, 2, 3, 1)

    exact = convolved(torch.float64)
    tf32 = dtype == torch.float32 and target != "gfx1100"
    assert_as_accurate_as_eager(y, convolved(dtype), exact, floor=2**-10 if tf32 else None)
    assert_close(sums.sum(0), exact.sum((0, 1, 2)), 2e-3, scale=float(exact.abs().sum((0, 1, 2)).norm()))
    return counters


@each_target
@each_case(CONVS, ("strided, odd size", "tails of C and K", "one pixel"))
def test_conv(target: str, case: str, dtype: torch.dtype) -> None:
    check_conv(target, dtype, CONVS[case])


# Measured on one core of an AMD EPYC with AVX-512: 3.0, 1.8 and 1.9 seconds in tiles of 64, less in larger ones.
SECONDS_PER_GMAC = 10


@pytest.mark.slow
@each_target
@pytest.mark.parametrize("tile", [64, 128])
def test_speed(target: str, tile: int) -> None:
    """3x3, 28x28 pixels, 128 to 128 channels: 0.12 GMAC, counted, on one core."""
    size, c = 28, 128
    pixels, tiles = size * size, cdiv(size * size, tile)
    x, weight = torch.randn(1, size, size, c).bfloat16(), torch.randn(c, 3, 3, c).bfloat16()
    y, sums = torch.empty_like(x), empty(tiles, c)
    scale, shift = torch.rand(c), torch.randn(c)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        counters = vgpu.run(
            kernels.conv_kernel, (tiles, c // tile), x, weight, y, scale, shift, sums, size, size, c, size, size, c,
            pixels, R=3, S=3, STRIDE=1, PAD=1, NORMALISE=False, BLOCK_PIXELS=tile, BLOCK_K=tile, BLOCK_C=32,
            target=target, workers=1,
        )  # fmt: skip
        seconds.append(time.process_time() - begin)
    assert counters.tensor_macs == tiles * tile * c * 9 * c
    assert min(seconds) <= SECONDS_PER_GMAC * counters.tensor_macs / 1e9
