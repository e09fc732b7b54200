"""timm's ResNets: those of `timm.models.resnet` without attention, such as resnet50 and resnext50_32x4d."""

from typing import Any

from torch import Tensor, nn

from fusedres.nn.chain import BlockParts, residual_parts
from fusedres.nn.parts import NotFusable
from fusedres.nn.stem import FusedStem, StemParts, stem_parts
from fusedres.swap.registry import family

RESNET = "timm.models.resnet"


def _parts(block: Any, acts: tuple[str, ...]) -> BlockParts:
    """Take apart a block; what timm may have between its layers has to do nothing now.

    Raises:
        NotFusable: something there does.
    """
    from timm.layers import DropBlock2d, DropPath

    between: list[tuple[str, Any]] = [
        (name, getattr(block, name, None)) for name in ("drop_block", "aa", "se", "drop_path")
    ]
    for name, module in between:
        idle = module is None or type(module) is nn.Identity
        idle = idle or (type(module) in (DropBlock2d, DropPath) and not module.drop_prob)
        if not idle:
            raise NotFusable(f"{name} is a {type(module).__name__}, and lies between what is fused")
    parts = residual_parts(block, len(acts), acts)
    return parts._replace(others=(*parts.others, *((name, module) for name, module in between if module is not None)))


@family(RESNET, "BasicBlock", adds_in_place=True)
def basic_parts(block: Any) -> BlockParts:
    return _parts(block, ("act1", "act2"))


@family(RESNET, "Bottleneck", adds_in_place=True)
def bottleneck_parts(block: Any) -> BlockParts:
    return _parts(block, ("act1", "act2", "act3"))


STEM = ("conv1", "bn1", "act1", "maxpool")


class ResNetMixin(FusedStem):
    """timm's ResNet with a fused stem; its stages are what their blocks are."""

    fused_stem = STEM

    def forward_features(self, x: Tensor) -> Tensor:
        model: Any = self
        if model.grad_checkpointing or self.runs_library_code(x):
            plain: Any = super()
            return plain.forward_features(x)
        return self.stem_and_stages(x)


@family(RESNET, "ResNet", mixin=ResNetMixin)
def first_parts(model: Any) -> StemParts:
    return stem_parts(model, STEM)
