"""The project's own blocks and networks."""

from fusedres.models.densenet import DenseNet, FusedDenseNet
from fusedres.models.network import FusedResNet, ResNet
from fusedres.nn import blocks, plain
from fusedres.swap.registry import NOTHING_TO_FUSE, register

for block, fused in blocks.FUSED.items():
    register(block, fused)
register(ResNet, FusedResNet)
register(DenseNet, FusedDenseNet)

NOTHING_TO_FUSE[plain.HighwayBlock] = (
    "a highway block has no batch norm: its two convolutions and its gate run as they are"
)
