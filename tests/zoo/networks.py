"""Everything of the zoo that has to be fused fully, by name, with the shape of its input."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from tests.zoo import (
    chains,
    cifar_branches,
    cifar_plain,
    cifar_resnet,
    faces,
    game,
    hugging_face,
    iresnet,
    option_a,
    unet,
    yolo,
)
from tests.zoo.between import BETWEEN
from tests.zoo.chains import CHAINS, NORMS
from tests.zoo.shortcuts import SHORTCUTS
from tests.zoo.spellings import SPELLINGS


class Network(NamedTuple):
    """How one is made, and what it takes.

    Attributes:
        make: without arguments.
        shape: of the input.
        left: how many batch norms are in no fused pass, for a reason that is no fault.
        pickles: whether pickle can write the plain one.
        views: whether it reads pixels by `view`, which channels_last ones do not have.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 3, 16, 16)
    left: int = 0
    pickles: bool = True
    views: bool = False


PHOTO, FEATURES = (2, 3, 32, 32), (3, 8, 9, 8)

NETWORKS = {
    "CIFAR, basic": Network(lambda: cifar_resnet.ResNet(cifar_resnet.BasicBlock, [2, 2]), (3, 3, 8, 8)),
    "CIFAR, bottleneck": Network(lambda: cifar_resnet.ResNet(cifar_resnet.Bottleneck, [2, 1]), (3, 3, 8, 8)),
    "CIFAR, ResNeXt": Network(lambda: cifar_resnet.ResNet(cifar_resnet.ResNeXtBlock, [1, 1]), (3, 3, 8, 8)),
    "CIFAR, SE": Network(lambda: cifar_resnet.ResNet(cifar_resnet.SEBlock, [1, 2]), (3, 3, 8, 8)),
    "CIFAR, pre-activation": Network(lambda: cifar_resnet.PreActResNet(cifar_resnet.PreActBlock, [2, 2]), (3, 3, 8, 8)),
    "CIFAR, pre-activation bottleneck": Network(
        lambda: cifar_resnet.PreActResNet(cifar_resnet.PreActBottleneck, [2, 1]), (3, 3, 8, 8)
    ),
    "CIFAR, pre-activation SE": Network(
        lambda: cifar_resnet.PreActResNet(cifar_resnet.SEPreActBlock, [1, 2]), (3, 3, 8, 8)
    ),
    "CIFAR, dense": Network(cifar_branches.DenseNet, (3, 3, 8, 8)),
    "CIFAR, dual path": Network(cifar_branches.DPN, (3, 3, 8, 8)),
    "CIFAR, Inception": Network(cifar_branches.GoogLeNet, (3, 3, 8, 8)),
    "CIFAR, deep aggregation": Network(cifar_branches.SimpleDLA, (3, 3, 8, 8)),
    "CIFAR, VGG": Network(cifar_plain.VGG),
    "CIFAR, flattened by view": Network(cifar_plain.Flattened, views=True),
    "CIFAR, MobileNet": Network(cifar_plain.mobilenet),
    "CIFAR, MobileNetV2": Network(cifar_plain.mobilenet_v2),
    "CIFAR, RegNetX": Network(lambda: cifar_plain.regnet(0)),
    "CIFAR, RegNetY": Network(lambda: cifar_plain.regnet(0.25)),
    "CIFAR, ShuffleNet": Network(cifar_plain.shufflenet),
    "option A, lambda": Network(lambda: option_a.ResNet(option_a.BasicBlock, [2, 2]), pickles=False),
    "option A, class": Network(lambda: option_a.ResNet(option_a.PicklableBlock, [1, 2])),
    "option B": Network(lambda: option_a.ResNet(option_a.BasicBlock, [1, 2], option="B")),
    "iResNet": Network(iresnet.IResNet, PHOTO),
    "iResNet, two blocks": Network(lambda: iresnet.IResNet((2, 5)), PHOTO),
    "face recognition": Network(faces.FaceNet),
    "game": Network(game.PolicyValueNet, (4, 5, 9, 9), views=True),
    "U-Net": Network(unet.UNet, PHOTO),
    "detector": Network(yolo.Detector, PHOTO),
    "feature pyramid": Network(chains.FPN, PHOTO),
    "shared tower": Network(chains.SharedTower),
    "Hugging Face ResNet, basic": Network(hugging_face.resnet, PHOTO),
    "Hugging Face ResNet, bottleneck": Network(lambda: hugging_face.resnet("bottleneck"), PHOTO),
    "Hugging Face RegNetX": Network(hugging_face.regnet, PHOTO),
    "Hugging Face RegNetY": Network(lambda: hugging_face.regnet("y"), PHOTO),
    **{f"spelling {name}": Network(make, FEATURES) for name, make in SPELLINGS.items()},
    "spelling Branch, strided": Network(lambda: SPELLINGS["Branch"](8, 12, 2), FEATURES),
    **{f"shortcut by {name}": Network(make, (3, 8, 8, 10)) for name, make in SHORTCUTS.items()},
    **{f"{name} between": Network(make, FEATURES) for name, make in BETWEEN.items()},
    **{f"chain: {name}": Network(make, FEATURES) for name, make in CHAINS.items()},
    **{f"norm: {name}": Network(make, FEATURES) for name, make in NORMS.items()},
}
