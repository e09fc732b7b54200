"""The single pass: convolve, normalise, add the shortcut, rectify; the raw output never exists."""

from typing import NamedTuple

from torch import Tensor

from . import onednn
from .bn_act import check_act, normalised_sum, output_dtype
from .contract import ConvInput, Geometry, check_conv, check_vector, per_channel
from .conv_forward import accumulated, formed
from .op import Op
from .relu_mask import pack_relu_mask


class Contraction(NamedTuple):
    """A convolution and the numbers that normalise its output: conv(u, weight) * scale + shift."""

    u: ConvInput
    weight: Tensor
    geometry: Geometry
    scale: Tensor
    shift: Tensor


def _check(
    main: Contraction, residual: Tensor | None, second: Contraction | None, act: str | None
) -> tuple[int, int, int, int]:
    check_act(act)
    sizes = []
    for branch in (main, second):
        if branch is not None:
            check_conv(branch.u.tensor, branch.weight, branch.geometry, name="u")
            check_vector("scale", branch.scale, branch.weight.shape[0])
            check_vector("shift", branch.shift, branch.weight.shape[0])
            n, _, h, w = branch.u.tensor.shape
            p, q = branch.geometry.output_size(h, w, (branch.weight.shape[2], branch.weight.shape[3]))
            sizes.append((n, branch.weight.shape[0], p, q))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise ValueError(f"second: expected an output of shape {sizes[0]}, got {sizes[1]}")
    if residual is not None and tuple(residual.shape) != sizes[0]:
        raise ValueError(f"residual: expected shape {sizes[0]}, got {tuple(residual.shape)}")
    if residual is not None and second is not None:
        raise ValueError("second: expected None beside a residual, got a second contraction")
    return sizes[0]


def _conv_bn_act(
    main: Contraction,
    *,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    second: Contraction | None = None,
    act: str | None = "relu",
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """z = act(conv(u, W) * scale + shift + shortcut).

    The shortcut is nothing, ``residual`` as it is, residual * residual_scale + residual_shift (a projection that was
    written to memory), or ``second``, a convolution contracted into the same accumulator.

    Args:
        main: u (N, C, H, W) formed on load, W (K, C/groups, R, S), scale and shift (K,).
        residual: (N, K, P, Q) or None.
        residual_scale, residual_shift: (K,) or both None.
        second: the projection's `Contraction` or None; not together with ``residual``.
        act: ``"relu"`` or None.
        bit_mask: whether to return the ReLU's open positions too.

    Returns:
        z (N, K, P, Q), rounded once to the storage dtype, and the bit mask (`pack_relu_mask`) or None.
    """
    _check(main, residual, second, act)
    y = accumulated(formed(main.u), main.weight, main.geometry)
    dtype = output_dtype(main.weight, residual, residual_scale)
    if second is not None:
        residual = accumulated(formed(second.u), second.weight, second.geometry)
        residual_scale, residual_shift = second.scale, second.shift
    z = normalised_sum(y, main.scale, main.shift, residual, residual_scale, residual_shift, act).to(dtype)
    return z, pack_relu_mask(z) if bit_mask else None


conv_bn_act = Op(_conv_bn_act)


@conv_bn_act.native
def _conv_bn_act_native(
    main: Contraction,
    *,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    second: Contraction | None = None,
    act: str | None = "relu",
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    # Folding rounds the weight once more, which 16 bits would show.
    if not onednn.runs(main.weight) or (residual is not None and residual.dtype != main.weight.dtype):
        return NotImplemented
    _check(main, residual, second, act)
    if residual is not None and residual_scale is not None and residual_shift is not None:
        residual = residual * per_channel(residual_scale) + per_channel(residual_shift)
    if second is not None:
        residual = onednn.conv_act(formed(second.u), _folded(second))
    z = onednn.conv_act(formed(main.u), _folded(main), residual, act)
    return z, pack_relu_mask(z) if bit_mask else None


def _folded(branch: Contraction) -> onednn.PackedConv:
    return onednn.PackedConv(onednn.fold(branch.weight, branch.scale), branch.shift, branch.geometry)
