"""fusedres.patterns.choose and cost: what a rung costs, and which is taken for it."""

import dataclasses

import pytest
import torch

import fusedres
from fusedres.autograd.shortcut import Identity
from fusedres.compiler.targets import TARGETS
from fusedres.nn import BasicBlock, Bottleneck
from fusedres.patterns.choose import HOST_SECONDS, KERNEL_SECONDS, choose, estimate, listening
from fusedres.patterns.cost import ChainShape, LayerShape, Pass, StemShape, chain_passes, stem_passes, takes_moments
from fusedres.plan.gpus import GPUS, assume_gpu, gpu_named, nearest_gpu, target_gpu
from fusedres.plan.schedule import SCHEDULES

H100 = GPUS["h100"]
BF16 = torch.bfloat16


def conv(images, side, c, k, window=1, groups=1):
    pixels = images * side * side
    return LayerShape(pixels, pixels, pixels, c, k, groups, (window, window), window > 1)


def bottleneck(images, side, width):
    layers = (
        conv(images, side, 4 * width, width),
        conv(images, side, width, width, 3),
        conv(images, side, width, 4 * width),
    )
    return ChainShape(layers, Identity())


def basic(images, side, width):
    return ChainShape((conv(images, side, width, width, 3),) * 2, Identity())


def moved(chain, rung):
    return sum(step.moved for step in chain_passes(chain, SCHEDULES[rung], 2, TARGETS["sm_90"]))


def test_a_bottleneck_in_passes_over_a_tensor_of_its_width():
    """Written out by hand, weights and masks (an eighth of a byte for 2) left out: reads and writes of each kernel."""
    unit = 256 * 56 * 56 * 64 * 2
    forward = {"moments": 5 + 2 + 1 + 9, "prologue": 5 + 2 + 5 + 12, "stats": 5 + 2 + 5 + 12 + 4}
    backward = {
        # weight and input gradients of conv3; dy of conv2, and its; of conv1 with the shortcut's, and below of conv3
        "moments": (5 + 6) + 3 + (2 + 3) + 14,
        "prologue": 8 + 10 + 3 + (2 + 3) + 14,
        "stats": (8 + 12) + 6 + 3 + (2 + 3) + 3 + 3 + 13,
    }
    for rung in forward:
        assert moved(bottleneck(256, 56, 64), rung) / unit == pytest.approx(forward[rung] + backward[rung], rel=0.03)


@pytest.mark.parametrize("chain", [bottleneck(256, 56, 64), bottleneck(256, 14, 256), basic(128, 32, 16)], ids=str)
def test_each_rung_moves_less_than_the_one_below(chain):
    bytes_ = [moved(chain, rung) for rung in SCHEDULES]
    assert bytes_ == sorted(bytes_, reverse=True)
    assert bytes_[0] > 1.2 * bytes_[2]


@pytest.mark.parametrize("rung", list(SCHEDULES))
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: Bottleneck(256, 64), (64, 256, 56, 56)),
        (lambda: Bottleneck(256, 128, 2), (64, 256, 56, 56)),
        (lambda: Bottleneck(1024, 256), (64, 1024, 14, 14)),
        (lambda: Bottleneck(64, 64, groups=4), (32, 64, 28, 28)),
        (lambda: BasicBlock(64, 64), (64, 64, 56, 56)),
        (lambda: BasicBlock(64, 128, 2), (64, 64, 56, 56)),
        (lambda: BasicBlock(64, 128, 2, shortcut="zero_pad"), (64, 64, 56, 56)),
    ],
)  # fmt: skip
def test_the_cost_is_what_is_launched(make, size, rung):
    """On the meta device, against the launches themselves; the library's calls beside them are those of block_end."""
    from fusedres.explain import Question, explain
    from fusedres.models.sources import Source

    source = Source("block", make, size[1:])
    question = Question("block", batch=size[0], rungs=(rung, "auto"), images_grad=True)
    found = explain(question, model=source)
    (choice,) = found.rungs["auto"].choices.values()
    one = next(one for one in choice.estimates if one.rung == rung)
    step = found.rungs[rung]
    assert one.moved == pytest.approx(sum(entry.bytes for entry in step.entries), rel=0.08)
    assert one.flops == pytest.approx(sum(entry.flops for entry in step.entries), rel=0.1)
    assert 0.85 <= one.launches / len(step.entries) <= 1.1


def test_partial_sums_of_wide_weights_can_outweigh_what_a_prologue_spares():
    """Few pixels and weights as large as the activations: the library sums in one kernel, ours in fp32 parts."""
    assert moved(bottleneck(8, 7, 512), "stats") < moved(bottleneck(8, 7, 512), "prologue")
    assert moved(bottleneck(256, 7, 512), "stats") > moved(bottleneck(256, 7, 512), "prologue")


def test_large_bottlenecks_take_the_moments_form_and_basic_blocks_have_none():
    choice = choose(bottleneck(256, 56, 64), BF16, H100)
    assert choice.schedule is SCHEDULES["moments"]
    assert choice.reason.startswith("1.") and "ms on h100, bound by memory" in choice.reason
    assert choose(basic(256, 56, 64), BF16, H100).schedule is SCHEDULES["prologue"]


