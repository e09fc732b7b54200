"""The launch of a 1x1 convolution whose tiles tensor descriptors move, where they can."""

from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Partials
from fusedres.ops.contractions import conv_shape, in_pairs
from fusedres.ops.device import device_activation
from fusedres.ops.rows import channels_last, empty_partials, empty_rows, pitch_of, row_layout
from fusedres.plan.pointwise_tiles import DESCRIBED, pointwise_tile
from fusedres.runtime.launch import launch, target_of


def conv_pointwise(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, statistics: bool, out: Tensor | None
) -> tuple[Tensor, Partials | None] | None:
    """As `conv_forward`; None where tiles of their own blocks serve the convolution better, or descriptors can not."""
    one_pixel = weight.shape[2:] == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)
    if not one_pixel or u.blocks is not None:
        return None
    shape, target = conv_shape(u, weight, geometry), target_of(u.tensor)
    tile = pointwise_tile(shape, target)
    if tile is None:
        return None
    x, weight = row_layout(u.tensor), channels_last(weight)
    n, _, h, w = x.shape
    y = empty_rows(x, size=(n, shape.k, h, w)) if out is None else out
    x_row, y_row = pitch_of(x) or shape.c, pitch_of(y) or shape.k
    rows = [elements * shape.itemsize for elements in (x_row, y_row, shape.c)]
    if any(length % DESCRIBED for length in (*rows, x.data_ptr(), weight.data_ptr(), y.data_ptr())):
        return None
    from fusedres.kernels.conv_pointwise import conv_pointwise_kernel

    partials = empty_partials(tile.parts, shape.k, y.device) if statistics else None
    counts, mean, m2 = partials or (None, None, None)
    launch(
        conv_pointwise_kernel, (tile.pieces(shape), tile.parts),
        {
            "x_ptr": x, "w_ptr": weight, "x_scale_ptr": u.scale, "x_shift_ptr": u.shift, "y_ptr": y,
            "count_ptr": counts, "mean_ptr": mean, "m2_ptr": m2, "pixels": shape.pixels, "C": shape.c, "K": shape.k,
            "x_row": x_row, "y_row": y_row, "X_ACT": device_activation(u.act, u.scale),
            "PAIRS": in_pairs(weight, target), "BLOCK_PIXELS": tile.block_pixels, "BLOCK_K": tile.block_k,
            "BLOCK_C": tile.block_c,
        },
        reads=("x_ptr", "w_ptr", "x_scale_ptr", "x_shift_ptr"), kind="convolution",
        writes=("y_ptr", "count_ptr", "mean_ptr", "m2_ptr"),
        flops=2 * shape.pixels * weight.numel() + 4 * y.numel() * statistics,
        steps=(tile.steps(shape),), **tile.options,
    )  # fmt: skip
    return y, partials
