"""torchvision's ResNets (resnet18-152, resnext50/101, wide_resnet50/101) and DenseNets (densenet121, 161, 169, 201)."""

from typing import Any

import torch
from torch import Tensor

from fusedres.nn.chain import BlockParts, residual_parts
from fusedres.nn.dense import (
    DenseBlockParts,
    EndParts,
    FusedDenseBlock,
    FusedDenseEnds,
    FusedTransition,
    TransitionParts,
    dense_block_parts,
    end_parts,
    transition_parts,
)
from fusedres.nn.pooling import global_pool
from fusedres.nn.stem import FusedStem, StemParts, stem_parts
from fusedres.swap.registry import family

RESNET, DENSENET = "torchvision.models.resnet", "torchvision.models.densenet"


@family(RESNET, "BasicBlock", adds_in_place=True)
def basic_parts(block: Any) -> BlockParts:
    return residual_parts(block, 2)


@family(RESNET, "Bottleneck", adds_in_place=True)
def bottleneck_parts(block: Any) -> BlockParts:
    return residual_parts(block, 3)


class ResNetMixin(FusedStem):
    """torchvision's ResNet with a fused stem; its stages are what their blocks are."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        model: Any = self
        if self.runs_library_code(x):
            plain: Any = super()
            return plain._forward_impl(x)
        x = self.stem_and_stages(x)
        return model.fc(torch.flatten(global_pool(model.avgpool, x), 1))


@family(RESNET, "ResNet", mixin=ResNetMixin)
def first_parts(model: Any) -> StemParts:
    return stem_parts(model)


@family(DENSENET, "_DenseBlock", mixin=FusedDenseBlock)
def dense_parts(block: Any) -> DenseBlockParts:
    from torchvision.models.densenet import _DenseLayer

    return dense_block_parts(block, _DenseLayer)


@family(DENSENET, "_Transition", mixin=FusedTransition)
def between_parts(module: Any) -> TransitionParts:
    return transition_parts(module)


@family(DENSENET, "DenseNet", mixin=FusedDenseEnds)
def outer_parts(model: Any) -> EndParts:
    return end_parts(model)
