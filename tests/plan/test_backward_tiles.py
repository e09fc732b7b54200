"""fusedres.plan.backward_tiles: where one launch makes both gradients, how it is cut, and where dy is written first."""

import pytest

from fusedres.compiler.targets import TARGETS
from fusedres.plan.backward_tiles import MOST_SUMS, backward_tile, one_pass_pays, writing_pays
from fusedres.plan.shapes import ConvVariant

CUDA = [target for target in TARGETS.values() if target.backend == "cuda"]
H100, A100 = TARGETS["sm_90"], TARGETS["sm_80"]


def shape(pixels, c, k, window=1, itemsize=2, **more):
    return ConvVariant(pixels, c, k, 1, window, window, itemsize, operands=2, **more)


CIFAR = [shape(262144, 16, 16, 3), shape(65536, 32, 32, 3), shape(16384, 64, 64, 3)]
NARROW = [*CIFAR, shape(262144, 64, 16), shape(262144, 16, 64), shape(802816, 256, 64), shape(200704, 512, 128)]


@pytest.mark.parametrize("conv", NARROW, ids=str)
def test_narrow_convolutions_take_one_launch_on_an_h100(conv):
    assert backward_tile(conv, H100) is not None


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (shape(802816, 64, 64, 3), "ResNet-50's first 3x3: its products take longer than its bytes"),
        (shape(50176, 1024, 256), "256 channels formed for sixteen tiles"),
        (shape(12544, 512, 512, 3), "sums that no program has room for"),
        (shape(262144, 16, 16, 3, itemsize=4), "fp32"),
        (shape(262144, 16, 16, 3)._replace(groups=4), "groups"),
        (shape(0, 16, 16, 3), "an empty batch"),
    ],
)
def test_others_take_two(conv, reason):
    assert backward_tile(conv, H100) is None, reason


@pytest.mark.parametrize("name", ["gfx90a", "gfx942", "gfx950", "gfx1100"])
def test_compilers_that_spill_are_not_offered_it(name):
    assert all(backward_tile(conv, TARGETS[name]) is None for conv in NARROW)


@pytest.mark.parametrize("target", CUDA, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("producer", [False, True])
def test_a_tile_covers_its_convolution(target, bits, producer):
    offered = 0
    for conv in [*NARROW, shape(7, 3, 5, 3), shape(100, 24, 40, 3), shape(999, 17, 1), shape(64, 1, 200)]:
        tile = backward_tile(conv._replace(prologue=producer), target, bits=bits)
        if tile is None:
            continue
        offered += 1
        assert tile.block_k >= conv.k and tile.pieces(conv) * tile.block_c >= conv.c
        assert tile.per_part(conv.pixels) % tile.block_pixels == 0
        assert (tile.parts - 1) * tile.per_part(conv.pixels) < conv.pixels <= tile.parts * tile.per_part(conv.pixels)
        assert conv.r * conv.s * tile.block_k * tile.block_c <= MOST_SUMS
        partial = 4 * conv.r * conv.s * conv.c * conv.k * tile.parts
        operands = 2 * conv.pixels * (2 * conv.k + 2 * conv.c)
        assert tile.parts == 1 or 2 * partial <= operands / 2, "the parts move more than they spare"
    assert offered >= 4


def test_bits_need_registers_that_new_compilers_do_not_leave():
    widest = CIFAR[-1]
    assert backward_tile(widest, TARGETS["sm_120"]) is not None
    assert backward_tile(widest, TARGETS["sm_120"], bits=True) is None
    assert backward_tile(widest, H100, bits=True) is not None


def test_few_pixels_pay_by_the_launch_that_is_not_made():
    many, few = shape(802816, 64, 64, 3), shape(1024, 64, 64, 3)
    assert not one_pass_pays(many, H100, 4)
    assert one_pass_pays(few, H100, 4)
    assert one_pass_pays(few, A100, 4)


def test_tiles_that_form_the_same_gradient_do_not_pay():
    """Behind a prologue an A100 has registers for 32 channels of the input at a time."""
    conv = shape(200704, 512, 128)
    assert not one_pass_pays(conv, A100, 16)
    assert backward_tile(conv._replace(prologue=True), A100) is None
    assert one_pass_pays(conv, H100, 4)


@pytest.mark.parametrize("target", [H100, A100, A100._replace(multiprocessors=56)], ids=["H100", "A100", "A30"])
def test_programs_of_one_launch_come_in_whole_waves(target):
    for conv in NARROW:
        tile = backward_tile(conv, target)
        if tile is not None:
            programs, wave = tile.parts * tile.pieces(conv), target.multiprocessors
            # Of so few pixels more parts would be nothing but their sums.
            assert programs >= 0.9 * -(-programs // wave) * wave or conv.pixels < 2**15


WINDOWS = [shape(256 * side**2, c, c, 3) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))]


@pytest.mark.parametrize("target", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("conv", WINDOWS, ids=str)
def test_windows_of_resnet50_read_a_gradient_that_was_written(conv, target):
    assert writing_pays(conv, target)
    assert writing_pays(conv._replace(operands=3), target), "a mask is read once too"


@pytest.mark.parametrize(
    ("conv", "name", "reason"),
    [
        (shape(802816, 256, 64), "sm_90", "1x1: formed once by each, whose time is memory's"),
        (WINDOWS[0]._replace(operands=1), "sm_90", "nothing is formed"),
        (shape(3136, 64, 64, 3), "sm_90", "a batch of one: the launch takes longer"),
        (WINDOWS[2], "sm_86", "tensor cores so slow that the forming hides behind them"),
        (WINDOWS[0]._replace(itemsize=4), "sm_80", "fp32, of which no figures were read"),
    ],
)
def test_others_form_theirs(conv, name, reason):
    assert not writing_pays(conv, TARGETS[name]), reason
