"""The first layers of a network as one autograd node: convolution, batch norm, ReLU, max-pooling."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fusedres.nn.fused import Fused
from fusedres.nn.in_graph import Path, in_graph
from fusedres.nn.kinds import plain_type
from fusedres.nn.layers import layer_of, pair_of_sides
from fusedres.nn.network import network_pass, through
from fusedres.nn.parts import Named, NotFusable, Pair, part, relu_part
from fusedres.nn.patched import why_patched
from fusedres.nn.tracing import is_traced
from fusedres.operands import PoolGeometry
from fusedres.patterns.chain import run_chain
from fusedres.patterns.stem import run_stem


class StemParts(NamedTuple):
    """The first layers of a network taken apart: convolution, batch norm, ReLU, and max-pooling if there is one.

    ``before`` are the layers before that convolution, each with a ReLU, in a deep stem.
    """

    pair: Pair
    pool: PoolGeometry | None
    others: tuple[Named, ...]
    before: tuple[Pair, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """In the order in which they run."""
        return (*self.before, self.pair)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.pairs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(pair.bn for pair in self.pairs)


NAMES = ("conv1", "bn1", "relu", "maxpool")
"""torchvision's names of the parts of a stem."""


def stem_parts(model: nn.Module, names: tuple[str, str, str, str] = NAMES) -> StemParts:
    """Take apart a stem by the names of its parts; the last, the pooling, may be missing.

    Raises:
        NotFusable: there is no batch norm, or a part is of a kind that no fused pass knows.
    """
    first, bn, relu, maxpool = names
    if getattr(model, bn, None) is None:
        raise NotFusable(f"{first} has no batch norm behind it")
    conv, norm = part(model, first), part(model, bn)
    pair, before, others = Pair(conv, norm, first, bn), [], []
    if isinstance(conv, nn.Sequential) and plain_type(conv) is nn.Sequential and len(conv) % 3 == 1:
        *inner, (last, module) = conv._modules.items()
        for i in range(0, len(inner), 3):
            (conv_name, layer), (bn_name, layer_norm), (relu_name, _) = cast(Any, inner[i : i + 3])
            before.append(Pair(layer, layer_norm, f"{first}.{conv_name}", f"{first}.{bn_name}"))
            others.append(relu_part(model, f"{first}.{relu_name}"))
        pair = Pair(module, norm, f"{first}.{last}", bn)
        others.append((first, conv))
    others.append(relu_part(model, relu))
    pool = getattr(model, maxpool, None)
    if pool is not None:
        others.append((maxpool, part(model, maxpool)))
    geometry = None if pool is None or type(pool) is nn.Identity else pool_geometry(maxpool, pool)
    return StemParts(pair, geometry, tuple(others), tuple(before))


def pool_geometry(name: str, pool: nn.Module) -> PoolGeometry:
    """The window of a max-pooling.

    Raises:
        NotFusable: it is of a kind that no fused pass knows.
    """
    if type(pool) is not nn.MaxPool2d:
        raise NotFusable(f"{name} is a {type(pool).__name__}, not a plain MaxPool2d")
    sides = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    kernel, stride, padding, dilation = map(pair_of_sides, sides)
    if dilation != (1, 1) or pool.ceil_mode or pool.return_indices:
        raise NotFusable(f"{name} is dilated, rounds up or returns indices")
    return PoolGeometry(kernel, stride, padding)


def run_stem_parts(x: Tensor, parts: StemParts, schedule: str) -> Tensor:
    """maxpool(relu(bn(conv(x)))), behind the layers of a deep stem if there are any."""
    if parts.before:
        x = run_chain(x, [layer_of(pair) for pair in parts.before], schedule=schedule)
    layer = layer_of(parts.pair)
    if parts.pool is None:
        return run_chain(x, [layer], schedule=schedule)
    return run_stem(x, layer, parts.pool, schedule=schedule)


class FusedStem(Fused):
    """A network whose first layers run as one autograd node, and whose stages are what their blocks are."""

    fused_parts = staticmethod(stem_parts)

    fused_stem = NAMES
    """The names of the first layers, of which some may be missing."""

    fused_stages = ("layer1", "layer2", "layer3", "layer4")
    """The names of its stages."""

    def fused_paths(self) -> tuple[Path, ...]:
        return tuple((name,) for name in self.fused_stem if isinstance(getattr(self, name, None), nn.Module))

    def fused_pass(self, x: Tensor, parts: StemParts) -> Tensor:
        return run_stem_parts(x, parts, self.fused_schedule)

    def stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x))))."""
        if torch.compiler.is_dynamo_compiling():
            z: Tensor = in_graph(self, "stem", self._plain_stem, x)
            return z
        return self.fused_or(self._plain_stem, x)

    def _plain_stem(self, x: Tensor) -> Tensor:
        for name in self.fused_stem:
            module = getattr(self, name, None)
            x = x if module is None else module(x)
        return x

    def runs_library_code(self, x: Any) -> bool:
        """Whether the library's own code is to run: somebody reads it, or has replaced it."""
        if torch.compiler.is_dynamo_compiling():
            return self.fused_told() is None
        return is_traced(x) or why_patched(self.fused_watches) is not None

    def stem_and_stages(self, x: Tensor) -> Tensor:
        """What the last stage gives."""
        if torch.compiler.is_dynamo_compiling():
            x = self.stem(x)
            for name in self.fused_stages:
                x = getattr(self, name)(x)
            return x
        with network_pass(self, x):
            x = self.stem(x)
            for name in self.fused_stages:
                x = through(getattr(self, name), x)
        return x
