"""Ops whose kernels are compiled for a GPU and executed on the CPU, in two warp orders, with what they move counted.

On a machine with a GPU the same tests run there (`tests.kernels.on_device`).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import vgpu
from fusedres.plan.shapes import NARROWEST
from fusedres.runtime.launch import Launch, Trace
from tests.budgets import seen
from tests.comparison import STORAGE
from tests.kernels.on_device import DEVICE, TARGET, on_device
from tests.vgpu_support import skip_module_without_vgpu

if DEVICE is None:
    skip_module_without_vgpu()
# Those that the tests go through: all that can be executed, or the GPU at hand.
TESTED = vgpu.TARGETS if TARGET is None else (TARGET,)

Size = tuple[int, int, int, int]  # N, C, H, W

SIZES: dict[str, Size] = {
    "a stage of ResNet-50": (2, 64, 14, 14),
    "a row is several pieces": (1, 256, 7, 7),
    "a narrow network": (4, 16, 8, 8),
    "whole rows of 96": (1, 96, 6, 6),
    "a third of the lanes idle": (1, 160, 5, 5),
    "rows narrower than a warp's access": (2, 8, 9, 5),
    "16 divides C, 32 does not": (1, 48, 10, 3),
    "8 divides C": (2, 40, 7, 7),
    "4 divides C": (1, 28, 6, 5),
    "2 divides C": (1, 10, 9, 9),
    "odd C": (2, 33, 5, 5),
    "one channel": (2, 1, 5, 7),
    "one pixel": (1, 64, 1, 1),
    "one value": (1, 1, 1, 1),
    "many tiles of rows, the last one short": (3, 64, 23, 29),
    "the widest tile": (1, 1030, 3, 2),
    "pixels fewer than a tile's rows": (2, 2048, 1, 1),
}
MEASURABLE = {name: size for name, size in SIZES.items() if size[0] * size[2] * size[3] > 1}
SLOWEST = ("gfx1100", torch.float32)
EVERY = [(target, dtype) for target in TESTED for dtype in STORAGE]

# Read once per program from the cache, in whichever pieces the tile's layout makes of them.
PER_CHANNEL = {
    "scale_ptr", "shift_ptr", "x_scale_ptr", "x_shift_ptr", "x_mean_ptr", "residual_scale_ptr", "residual_shift_ptr",
    "mean_ptr", "p_ptr", "q_ptr", "r_ptr", "constant_ptr", "second_scale_ptr", "second_shift_ptr",
    "second_x_scale_ptr", "second_x_shift_ptr", "slope_ptr",
}  # fmt: skip

MASKS = {"mask_ptr", "add_mask_ptr", "open_ptr"}


def covering(cases: Iterable[Any], offset: int = 0, *, contraction: bool = False) -> list[Any]:
    """Parameters (case, target, dtype): one target and dtype for each case in turn, all other combinations slow.

    A ``contraction`` in fp32 is always slow on gfx1100, which has no matrix units for it: its compiler takes up to a
    minute over the unrolled multiplications.
    """
    turns = [(target, dtype) for target, dtype in EVERY if not (contraction and (target, dtype) == SLOWEST)]
    parameters = []
    for index, case in enumerate(cases):
        # 5 shares no divisor with the 8 or 9 combinations: all of them have their turn.
        turn = turns[(5 * index + offset) % len(turns)]
        for target, dtype in EVERY:
            marks = () if (target, dtype) == turn else (pytest.mark.slow,)
            name = f"{case}-{target}-{dtype}".replace("torch.", "")
            parameters.append(pytest.param(case, target, dtype, marks=marks, id=name))
    return parameters


def executed(target: str, op: Callable[[], Any], updated: Sequence[Tensor] = ()) -> tuple[Any, Trace]:
    """What ``op`` gives on the kernels of a target, and the account of its launches.

    It runs once per warp order, and the results have to agree in every bit; so have the tensors ``updated`` in place,
    which are put back in between.
    """
    before = [tensor.clone() for tensor in updated]
    results, bits = [], []
    trace: Trace
    for order in (0, 1):
        for tensor, value in zip(updated, before, strict=True):
            tensor.copy_(value)
        with _recorded(target, order) if DEVICE is None else on_device(updated) as trace:
            results.append(op())
        bits.append([_bits(tensor) for tensor in (*_tensors(results[-1]), *updated)])
    for first, last in zip(*bits, strict=True):
        assert torch.equal(first, last), "the result depends on the order of warps"
    assert trace.launches, "no kernel was launched"
    for launch in trace.launches:
        if DEVICE is None or launch.counters is not None:
            check_traffic(launch, target)
    return results[-1], trace


@contextmanager
def _recorded(target: str, order: int) -> Iterator[Trace]:
    """The kernels of a target, executed warp by warp in this order."""
    ordered = functools.partial(vgpu.run, warp_order=order)
    with patch("fusedres.vgpu.run", ordered), fusedres.backend(f"vgpu:{target}"), fusedres.record() as trace:
        yield trace


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from _tensors(part)


def _bits(tensor: Tensor) -> Tensor:
    """A copy in which NaN equals itself."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def check_traffic(launch: Launch, target: str) -> None:
    """What was declared is what moved; and warps ask for few sectors that they do not need."""
    counters = launch.counters
    assert counters is not None
    for declared, counted in (
        (launch.bytes_read, counters.bytes_read),
        (launch.bytes_written, counters.bytes_written),
    ):
        assert abs(counted - declared) <= 0.02 * declared, f"{launch.name}: {declared} bytes declared, {counted} moved"
    left_out = PER_CHANNEL
    constants = dict(launch.specialisation.constants)
    few = target == "gfx1100" and launch.name == "conv_bn_act_kernel" and constants["BLOCK_C"] == NARROWEST
    if few and constants["C_MULTIPLE"] < 8:
        # It does not read along the six bytes that a tap of a formed image's weights has.
        left_out = left_out | {"w_ptr"}
    types = dict(launch.specialisation.signature)
    if launch.name.startswith("conv_") and types.get("add_ptr", "constexpr") not in ("constexpr", types.get("w_ptr")):
        # Wider than the operands, and read as many channels at a time as these have in 16 bytes.
        left_out = left_out | {"add_ptr"}
    if (constants.get("RESIDUAL_FIRST") or 0) % 8:
        # A thread's neighbouring channels begin elsewhere in the shortcut, which is read by fewer at a time.
        left_out = left_out | {"residual_ptr"}
    if (constants.get("ADD_FIRST") or 0) % 16:
        # Some channels of a row, which begin and end inside of sectors.
        left_out = left_out | {"add_ptr"}
    if launch.name in ("conv_input_grad_kernel", "conv_weight_grad_kernel"):
        left_out = left_out | MASKS
        check_masks(launch)
    times = seen("sectors of a narrow tile's words")
    if times is not None and has_narrow_words(launch):
        left_out = left_out | {"mask_ptr"}
        words = counters.arguments["mask_ptr"]
        assert words.sectors <= times * words.ideal_sectors, f"{words.sectors} sectors, {words.ideal_sectors} ideal"
    if target == "sm_90" and "fp32" in str(launch.specialisation.signature[0]):
        # Its TF32 instruction wants both operands along the depth, and the compiler loads them in that order.
        along_depth = {"conv_weight_grad_kernel": {"x_ptr", "g_ptr"}, "conv_input_grad_kernel": {"w_ptr"}}
        left_out = left_out | along_depth.get(launch.name, set())
    tiled = [traffic for names, traffic in counters.arguments.items() if left_out.isdisjoint(names.split("/"))]
    sectors, ideal = sum(traffic.sectors for traffic in tiled), sum(traffic.ideal_sectors for traffic in tiled)
    allowed = sector_allowance(launch)
    assert sectors <= allowed * ideal, f"{launch.name}: {sectors} sectors, {allowed} x {ideal} allowed; " + ", ".join(
        f"{name} {t.sectors}/{t.ideal_sectors}" for name, t in counters.arguments.items() if t.sectors
    )


