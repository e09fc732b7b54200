"""torchvision's DenseNets: densenet121, 161, 169, 201."""

from torchvision.models import densenet

from ..nn.fused_dense import FusedDenseBlock, FusedDenseEnds, FusedTransition


class FusedTorchvisionDenseBlock(FusedDenseBlock, densenet._DenseBlock):
    """torchvision's _DenseBlock with a fused forward pass."""

    dense_layer = densenet._DenseLayer


class FusedTorchvisionTransition(FusedTransition, densenet._Transition):
    """torchvision's _Transition with a fused forward pass."""


class FusedTorchvisionDenseNet(FusedDenseEnds, densenet.DenseNet):
    """torchvision's DenseNet with a fused stem and a fused end."""


FAMILY = {
    densenet._DenseBlock: FusedTorchvisionDenseBlock,
    densenet._Transition: FusedTorchvisionTransition,
    densenet.DenseNet: FusedTorchvisionDenseNet,
}
