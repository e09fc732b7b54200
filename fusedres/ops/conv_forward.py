"""A convolution whose input is normalised and activated on load and whose output is measured as it is written."""

from torch import Tensor
from torch.nn.functional import conv2d

from fusedres.operands import ConvInput, Geometry, Partials, statistics_dtype
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.checks import check_conv
from fusedres.ops.contractions import conv_launch, why_no_kernel
from fusedres.ops.op import Op
from fusedres.ops.pointwise_contractions import conv_pointwise
from fusedres.ops.rows import channels_last, empty_partials, empty_rows, pitch_of, row_layout
from fusedres.ops.space_to_depth import depth_to_space
from fusedres.runtime import backends
from fusedres.runtime.launch import launch


def conv_operand(u: ConvInput) -> Tensor:
    """The operand itself, unpacked, or act(tensor * scale + shift) rounded to the storage dtype.

    Padding is added after this, so it is zero and not act(shift).
    """
    if u.blocks is not None:
        return depth_to_space(u)
    if u.scale is None or u.shift is None:
        return u.tensor
    return bn_act(u.tensor, u.scale, u.shift, act=u.act)[0]


def wide_conv(convolution_input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of storage-dtype operands with its accumulator unrounded, in the statistics dtype."""
    dtype = statistics_dtype(weight.dtype)
    return channels_last(conv2d(convolution_input.to(dtype), weight.to(dtype), None, *geometry))


def _conv_forward(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, statistics: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Partials | None]:
    """y = conv(u, weight) and, if asked for, the statistics of y.

    Args:
        u: (N, C, H, W), formed on load if it has a scale; a slice of wider rows (`pitch_of`) is read where it is.
        weight: (K, C/groups, R, S) in the dtype of u.
        geometry: stride, padding (zeros, after the prologue), dilation, groups.
        statistics: whether to measure y (as stored) for batch norm.
        out: (N, K, P, Q) in the dtype of u that y is written to, such as a slice of wider rows; None: a new tensor.

    Returns:
        y (N, K, P, Q) raw, channels_last or ``out``, and its `Partials` or None.
    """
    y = stored(wide_conv(conv_operand(u), weight, geometry).to(weight.dtype), out)
    return y, bn_statistics(y) if statistics else None


def _check(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, statistics: bool = False, out: Tensor | None = None
) -> None:
    check_conv(u, weight, geometry, name="u")
    if out is None:
        return
    n, _, h, w = u.size
    expected = (n, weight.shape[0], *geometry.output_size(h, w, (weight.shape[2], weight.shape[3])))
    if tuple(out.shape) != expected or out.dtype != weight.dtype:
        raise ValueError(f"out: expected {expected} in {weight.dtype}, got {tuple(out.shape)} in {out.dtype}")


def stored(y: Tensor, out: Tensor | None) -> Tensor:
    """``y``, in ``out`` if that is given."""
    return y if out is None else out.copy_(y)


conv_forward = Op(_conv_forward, check=_check, weighed=True)


@conv_forward.triton
def _conv_forward_triton(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, statistics: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Partials | None]:
    # With nothing joined to it a convolution moves no fewer bytes than the library's.
    if backends.runs_native() and u.scale is None and u.blocks is None and not statistics:
        return NotImplemented
    if why_no_kernel(u, weight, geometry) is not None or (out is not None and row_layout(out) is not out):
        return NotImplemented
    given = conv_pointwise(u, weight, geometry, statistics=statistics, out=out)
    if given is not None:
        return given
    from fusedres.kernels.conv_forward import conv_forward_kernel

    y_row = None if out is None else pitch_of(out)
    conv = conv_launch(u, weight, geometry, y_row=y_row)
    y = empty_rows(u.tensor, size=conv.size) if out is None else out
    partials = empty_partials(conv.tile.tiles(conv.shape), y.shape[1], y.device) if statistics else None
    counts, mean, m2 = partials or (None, None, None)
    launch(
        conv_forward_kernel, (conv.blocks,),
        {**conv.arguments, "y_row": y_row, "y_ptr": y, "count_ptr": counts, "mean_ptr": mean, "m2_ptr": m2},
        reads=("x_ptr", "w_ptr", "x_scale_ptr", "x_shift_ptr", "ones_ptr"),
        kind="convolution", writes=("y_ptr", "count_ptr", "mean_ptr", "m2_ptr"),
        partial={"x_ptr": conv.read}, flops=conv.flops + 4 * y.numel() * statistics,
        steps=(conv.tile.steps(conv.shape),), **conv.tile.options,
    )  # fmt: skip
    return y, partials


@conv_forward.native
def _conv_forward_native(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, statistics: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Partials | None]:
    y = stored(channels_last(conv2d(conv_operand(u), weight, None, *geometry)), out)
    return y, bn_statistics(y) if statistics else None
