"""fusedres.models: parameters and multiplications of every network, beside the figures that the papers print.

A figure of a paper is held to the digits that it has; beside it stands the exact count, so that nothing changes
unnoticed.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from fusedres.models import create, entry, names
from fusedres.models.sources import IMAGES, source
from tests.models.test_registry import DEEP


class Row(NamedTuple):
    parameters: int
    multiplications: int
    """Of one image, convolutions and the classifier: the papers' "FLOPs (multiply-adds)"."""
    printed: str = ""
    """Millions of parameters as the paper prints them."""
    printed_flops: str = ""
    """1e9 multiply-adds as the paper prints them."""
    source: str = ""


HE15 = "arXiv:1512.03385, table 1"
HE15_CIFAR = "arXiv:1512.03385, table 6"
HE16 = "arXiv:1603.05027, table 4"
DENSE = "arXiv:1608.06993, table 2"
TORCHVISION = "torchvision's weights of this network"
WIDE = "arXiv:1605.07146, table 4"
VGG = "arXiv:1409.1556, table 2"
PYCLS = "MODEL_ZOO.md of facebookresearch/pycls, the code of arXiv:2003.13678"
TIMM = "timm's card of this network"
AS_RESNET = "as many as ResNet (README.md of iduta/iresnet, the code of arXiv:2004.04989); conv1 of stage 1 sees 112 px"

