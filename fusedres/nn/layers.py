"""The tensors and numbers of live convolutions and batch norms, as a call in their present mode uses them."""

from collections.abc import Sequence

from torch import Tensor, nn

from fusedres.activation import RELU, Activation
from fusedres.autograd import shortcut as shortcuts
from fusedres.nn.parts import NotFusable, Pair
from fusedres.nn.tracing import PLAIN_TENSORS
from fusedres.operands import Geometry, Layer, Norm, NormNumbers


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
    weight = _tensor("weight", conv)
    if weight is None:
        raise NotFusable("a convolution has no weight")
    return weight, _tensor("bias", conv)


def _tensor(name: str, module: nn.Module) -> Tensor | None:
    tensor = getattr(module, name, None)
    if tensor is not None and type(tensor) not in PLAIN_TENSORS:
        raise NotFusable(f"{name} of a {type(module).__name__} is a {type(tensor).__name__}, not a plain tensor")
    return None if tensor is None else tensor.resolve_neg()


def _geometry_of(conv: nn.Module) -> Geometry:
    assert isinstance(conv, nn.Conv2d)
    stride, padding, dilation = map(pair_of_sides, (conv.stride, conv.padding, conv.dilation))  # type: ignore[arg-type]
    return Geometry(stride, padding, dilation, conv.groups)


def norm_of(bn: nn.Module, conv_bias: Tensor | None = None) -> Norm:
    """The tensors and numbers of a live batch norm, as a call in its present mode uses them; none of an Identity.

    ``conv_bias`` is that of the convolution before it.
    """
    if type(bn) is nn.Identity:
        return Norm(bias=conv_bias, numbers=NormNumbers(batch_stats=False))
    assert isinstance(bn, nn.BatchNorm2d)
    gamma, beta, running_mean, running_var, counted = (_tensor(name, bn) for name in _OF_NORM)
    batch_stats = bn.training or running_mean is None
    # Only who measures a batch for the running statistics counts it.
    if not (bn.training and bn.track_running_stats):
        counted = None
    momentum = bn.momentum
    if momentum is None:  # a cumulative average: the k-th batch weighs 1 / k
        momentum = 0.0 if counted is None else 1.0 / (float(counted) + 1.0)
    if bn.training and not bn.track_running_stats:
        running_mean = running_var = None
    numbers = NormNumbers(bn.eps, momentum, batch_stats)
    return Norm(gamma, beta, running_mean, running_var, conv_bias, counted, numbers)


_OF_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def pair_of_sides(value: int | Sequence[int]) -> tuple[int, int]:
    """What PyTorch takes for both directions; set on a live module it may be a number or a list."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
