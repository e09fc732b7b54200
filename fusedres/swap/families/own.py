"""The project's own blocks; its networks are registered where they are."""

from fusedres.nn import blocks, plain
from fusedres.swap.registry import NOTHING_TO_FUSE, register

for block, fused in blocks.FUSED.items():
    register(block, fused)

NOTHING_TO_FUSE[plain.HighwayBlock] = (
    "a highway block has no batch norm: its two convolutions and its gate run as they are"
)
