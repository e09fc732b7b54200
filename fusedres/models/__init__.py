"""The networks of the papers: built from `fusedres.nn` blocks, or torchvision's and timm's, fused."""

from fusedres.models.cifar import cifar_plain, cifar_resnet, plain, resnext, stochastic_resnet
from fusedres.models.densenet import (
    DenseNet,
    densenet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    imagenet_densenet,
)
from fusedres.models.imagenet import imagenet_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from fusedres.models.iresnet import iresnet
from fusedres.models.network import ResNet
from fusedres.models.preact import imagenet_preact_resnet, preact_resnet, wide_resnet
from fusedres.models.registry import create, entry, names
from fusedres.models.variants import highway, variant_resnet

__all__ = [
    "DenseNet",
    "ResNet",
    "cifar_plain",
    "cifar_resnet",
    "create",
    "densenet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "entry",
    "highway",
    "imagenet_densenet",
    "imagenet_preact_resnet",
    "imagenet_resnet",
    "iresnet",
    "names",
    "plain",
    "preact_resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext",
    "stochastic_resnet",
    "variant_resnet",
    "wide_resnet",
]