TABLE = {
    "resnet18": Row(11_689_512, 1_814_073_344, "11.7", "1.8", f"{HE15}; parameters: {TORCHVISION}"),
    "resnet34": Row(21_797_672, 3_663_761_408, "21.8", "3.7", f"3.6 in {HE15}, without projections: see plain34"),
    "resnet50": Row(25_557_032, 4_089_184_256, "25.6", "4.1", TORCHVISION),
    "resnet101": Row(44_549_160, 7_801_405_440, "44.5", "7.8", TORCHVISION),
    "resnet152": Row(60_192_808, 11_513_626_624, "60.2", "11.5", TORCHVISION),
    "resnet50_v1": Row(25_557_032, 3_857_973_248, "", "3.9", f"3.8 in {HE15}, rounded down"),
    "resnet101_v1": Row(44_549_160, 7_570_194_432, "", "7.6", HE15),
    "resnet152_v1": Row(60_192_808, 11_282_415_616, "", "11.3", HE15),
    "plain18": Row(11_515_688, 1_794_805_760, "", "1.8", HE15),
    "plain34": Row(21_623_848, 3_644_493_824, "", "3.6", HE15),
    "cifar_resnet20": Row(269_722, 40_551_040, "0.27", "", HE15_CIFAR),
    "cifar_resnet32": Row(464_154, 68_862_592, "0.46", "", HE15_CIFAR),
    "cifar_resnet44": Row(658_586, 97_174_144, "0.66", "", HE15_CIFAR),
    "cifar_resnet56": Row(853_018, 125_485_696, "0.85", "", HE15_CIFAR),
    "cifar_resnet110": Row(1_727_962, 252_887_680, "1.7", "", HE15_CIFAR),
    "cifar_resnet1202": Row(19_421_274, 2_829_238_912, "19.4", "", HE15_CIFAR),
    "cifar_plain20": Row(269_722, 40_551_040, "0.27", "", "as ResNet-20: option A has no parameters"),
    "cifar_plain32": Row(464_154, 68_862_592, "0.46", "", "as ResNet-32"),
    "cifar_plain44": Row(658_586, 97_174_144, "0.66", "", "as ResNet-44"),
    "cifar_plain56": Row(853_018, 125_485_696, "0.85", "", "as ResNet-56"),
    "preact_resnet110": Row(1_727_962, 252_887_680, "1.7", "", HE16),
    "preact_resnet164": Row(1_703_258, 247_646_720, "1.7", "", HE16),
    "preact_resnet1001": Row(10_327_706, 1_490_995_712, "", "", f"{HE16}: 10.2 without batch norms, see below"),
    "preact_resnet200": Row(64_666_152, 15_007_481_856, "64.7", "15.0", "the layers of arXiv:1603.05027, section 4"),
    "resnet110_constant_scaling": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet110_constant_scaling_shortcut": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet110_exclusive_gating": Row(1_824_186, 266_781_312, "", "", "ResNet-110 and 54 gates, 16 to 64 channels"),
    "resnet110_shortcut_gating": Row(1_824_186, 266_781_312, "", "", "the same"),
    "resnet110_dropout_shortcut": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet110_conv_shortcut": Row(1_826_202, 266_781_312, "", "", "ResNet-110 and 54 projections with batch norm"),
    "resnet110_bn_after_add": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet110_relu_before_add": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet110_relu_only": Row(1_727_962, 252_887_680, "1.7", "", "as ResNet-110"),
    "resnet164_bn_after_add": Row(1_704_154, 247_646_720, "1.7", "", "as ResNet-164"),
    "resnet164_relu_before_add": Row(1_704_154, 247_646_720, "1.7", "", "as ResNet-164"),
    "resnet164_relu_only": Row(1_704_154, 247_646_720, "1.7", "", "as ResNet-164"),
    "highway19": Row(2_342_406, 351_899_016, "2.3", "", "arXiv:1505.00387, table of CIFAR-10: Highway 2 (Fitnet 4)"),
    "densenet40_k12": Row(1_019_722, 264_812_928, "1.0", "", DENSE),
    "densenet100_k12": Row(6_979_642, 1_769_516_448, "7.0", "", DENSE),
    "densenet100_k24": Row(27_249_082, 6_889_347_744, "27.2", "", DENSE),
    "densenet_bc100_k12": Row(769_162, 287_929_692, "0.8", "", DENSE),
    "densenet_bc250_k24": Row(15_324_406, 5_418_785_724, "15.3", "", DENSE),
    "densenet_bc190_k40": Row(25_624_430, 9_301_945_740, "25.6", "", DENSE),
    "densenet121": Row(7_978_856, 2_834_161_664, "8.0", "2.8", TORCHVISION),
    "densenet161": Row(28_681_000, 7_727_907_072, "28.7", "7.7", TORCHVISION),
    "densenet169": Row(14_149_480, 3_359_843_328, "14.1", "3.4", TORCHVISION),
    "densenet201": Row(20_013_928, 4_291_365_888, "20.0", "4.3", TORCHVISION),
    "densenet264": Row(33_337_704, 5_751_653_376, "", "", "the layers of arXiv:1608.06993, table 1"),
    "stochastic_resnet110": Row(1_727_962, 252_887_680, "1.7", "", "arXiv:1603.09382, section 4: ResNet-110"),
    "stochastic_resnet1202": Row(19_421_274, 2_829_238_912, "19.4", "", "arXiv:1603.09382, section 4: ResNet-1202"),
    "wide_resnet16_8": Row(10_961_370, 1_548_145_664, "11.0", "", WIDE),
    "wide_resnet28_10": Row(36_479_194, 5_243_328_768, "36.5", "", WIDE),
    "wide_resnet40_1": Row(563_930, 83_280_512, "0.6", "", WIDE),
    "wide_resnet40_2": Row(2_243_546, 327_599_360, "2.2", "", WIDE),
    "wide_resnet40_4": Row(8_949_210, 1_298_582_016, "8.9", "", WIDE),
    "resnext29_8x64": Row(34_426_698, 5_387_266_048, "34.4", "", "arXiv:1611.05431, table 7"),
    "resnext29_16x64": Row(68_155_210, 10_688_866_304, "68.2", "", "arXiv:1611.05431, table 7 (68.1, rounded down)"),
    "vgg16": Row(138_357_544, 15_470_264_320, "138", "15.5", f"{VGG}; multiply-adds: {TORCHVISION}"),
    "vgg16_bn": Row(138_365_992, 15_470_264_320, "", "15.5", TORCHVISION),
    "vgg19": Row(143_667_240, 19_632_062_464, "144", "19.6", f"{VGG}; multiply-adds: arXiv:1512.03385, section 3.3"),
    "vgg19_bn": Row(143_678_248, 19_632_062_464, "", "19.6", "arXiv:1512.03385, section 3.3"),
    "mobilenet_v2": Row(3_504_872, 300_774_272, "3.5", "0.3", f"{TORCHVISION}; arXiv:1801.04381, table 4: 3.4 and 0.3"),
    "regnet_x_400mf": Row(5_495_976, 413_812_608, "5.5", "0.4", f"{TORCHVISION}, wider than the 5.2 of {PYCLS}"),
    "regnet_x_800mf": Row(7_259_656, 799_699_712, "7.3", "0.8", PYCLS),
    "regnet_x_1_6gf": Row(9_190_136, 1_602_849_792, "9.2", "1.6", PYCLS),
    "regnet_x_3_2gf": Row(15_296_552, 3_176_621_952, "15.3", "3.2", PYCLS),
    "regnet_x_8gf": Row(39_572_648, 7_995_132_416, "39.6", "8.0", PYCLS),
    "regnet_x_16gf": Row(54_278_536, 15_940_755_456, "54.3", "15.9", PYCLS),
    "regnet_x_32gf": Row(107_811_560, 31_735_929_792, "107.8", "31.7", PYCLS),
    "regnet_y_400mf": Row(4_344_144, 401_842_848, "4.3", "0.4", PYCLS),
    "regnet_y_800mf": Row(6_432_512, 833_856_256, "6.4", "0.8", f"{TORCHVISION}, wider than the 6.3 of {PYCLS}"),
    "regnet_y_1_6gf": Row(11_202_430, 1_612_076_160, "11.2", "1.6", PYCLS),
    "regnet_y_3_2gf": Row(19_436_338, 3_176_482_752, "19.4", "3.2", PYCLS),
    "regnet_y_8gf": Row(39_381_472, 8_473_070_592, "39.4", "8.5", f"{TORCHVISION}, wider than 39.2 and 8.0 of {PYCLS}"),
    "regnet_y_16gf": Row(83_590_140, 15_911_510_272, "83.6", "15.9", PYCLS),
    "regnet_y_32gf": Row(145_046_770, 32_279_552_832, "145.0", "32.3", PYCLS),
    "seresnet50": Row(28_088_024, 4_091_699_200, "28.1", "4.1", f"{TIMM}: the stride in the 3x3, as in torchvision's"),
    "resnet50d": Row(25_576_264, 4_328_824_832, "", "4.3", "arXiv:1812.01187, table 5; its 25 is rounded down"),
    "iresnet50": Row(25_557_032, 4_127_719_424, "25.6", "", AS_RESNET),
    "iresnet101": Row(44_549_160, 7_839_940_608, "44.5", "", AS_RESNET),
    "iresnet152": Row(60_192_808, 11_552_161_792, "60.2", "", AS_RESNET),
    "resnest50": Row(27_483_240, 5_371_160_576, "27.5", "5.4", TIMM),
    "resnest101": Row(48_275_016, 13_321_472_000, "48", "", "timm's page of ResNeSt; at 256 px, the paper's crop"),
    "fasterrcnn_resnet50_fpn": Row(
        41_808_406, 88_381_440_000, "", "", "torchvision's, see below; of the pyramid alone"
    ),
}


