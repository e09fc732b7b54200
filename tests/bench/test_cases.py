"""fusedres.bench.cases: what is found by name, and what is said where nothing is."""

import pytest
import torch

from fusedres.bench import cases
from fusedres.bench.ops import op
from fusedres.bench.setting import Setting, device_named
from tests.bench.tiny import NETWORK, TRAIN

CPU = device_named("cpu")


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (cases.network, "resnet49", "model: expected a name such as resnet"),
        (cases.network, "cifar_resnet57", "cifar_resnet56"),
        (cases.network, "timm/resnet51", r"model: expected a name such as timm\.resnet"),
        (cases.network, "torchvision.ssd300_vgg16", "ssd300_vgg16, which takes a list of images"),
        (cases.block, "bottleneck5", "block: expected one such as bottleneck"),
        (op, "block_end.stage5", "op: expected one such as block_end.stage"),
        (op, "xyzzy", "op: expected one such as conv3x3_prologue_stats.stage1"),
    ],
)
def test_unknown_names_list_near_ones(find, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


@pytest.mark.parametrize("name", cases.BLOCKS)
def test_blocks_are_those_of_the_networks(name):
    case = cases.block(name)
    size = cases.output_size(case, case.px)
    stage = int(name.removesuffix("_down")[-1])
    assert size[0] == (256 if "bottleneck" in name else 64) * 2 ** (stage - 1)
    assert size[1] == 56 // 2 ** (stage - 1)


def test_weights_and_data_are_drawn_alike_every_time():
    torch.manual_seed(1)
    first = NETWORK.model().state_dict(), NETWORK.data(TRAIN, 0)
    torch.manual_seed(2)
    second = NETWORK.model().state_dict(), NETWORK.data(TRAIN, 0)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert not torch.equal(NETWORK.data(TRAIN, 1)[0], first[1][0])


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="px: alexnet can not take images of 16 x 16 pixels"):
        cases.output_size(cases.network("alexnet"), 16)


def test_near_names_are_listed_once():
    with pytest.raises(ValueError) as refusal:
        cases.network("resnet49")
    names = str(refusal.value).removeprefix("model: expected a name such as ").split(", ")
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["timm.resnet18", "timm/resnet18"])
def test_a_network_of_timm(name):
    case = cases.network(name)
    assert cases.output_size(case, 64) == (1000,)


def test_a_network_that_gives_an_image_has_a_label_for_each_pixel():
    case = cases.network("torchvision.fcn_resnet50")
    assert (case.channels, case.px, cases.output_size(case, 32)) == (3, 224, (21, 32, 32))
    x, labels = case.data(Setting("train", "fp32", 2, 32, CPU), 0)
    assert x.shape == (2, 3, 32, 32) and labels.shape == (2, 32, 32)
    assert labels.min() == 0 and labels.max() == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", "device: expected cpu.* auto, vgpu:<target>.* got 'cuda:99'"),
        ("tpu", "device: expected cpu"),
        ("vgpu:sm_1", "backend: expected vgpu:<target>"),
    ],
)
def test_unknown_devices_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        device_named(name)


def test_arithmetic_is_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with Setting("train", "fp32", 1, 8, CPU).arithmetic():
        assert not torch.backends.cudnn.allow_tf32
    with Setting("train", "tf32", 1, 8, CPU).arithmetic():
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
