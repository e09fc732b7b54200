"""Residual blocks, and single layers, as one autograd node each: a chain of layers with a shortcut around it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedres.activation import RELU, Activation
from fusedres.autograd.shortcut import NO_SHORTCUT, Residual
from fusedres.nn.fused import FusedPass
from fusedres.nn.kinds import plain_type
from fusedres.nn.layers import layer_of, shortcut_of
from fusedres.nn.parts import Named, NotFusable, Pair, activation_of_part, pair_of, part
from fusedres.nn.plain import NoShortcut, ZeroPadShortcut
from fusedres.patterns.chain import run_chain
from fusedres.runtime.autocast import contraction_dtype


class BlockParts(NamedTuple):
    """A residual block, or a single layer, taken apart.

    ``shortcut`` is as in `run_chain`; ``act`` is behind the sum, ``inner`` between the layers; ``others`` are modules
    that the plain forward calls and the fused one does not; ``pool`` is what averages a projection's input, as in the
    ResNet-D of He et al. 2019.
    """

    chain: tuple[Pair, ...]
    projection: Pair | None
    shortcut: str
    act: Activation
    zero_pad_stride: tuple[int, int]
    others: tuple[Named, ...]
    pool: nn.Module | None = None
    inner: Activation = RELU

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The chain, and the projection last."""
        return self.chain if self.projection is None else (*self.chain, self.projection)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.pairs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(pair.bn for pair in self.pairs)


def block_parts(
    block: nn.Module,
    chain: Sequence[tuple[str, str]],
    acts: Sequence[str],
    *,
    projection: tuple[str, str] | None = None,
    shortcut: str = "identity",
    others: Sequence[str] = (),
) -> BlockParts:
    """Take apart a block by the names of its parts.

    Args:
        block: the live module.
        chain: of each convolution and its batch norm.
        acts: of the activations, the one behind the sum last; a single one is everywhere.
        projection: of the convolution and the batch norm of a projection.
        shortcut: ``"identity"`` or ``"none"``, without a projection.
        others: of containers, which call these.

    Raises:
        NotFusable: a part is missing, or an activation is of a kind that no fused pass knows.
    """
    named = [(name, part(block, name)) for name in acts]
    inner, end = activations_of(named)
    return BlockParts(
        tuple(pair_of(block, *names) for names in chain),
        None if projection is None else pair_of(block, *projection),
        shortcut if projection is None else "projection",
        end,
        (1, 1),
        (*named, *((name, part(block, name)) for name in others)),
        inner=inner,
    )


def activations_of(named: Sequence[Named]) -> tuple[Activation, Activation]:
    """The activation between the layers of a block, and the one behind the sum, which is named last.

    Raises:
        NotFusable: those between the layers differ, or one is of a kind that no fused pass knows.
    """
    acts = [activation_of_part(*each) for each in named]
    inner = acts[0]
    for (name, _), act in zip(named[:-1], acts, strict=False):
        if act != inner:
            raise NotFusable(
                f"{name} is another activation than {named[0][0]}, and one pass has the same between layers"
            )
    return inner, acts[-1]


def residual_parts(block: nn.Module, depth: int, acts: Sequence[str] = ("relu",)) -> BlockParts:
    """Take apart a block with torchvision's names: conv1, bn1, ..., downsample, and those of its activations.

    Raises:
        NotFusable: the shortcut is of a kind that no fused pass knows.
    """
    parts = block_parts(block, [(f"conv{i}", f"bn{i}") for i in range(1, depth + 1)], acts)
    shortcut = getattr(block, "downsample", None)
    others = (*parts.others, ("downsample", shortcut)) if isinstance(shortcut, nn.Module) else parts.others
    if shortcut is None:
        return parts
    if plain_type(shortcut) is nn.Sequential and (named := _projection(shortcut)):
        *before, (conv_name, conv), (bn_name, bn) = named
        projection = Pair(conv, bn, f"downsample.{conv_name}", f"downsample.{bn_name}")
        pool = before[0][1] if before else None
        return parts._replace(projection=projection, shortcut="projection", others=others, pool=pool)
    if type(shortcut) is ZeroPadShortcut:
        return parts._replace(shortcut="zero_pad", zero_pad_stride=(shortcut.stride, shortcut.stride), others=others)
    if type(shortcut) is NoShortcut:
        return parts._replace(shortcut="none")
    raise NotFusable(f"downsample is a {type(shortcut).__name__}, not a convolution and a batch norm")


def _projection(shortcut: nn.Sequential) -> list[Named]:
    """A convolution and a batch norm, perhaps behind average pooling, or nothing; what does nothing is left out, but
    in the place of a batch norm that was folded into the convolution."""
    every: list[tuple[str, Any]] = list(shortcut._modules.items())
    named = [(name, layer) for name, layer in every if type(layer) is not nn.Identity]
    if named and named[-1] != every[-1] and type(named[-1][1]) is nn.Conv2d:
        named.append(every[-1])
    pooled = len(named) == 3 and type(named[0][1]) is nn.AvgPool2d
    return named if len(named) == 2 or pooled else []


def conv_bn_act_parts(module: nn.Module) -> BlockParts:
    """Take apart a `plain.ConvBNAct`.

    Raises:
        NotFusable: with the reason.
    """
    return block_parts(module, [("conv", "bn")], ["act"], shortcut="none")


class FusedBlock(FusedPass):
    """A chain of layers with its shortcut as one autograd node."""

    adds_in_place = False
    """Whether the plain block adds its shortcut to what it is added to, so that autocast's dtype stays."""

    def fused_pass(self, x: Tensor, parts: BlockParts, **options: Any) -> Tensor:
        return self.run_chain(x, parts, **options)

    def run_chain(
        self,
        x: Tensor,
        parts: BlockParts,
        *,
        residual: Tensor | None = None,
        alone: bool = False,
        act: Activation | None = None,
        gain: float = 1.0,
        hands_over: bool = False,
    ) -> Tensor:
        """act(F(x) * gain + shortcut).

        Args:
            x: the input.
            parts: of the block.
            residual: joins F(x) in the place of the block's own shortcut.
            alone: nothing joins F(x).
            act: the block's own if not given.
            gain: multiplies the last batch norm's output.
            hands_over: as in `patterns.chain.run_chain`.
        """
        *inner, last = (layer_of(pair, parts.inner) for pair in parts.chain)
        if alone:
            shortcut = NO_SHORTCUT
        elif residual is not None:
            shortcut = Residual(residual)
        else:
            projection = None if parts.projection is None else layer_of(parts.projection)
            shortcut = shortcut_of(parts.shortcut, projection, parts.zero_pad_stride, parts.pool)
        z = run_chain(
            x,
            [*inner, last if gain == 1 else last._replace(gain=gain)],
            shortcut=shortcut,
            act=parts.act if act is None else act,
            schedule=self.fused_schedule,
            hands_over=hands_over,
        )
        return z.to(contraction_dtype(x)) if self.adds_in_place else z


class FusedResidual(FusedBlock):
    """A residual block, which hands over to the one behind it where `network.through` says so."""

    def forward(self, x: Tensor, *, hands_over: bool = False) -> Tensor:
        return self.fused_or_plain(x, hands_over=True) if hands_over else self.fused_or_plain(x)