def test_every_network_has_a_row_with_a_source():
    assert set(TABLE) == set(names())
    assert all(row.source for row in TABLE.values())


def multiplications(model: nn.Module, side: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, side, side))
    return total


def rounded(count: int, unit: float, like: str) -> str:
    return f"{count / unit:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if any(d in n for d in DEEP) else ()) for n in TABLE]
)
def test_parameters_and_multiplications(name):
    row, found = TABLE[name], source(name)
    model = found.on_meta().eval()
    with torch.device("meta"):
        # How much a detector computes behind its pyramid depends on what it sees.
        counted = multiplications(model if found.takes == IMAGES else model.backbone, entry(name).side)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, counted) == (row.parameters, row.multiplications)
    if row.printed:
        assert rounded(parameters, 1e6, row.printed) == row.printed
    if row.printed_flops:
        assert rounded(counted, 1e9, row.printed_flops) == row.printed_flops


def test_the_34_layers_of_the_paper_take_18_percent_of_vgg_19():
    """arXiv:1512.03385, section 3.3: 3.6 and 19.6 billion multiply-adds, "only 18%"."""
    assert int(100 * TABLE["plain34"].multiplications / TABLE["vgg19"].multiplications) == 18


def test_parameters_that_a_paper_adds_to_resnet50():
    """SE-ResNet's 2.5 million (arXiv:1709.01507), ResNet-D's deep stem (arXiv:1812.01187), nothing by iResNet."""
    added = {name: TABLE[name].parameters - TABLE["resnet50"].parameters for name in ("seresnet50", "resnet50d")}
    assert rounded(added["seresnet50"], 1e6, "2.5") == "2.5"
    assert added["resnet50d"] == 9 * (3 * 32 + 32 * 32 + 32 * 64) - 49 * 3 * 64 + 2 * 2 * 32
    for depth in (50, 101, 152):
        assert TABLE[f"iresnet{depth}"].parameters == TABLE[f"resnet{depth}"].parameters