def test_the_choice_depends_on_the_shape_and_the_dtype_and_the_gpu():
    """Moments cost C / K of the convolution: at a half they pay for bf16, not for fp32 without tensor cores."""
    layers = conv(64, 14, 512, 512, 3), conv(64, 14, 512, 1024)
    chain = ChainShape(layers)
    assert takes_moments(layers[1])
    assert choose(chain, torch.float32, GPUS["a100"], tf32=True).schedule is SCHEDULES["prologue"]
    assert choose(bottleneck(64, 56, 64), torch.float32, GPUS["a100"], tf32=True).schedule is SCHEDULES["moments"]
    assert {choose(bottleneck(64, 14, 256), BF16, gpu).schedule.name for gpu in GPUS.values()} <= set(SCHEDULES)
    slow = dataclasses.replace(H100, name="slow", matrix_tflops=10.0)
    assert choose(bottleneck(256, 7, 512), BF16, slow).schedule is not SCHEDULES["moments"]


def test_where_a_block_is_small_its_launches_decide():
    """The moments form takes a launch more, and spares too few bytes of a small batch."""
    assert choose(bottleneck(16, 7, 512), BF16, H100).schedule is SCHEDULES["prologue"]
    assert choose(bottleneck(256, 7, 512), BF16, H100).schedule is SCHEDULES["moments"]


def test_small_blocks_are_bound_by_launches():
    choice = choose(basic(1, 8, 16), BF16, H100)
    best = next(one for one in choice.estimates if one.rung == choice.schedule.name)
    assert best.bound == "launches"
    assert best.launches == min(one.launches for one in choice.estimates)
    assert best.seconds == pytest.approx(best.launches * max(HOST_SECONDS, KERNEL_SECONDS))


def test_an_estimate_is_the_longest_of_moving_computing_and_starting():
    passes = [Pass(int(3.015e12), 0), Pass(0, int(1.602828e15)), Pass(), Pass(1000, 1000)]
    one = estimate("stats", passes, BF16, H100, tf32=False)
    assert one.seconds == pytest.approx(1 + 2 + 2 * KERNEL_SECONDS)
    assert (one.moved, one.launches, one.bound) == (int(3.015e12) + 1000, 4, "arithmetic")


def test_a_stem_that_keeps_no_output_moves_least():
    stem = StemShape(conv(256, 112, 3, 64, 7), 256 * 56 * 56)
    bytes_ = {
        name: sum(step.moved for step in stem_passes(stem, rung, 2, TARGETS["sm_90"]))
        for name, rung in SCHEDULES.items()
    }
    assert min(bytes_, key=bytes_.__getitem__) == "moments" == choose(stem, BF16, H100).schedule.name
    asked = stem._replace(images_grad=True)
    assert choose(asked, BF16, H100).schedule is SCHEDULES["prologue"]


def test_a_choice_is_made_once_for_a_shape_and_heard_of_at_every_call():
    block = fusedres.fuse(BasicBlock(8, 8).to("meta"))
    x = torch.empty(2, 8, 6, 6, device="meta")
    heard = []
    with listening(heard.append), fusedres.record(), assume_gpu(GPUS["l4"]):
        for _ in range(3):
            block(x)
    assert len(heard) == 3
    assert heard[0] is heard[1] is heard[2]
    assert " on l4, " in heard[0].reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        heard[0].reason = ""


def test_a_rung_that_was_asked_for_is_not_weighed():
    block = fusedres.fuse(BasicBlock(8, 8).to("meta"), schedule="stats")
    heard = []
    with listening(heard.append), fusedres.record():
        block(torch.empty(2, 8, 6, 6, device="meta"))
    fusedres.fuse(block, schedule="auto").to_empty(device="cpu")(torch.randn(2, 8, 6, 6))
    assert heard == []


def test_gpus_are_found_by_name_title_and_target():
    assert gpu_named("H100") is H100
    with pytest.raises(ValueError, match=r"gpu: expected a name such as a100.*, got 'a10000'"):
        gpu_named("a10000")
    assert nearest_gpu("NVIDIA H100 80GB HBM3", "sm_90") is H100
    assert nearest_gpu("NVIDIA H100 PCIe", "sm_90") is GPUS["h100_pcie"]
    assert nearest_gpu("NVIDIA A100-SXM4-80GB", "sm_80") is GPUS["a100"]
    assert nearest_gpu("NVIDIA GeForce RTX 3090", "sm_86") is GPUS["rtx3090"]
    assert nearest_gpu("NVIDIA L40S", "sm_89") is GPUS["l40s"]
    assert nearest_gpu("AMD Instinct MI300X", "gfx942") is GPUS["mi300x"]
    assert nearest_gpu("NVIDIA GeForce RTX 3050", "sm_86").target == "sm_86"
    assert nearest_gpu("something new", "sm_999") is GPUS["a100"]
    for name, target in TARGETS.items():
        assert TARGETS[target_gpu(target).target] == target, name
    assert {gpu.target for gpu in GPUS.values()} == set(TARGETS)
