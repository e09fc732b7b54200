"""timm's ResNets: those of `timm.models.resnet` without attention, such as resnet50 and resnext50_32x4d."""

from typing import Any

from timm.layers import DropBlock2d, DropPath
from timm.models import resnet
from torch import Tensor, nn

from ..nn.fused import FusedBasicBlock, FusedBottleneck, FusedStem, traced
from ..nn.genuine import why_patched
from ..nn.network import network_pass, through
from ..nn.parts import BlockParts, NotFusable, residual_parts


def _parts(block: nn.Module, depth: int) -> BlockParts:
    """Take apart a block; what timm may have between its layers has to do nothing now.

    Raises:
        NotFusable: something there does.
    """
    between = [(name, getattr(block, name, None)) for name in ("drop_block", "aa", "se", "drop_path")]
    for name, module in between:
        drops = type(module) in (DropBlock2d, DropPath)
        idle = module is None or type(module) is nn.Identity or (drops and not (module.training and module.drop_prob))
        if not idle:
            raise NotFusable(f"{name} is a {type(module).__name__}, and lies between what is fused")
    parts = residual_parts(block, depth, [f"act{i}" for i in range(1, depth + 1)])
    return parts._replace(others=(*parts.others, *((name, module) for name, module in between if module is not None)))


class FusedTimmBasicBlock(FusedBasicBlock, resnet.BasicBlock):
    """timm's BasicBlock with a fused forward pass."""

    adds_in_place = True

    @classmethod
    def blocks_parts(cls, block: nn.Module) -> BlockParts:
        return _parts(block, 2)


class FusedTimmBottleneck(FusedBottleneck, resnet.Bottleneck):
    """timm's Bottleneck with a fused forward pass."""

    adds_in_place = True

    @classmethod
    def blocks_parts(cls, block: nn.Module) -> BlockParts:
        return _parts(block, 3)


class FusedTimmResNet(FusedStem, resnet.ResNet):
    """timm's ResNet with a fused stem; its stages are what their blocks are."""

    stem_relu = "act1"

    def forward_features(self, x: Tensor) -> Tensor:
        modules: Any = self
        if modules.grad_checkpointing or traced(x) or why_patched(self.fused_watches) is not None:
            plain: Tensor = super().forward_features(x)
            return plain
        with network_pass(self, x):
            x = self.stem(x)
            for stage in (modules.layer1, modules.layer2, modules.layer3, modules.layer4):
                x = through(stage, x)
        return x


FAMILY = {
    resnet.BasicBlock: FusedTimmBasicBlock,
    resnet.Bottleneck: FusedTimmBottleneck,
    resnet.ResNet: FusedTimmResNet,
}