OF_TORCHVISION = [name for name in names() if (entry(name).library_name or "").startswith("torchvision.")]


@pytest.mark.parametrize("name", ["densenet161", *OF_TORCHVISION])
def test_torchvision_documents_the_same_counts(name):
    models = pytest.importorskip("torchvision").models
    documented = next(iter(models.get_model_weights(name))).meta
    row, parameters = TABLE[name], documented["num_params"]
    if name == "fasterrcnn_resnet50_fpn":
        # Its weights are of a network whose batch norms are frozen and have no parameters: gamma and beta of 26,560.
        assert row.parameters == parameters + 2 * 26_560
    else:
        assert row.parameters == parameters
        assert row.multiplications / 1e9 == pytest.approx(documented["_ops"], abs=1e-3)


@pytest.mark.slow
def test_preact_resnet1001_without_batch_norms_has_the_10_2_million_of_the_paper():
    with torch.device("meta"):
        model = create("preact_resnet1001", fused=False)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(p.numel() for m in weighted for p in m.parameters()) == 10_178_490


WEIGHTED = {
    "resnet18": 18, "resnet50": 50, "resnet50_v1": 50, "plain34": 34, "cifar_resnet110": 110, "cifar_plain56": 56,
    "highway19": 19, "densenet40_k12": 40, "densenet_bc100_k12": 100, "densenet121": 121, "resnext29_8x64": 29,
    "preact_resnet164": 164, "densenet161": 161, "iresnet50": 50, "iresnet101": 101,
    "iresnet152": 152, "vgg16": 16, "vgg19_bn": 19, "resnet50d": 52,
}  # fmt: skip


@pytest.mark.parametrize(("name", "depth"), WEIGHTED.items())
def test_the_name_counts_the_weighted_layers(name, depth):
    """But for shortcuts and gates, which the papers do not count."""
    with torch.device("meta"):
        model = create(name, fused=False)
    weighted = [
        n for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n and "gate" not in n
    ]  # fmt: skip
    assert len(weighted) == depth


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "densenet161"])
def test_keys_and_shapes_are_torchvisions(name):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        theirs = getattr(models, name)().state_dict()
        for fused in (True, False):
            ours = create(name, fused=fused).state_dict()
            assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
                (k, v.shape, v.dtype) for k, v in theirs.items()
            ]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "densenet121", pytest.param("densenet161", marks=pytest.mark.slow)]
)
def test_torchvisions_weights_load_and_give_its_logits(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    theirs = getattr(models, name)(num_classes=3).eval()
    ours = create(name, num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