def has_narrow_words(launch: Launch) -> bool:
    """Whether a step reads fewer words of bits than there are threads."""
    types, constants = dict(launch.specialisation.signature), dict(launch.specialisation.constants)
    if launch.name != "conv_backward_kernel" or types["mask_ptr"] != "*i32":
        return False
    return constants["BLOCK_PIXELS"] * constants["BLOCK_K"] // 32 < 32 * launch.binary.num_warps


def check_masks(launch: Launch) -> None:
    """Bits of a few hundred pixels begin inside of a sector, those of every other pixel fill half of each."""
    assert launch.counters is not None
    types, strided = dict(launch.specialisation.signature), dict(launch.specialisation.constants).get("STRIDED", False)
    for names, traffic in launch.counters.arguments.items():
        if any(types[name] == "*i32" for name in MASKS.intersection(names.split("/"))):
            allowed = (4 if strided else 2) * traffic.ideal_sectors + 8
            assert traffic.sectors <= allowed, f"{launch.name}: {names} {traffic.sectors}, {allowed} allowed"


def sector_allowance(launch: Launch) -> float:
    """5 % beyond the ideal where rows begin with a sector or lie one after the other.

    An access that ends inside of a row that is not whole sectors touches one more, and a window that takes every other
    pixel of such rows two for one.
    """
    aligned = "C" in launch.specialisation.aligned
    constants = dict(launch.specialisation.constants)
    multiple = constants.get("C_MULTIPLE", 16 if aligned else 1)
    if launch.name == "space_to_depth_kernel":
        return 3.0  # neighbours in a block are of different rows and channels; the cache has the rest of their sectors
    if launch.name.startswith("moments_"):
        return 2.5  # fp32 beside 16-bit weights, in pieces of 16 bytes of the latter; small matrices from the cache
    if launch.name.startswith(("conv_", "input_moments_kernel")):
        return contraction_allowance(launch.name, constants)
    if launch.name.startswith("stem_pool") and multiple < 16:
        return 2.5
    if multiple < 16 and any(
        name.endswith("_row") and type_ != "constexpr" for name, type_ in launch.specialisation.signature
    ):
        return 8.0  # slices of wider rows that begin anywhere
    return 1.5 if multiple < 4 else 1.05


def contraction_allowance(name: str, constants: dict[str, Any]) -> float:
    """As for other kernels where pixels are whole sectors; gradients' where they read 32 channels or more at a time.

    Elsewhere pixels, and the taps of a weight, begin inside of sectors, and those of odd sizes are read by the value.
    """
    # Descriptors take rows of whole 16 bytes alone.
    multiple = min(constants.get("C_MULTIPLE", 8), constants.get("K_MULTIPLE", 16))
    wide = constants["BLOCK_C"] >= 32 and constants.get("GROUPS_PER_TILE", 1) == 1
    if name in ("conv_input_grad_kernel", "conv_weight_grad_kernel", "conv_backward_kernel"):
        return 1.05 if multiple == 16 and wide else 8.0
    if multiple == 16:
        return 1.05
    return 1.4 if multiple == 8 and wide else 8.0


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def activation(size: Size, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """Normal numbers, channels_last."""
    return channels_last((torch.randn(size) + mean).to(dtype))
