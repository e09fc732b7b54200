"""Fused passes for people who write their own blocks."""

import torch
from torch import Tensor

from fusedres.activation import Activation, activation_named
from fusedres.autograd import AddAct
from fusedres.autograd.ends import AddActSpec
from fusedres.autograd.shortcut import NO_SHORTCUT, Residual
from fusedres.operands import Geometry, Layer, Norm, NormNumbers
from fusedres.ops.bn_finalize import check_norm
from fusedres.ops.checks import check_activation
from fusedres.ops.rows import pixels
from fusedres.patterns.bn_act import run_bn_act, run_bn_prelu
from fusedres.patterns.chain import run_chain
from fusedres.patterns.choose import AUTO, check_schedule
from fusedres.patterns.door import check_norm_numbers
from fusedres.runtime.call import Call
from fusedres.runtime.graphs import one_call, signed

IntPair = int | tuple[int, int]


def _pair(name: str, value: IntPair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple) and len(value) == 2:
        return value
    raise ValueError(f"{name}: expected an int or a pair of ints, got {value!r}")


def _check_norm_tensors(tensors: Norm, channels: int, training: bool, device: torch.device, of: str = "") -> bool:
    """Whether batch statistics normalise; refuses what `check_norm` does."""
    check_norm(channels, tensors, device=device, of=of)
    return training or tensors.running_mean is None


@one_call
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    schedule: str = AUTO,
) -> Tensor:
    """act(batch_norm(conv2d(x, weight, bias)) + residual), with one backward pass for all of it.

    Args:
        x: (N, C, H, W), fp64, fp32, bf16 or fp16; channels_last is fastest.
        weight: (K, C/groups, R, S); under autocast of any dtype, else of the dtype of x.
        gamma, beta: (K,) or None (1 and 0).
        running_mean, running_var: (K,), updated in place in training as `torch.nn.functional.batch_norm` does; both
            None to use batch statistics always.
        training: normalise with this batch's statistics.
        bias: (K,) or None.
        residual: (N, K, P, Q), added before the activation, or None.
        stride, padding, dilation: pixels, an int or (vertical, horizontal).
        groups: channel groups.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        act: the name of an activation (`fusedres.activation.NAMED`), or None.
        schedule: ``"auto"`` or a rung: ``"block_end"``, ``"stats"``, ``"prologue"``, ``"moments"``.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument; no running statistic has changed then.
    """
    check_schedule(schedule)
    norm = Norm(gamma, beta, running_mean, running_var, bias)
    batch_stats = _check_norm_tensors(norm, weight.shape[0], training, x.device)
    geometry = Geometry(_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups)
    layer = Layer(weight, geometry, norm._replace(numbers=NormNumbers(eps, momentum, batch_stats)))
    shortcut = NO_SHORTCUT if residual is None else Residual(residual)
    return run_chain(x, [layer], shortcut=shortcut, act=activation_named(act), schedule=schedule)


@one_call
def bn_add_act(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    *,
    training: bool,
    residual_norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
) -> Tensor:
    """act(batch_norm(y) + residual), or act(batch_norm(y) + batch_norm'(residual)): a block's end in one pass.

    Args:
        y: (N, K, P, Q) raw convolution output.
        gamma, beta, running_mean, running_var: as in `conv_bn_act`.
        residual: (N, K, P, Q) or None.
        training: normalise with this batch's statistics.
        residual_norm: (gamma, beta, running_mean, running_var) of the residual's own batch norm when the residual is
            a raw projection, else None.
        momentum, eps: of both batch norms.
        act: the name of an activation (`fusedres.activation.NAMED`), or None.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument; no running statistic has changed then.
    """
    check_activation("y", y)
    activation = activation_named(act)
    if residual is not None:
        check_activation("residual", residual, device=y.device)
        if residual.shape != y.shape:
            raise ValueError(f"residual: expected the shape of y, {tuple(y.shape)}, got {tuple(residual.shape)}")
    if residual is None and residual_norm is not None:
        raise ValueError("residual_norm: expected None without a residual")
    channels = y.shape[1]
    main = Norm(gamma, beta, running_mean, running_var)
    numbers = NormNumbers(eps, momentum, _check_norm_tensors(main, channels, training, y.device))
    other = None
    if residual_norm is not None:
        if len(residual_norm) != 4:
            raise ValueError(f"residual_norm: expected 4 vectors or None each, got {len(residual_norm)}")
        other = Norm(*residual_norm)
        batch_stats = _check_norm_tensors(other, channels, training, y.device, " of residual_norm")
        other = other._replace(numbers=NormNumbers(eps, momentum, batch_stats))
    check_norm_numbers("y", numbers, pixels(y))
    return run_bn_act(y, main._replace(numbers=numbers), activation, residual=residual, residual_norm=other)


@one_call
def bn_prelu(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    slope: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """prelu(batch_norm(x)) with slopes that are trained: nothing but x is kept for the backward pass.

    Args:
        x: (N, K, P, Q) raw convolution output.
        gamma, beta, running_mean, running_var: as in `conv_bn_act`.
        slope: (K,), or (1,) for all channels; of the dtype of x, or under autocast of any.
        training: normalise with this batch's statistics.
        momentum, eps: of the batch norm.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument; no running statistic has changed then.
    """
    check_activation("x", x)
    norm = Norm(gamma, beta, running_mean, running_var)
    batch_stats = _check_norm_tensors(norm, x.shape[1], training, x.device)
    return run_bn_prelu(x, norm._replace(numbers=NormNumbers(eps, momentum, batch_stats)), slope)


@one_call
def add_act(x: Tensor, residual: Tensor, *, act: str | Activation | None = "relu") -> Tensor:
    """act(x + residual) in one pass; the backward pass keeps one bit per value.

    Args:
        x: (N, C, H, W), fp64, fp32, bf16 or fp16; channels_last is fastest.
        residual: (N, C, H, W).
        act: the name of an activation (`fusedres.activation.NAMED`), or None.

    Returns:
        (N, C, H, W), channels_last, in the wider dtype of the two.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_activation("x", x)
    check_activation("residual", residual, device=x.device)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    spec = AddActSpec(Call.on(x, (residual,)), activation_named(act))
    z: Tensor = AddAct.apply(signed(x), signed(residual), spec)
    return z
