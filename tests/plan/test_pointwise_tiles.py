"""fusedres.plan.pointwise_tiles: which 1x1 convolutions, in which tiles, and that compilers hold these in registers."""

import pytest
import torch

import fusedres
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS, triton_version
from fusedres.operands import ConvInput, Geometry
from fusedres.ops.conv_forward import conv_forward
from fusedres.plan import conv_tiles
from fusedres.plan import pointwise_tiles as plan
from fusedres.plan.pointwise_tiles import LEAST_STEPS, PointwiseTile, pointwise_tile, pointwise_tiles
from fusedres.plan.shapes import ConvVariant
from fusedres.plan.tiles import listed

H100 = TARGETS["sm_90"]
DESCRIBED_BY = ("sm_90", "sm_100", *(["sm_120"] if triton_version() >= (3, 8) else []))
PIXELS = 256 * 56 * 56


def variant(c: int, k: int, pixels: int = PIXELS, **changes: object) -> ConvVariant:
    return ConvVariant(pixels, c, k, 1, 1, 1, 2)._replace(**changes)


CHOSEN = {
    "layer1's first": (variant(64, 64), PointwiseTile(128, 64, 64, 8, 4, 264)),
    "layer1's last": (variant(64, 256), PointwiseTile(64, 128, 64, 8, 4, 132)),
    "layer1's others": (variant(256, 64), PointwiseTile(64, 64, 256, 8, 2, 264)),
    "layer2's last": (variant(128, 512, PIXELS // 4), PointwiseTile(64, 128, 128, 8, 4, 66)),
    "layer2's others": (variant(512, 128, PIXELS // 4), PointwiseTile(64, 64, 512, 8, 2, 66)),
    "layer3's last": (variant(256, 1024, PIXELS // 16), PointwiseTile(64, 64, 256, 8, 2, 16)),
    "channels that are no power of two": (variant(48, 24), PointwiseTile(128, 32, 64, 8, 4, 264)),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_tiles_of_an_h100(case: str) -> None:
    conv, tile = CHOSEN[case]
    assert pointwise_tiles(conv, H100) == (tile,)
    assert tile.pieces(conv) * tile.parts <= 2 * H100.multiprocessors
    assert tile.steps(conv) >= LEAST_STEPS
    # What is under way, the columns of the weight and the outputs that wait.
    held = 2 * (tile.num_stages * tile.block_pixels * tile.block_c + tile.block_k * (tile.block_c + tile.block_pixels))
    blocks = -(-tile.pieces(conv) * tile.parts // H100.multiprocessors)
    assert blocks * held <= H100.shared_bytes


NONE = {
    "a window": variant(64, 64, r=3, s=3),
    "groups": variant(64, 64, groups=2),
    "fp32": variant(64, 64, itemsize=4),
    "columns that do not fit": variant(1024, 64),
    "an operand formed of too many channels": variant(256, 64, prologue=True),
    "few pixels": variant(64, 64, pixels=8 * 56 * 56),
}


@pytest.mark.parametrize("case", NONE)
def test_other_convolutions_have_none(case: str) -> None:
    assert pointwise_tiles(NONE[case], H100) == ()


def test_gpus_and_compilers_without_descriptors_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = variant(64, 256)
    assert {name for name, target in TARGETS.items() if pointwise_tiles(conv, target)} == set(DESCRIBED_BY)
    for version, described in (((3, 5), set()), ((3, 7), {"sm_90", "sm_100"})):
        monkeypatch.setattr(plan, "triton_version", lambda version=version: version)
        assert {name for name, target in TARGETS.items() if pointwise_tiles(conv, target)} == described


def test_a_tile_of_another_kind_that_is_chosen_by_hand_comes_first() -> None:
    conv, tile = CHOSEN["layer1's last"]
    assert pointwise_tile(conv, H100) == tile
    with listed(0):
        assert pointwise_tile(conv, H100) == tile
    with listed(1):
        assert pointwise_tile(conv, H100) is None
    with conv_tiles.pinned(conv_tiles.ConvTile(64, 64, 64, 4, 2)):
        assert pointwise_tile(conv, H100) is None


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize(("c", "k"), [(64, 64), (64, 256), (128, 512), pytest.param(512, 128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", DESCRIBED_BY)
def test_nothing_is_spilled_and_accesses_are_wide(target: str, c: int, k: int, prologue: bool) -> None:
    x = torch.empty(256, c, 28, 28, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(k, c, 1, 1, device="meta", dtype=torch.bfloat16)
    numbers = torch.empty(2, c, device="meta").unbind() if prologue else (None, None)
    with fusedres.backend("triton"), fusedres.record(target) as trace:
        conv_forward(ConvInput(x, *numbers), weight, Geometry(), statistics=True)
    (launch,) = trace.launches
    if launch.name != "conv_pointwise_kernel":
        assert prologue or target == "sm_120"
        return
    figures = read_figures(compile_binary(launch.binary, target), target)
    assert not violations(launch.binary, target, figures)
    assert figures.spill_stores == figures.stack == 0
    assert figures.access == 16 and figures.async_copies >= 3 and not figures.serialised
