"""The tensors and numbers of live convolutions and batch norms, as a call in their present mode uses them."""

from collections.abc import Sequence

from torch import Tensor, nn

from fusedres.activation import RELU, Activation
from fusedres.autograd import shortcut as shortcuts
from fusedres.nn.norms import norm_of
from fusedres.nn.parts import Pair
from fusedres.nn.tensors import NotFusable, tensor_of
from fusedres.operands import Geometry, Layer


def layer_of(pair: Pair, act: Activation = RELU) -> Layer:
    """The tensors and numbers of a live convolution and batch norm, as a call in its present mode uses them; ``act`` is
    behind them where another layer follows."""
    weight, bias = convolution_tensors(pair.conv)
    return Layer(weight, _geometry_of(pair.conv), norm_of(pair.bn, bias), act=act)


def bare_layer_of(conv: nn.Module) -> Layer:
    """A live convolution without a batch norm."""
    weight, _ = convolution_tensors(conv)
    return Layer.bare(weight, _geometry_of(conv))


def shortcut_of(
    kind: str, projection: Layer | None, zero_pad_stride: tuple[int, int], pool: nn.Module | None = None
) -> shortcuts.Shortcut:
    """What joins a live block, as a call uses it."""
    if projection is not None:
        return shortcuts.Projection(projection, pool)
    kinds = {"identity": shortcuts.Identity(), "zero_pad": shortcuts.ZeroPad(zero_pad_stride)}
    return kinds.get(kind, shortcuts.NO_SHORTCUT)


def convolution_tensors(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the plain forward finds them: parameters, or what a wrapper computes in their place.

    Raises:
        NotFusable: one is missing, or of a class that computes in its own way.
    """
    weight = tensor_of("weight", conv)
    if weight is None:
        raise NotFusable("a convolution has no weight")
    return weight, tensor_of("bias", conv)


def _geometry_of(conv: nn.Module) -> Geometry:
    assert isinstance(conv, nn.Conv2d)
    stride, padding, dilation = map(pair_of_sides, (conv.stride, conv.padding, conv.dilation))  # type: ignore[arg-type]
    return Geometry(stride, padding, dilation, conv.groups)


def pair_of_sides(value: int | Sequence[int]) -> tuple[int, int]:
    """What PyTorch takes for both directions; set on a live module it may be a number or a list."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
