"""torchvision's RegNets: the blocks of RegNetX, which have no squeeze-and-excite, and the stem of all."""

from typing import Any

from fusedres.nn.chain import BlockParts, FusedBlock, block_parts
from fusedres.nn.parts import NotFusable, part, parts_in_order
from fusedres.swap.registry import family

REGNET = "torchvision.models.regnet"


@family(REGNET, "ResBottleneckBlock")
def bottleneck_parts(block: Any) -> BlockParts:
    """activation(proj(x) + f(x)); f is a, b, c: convolutions with their batch norms, and activations between them."""
    se = part(block, "f")._modules.get("se")
    if se is not None:
        raise NotFusable(f"f.se is a {type(se).__name__}, and lies between what is fused")
    layers = parts_in_order(block, "f", "a", "b", "c")
    (a, a_bn, a_act), (b, b_bn, b_act) = (parts_in_order(block, name, "0", "1", "2") for name in layers[:2])
    c, c_bn = parts_in_order(block, layers[2], "0", "1")
    projection, others = None, ["f", *layers]
    if block.proj is not None:
        conv, bn = parts_in_order(block, "proj", "0", "1")
        projection, others = (conv, bn), [*others, "proj"]
    return block_parts(
        block, [(a, a_bn), (b, b_bn), (c, c_bn)], [a_act, b_act, "activation"], projection=projection, others=others
    )


@family(REGNET, "SimpleStemIN", mixin=FusedBlock)
def first_parts(stem: Any) -> BlockParts:
    """A sequence of a convolution, a batch norm and an activation."""
    if tuple(stem._modules) != ("0", "1", "2"):
        raise NotFusable(f"expected 0, 1, 2, found {', '.join(stem._modules)}")
    return block_parts(stem, [("0", "1")], ["2"], shortcut="none")
