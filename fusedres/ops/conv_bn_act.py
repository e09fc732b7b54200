"""The single pass: convolve, normalise, add the shortcut, activate; the raw output never exists."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.operands import ConvInput, Geometry, Norm, Partials, statistics_dtype
from fusedres.ops import onednn
from fusedres.ops.act_mask import activated
from fusedres.ops.bn_act import affine, check_act, normalised_sum, output_dtype
from fusedres.ops.bn_finalize import bn_from_running, eps_of, running_arguments
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.checks import check_conv, check_vector
from fusedres.ops.contractions import ConvLaunch, bytes_in_windows, conv_launch, why_no_kernel
from fusedres.ops.conv_forward import conv_forward, conv_operand, wide_conv
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import (
    channels_last,
    empty_mask,
    empty_partials,
    empty_rows,
    per_channel,
    storable,
    word_channels,
)
from fusedres.ops.zero_pad_shortcut import (
    ZeroPadded,
    residual_arguments,
    residual_read,
    shortcut_input,
    shortcut_tensor,
)
from fusedres.plan.tiles import alignment
from fusedres.runtime.launch import launch


class BlockOutput(NamedTuple):
    """A block's output, its mask (`activated`) and its `Partials`, each of the latter if asked for."""

    z: Tensor
    mask: Tensor | None
    partials: Partials | None


class Contraction(NamedTuple):
    """A convolution and the numbers that normalise its output: conv(u, weight) * scale + shift.

    Without a scale nothing is multiplied, without a shift nothing added; ``running``, a batch norm in evaluation,
    stands in the place of both.
    """

    u: ConvInput
    weight: Tensor
    geometry: Geometry
    scale: Tensor | None = None
    shift: Tensor | None = None
    running: Norm | None = None

    @property
    def numbers(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift."""
        if self.running is None:
            return self.scale, self.shift
        norm = bn_from_running.reference(self.running, statistics_dtype(self.weight.dtype))
        return norm.scale, norm.shift


def _check(
    main: Contraction, *, residual: Tensor | ZeroPadded | None = None, second: Contraction | None = None,
    act: Activation = RELU, **others: object,
) -> None:  # fmt: skip
    check_act(act)
    sizes = []
    for branch in (main, second):
        if branch is not None:
            check_conv(branch.u, branch.weight, branch.geometry, name="u")
            if branch.scale is not None and branch.shift is None:
                raise ValueError("shift: expected one beside a scale, got None")
            if branch.running is not None and branch.shift is not None:
                raise ValueError("running: expected None beside a scale or a shift, got a batch norm")
            given = ("scale", branch.scale), ("shift", branch.shift)
            stored = () if branch.running is None else zip(Norm._fields, branch.running.vectors, strict=False)
            for name, vector in (*given, *stored):
                if vector is not None:
                    check_vector(name, vector, branch.weight.shape[0])
            n, _, h, w = branch.u.size
            p, q = branch.geometry.output_size(h, w, (branch.weight.shape[2], branch.weight.shape[3]))
            sizes.append((n, branch.weight.shape[0], p, q))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise ValueError(f"second: expected an output of shape {sizes[0]}, got {sizes[1]}")
    if residual is not None and tuple(residual.shape) != sizes[0]:
        raise ValueError(f"residual: expected shape {sizes[0]}, got {tuple(residual.shape)}")
    if residual is not None and second is not None:
        raise ValueError("second: expected None beside a residual, got a second contraction")


def _conv_bn_act(
    main: Contraction,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    second: Contraction | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
    statistics: bool = False,
) -> BlockOutput:
    """z = act(conv(u, W) * scale + shift + shortcut).

    The shortcut is nothing, ``residual`` as it is, residual * residual_scale + residual_shift (a projection that was
    written to memory), or ``second``, a convolution contracted into the same accumulator.

    Args:
        main: u (N, C, H, W) formed on load, W (K, C/groups, R, S), scale and shift (K,) or both None.
        residual: (N, K, P, Q), a `ZeroPadded` of that shape, or None.
        residual_scale, residual_shift: (K,) or both None.
        second: the projection's `Contraction` or None; not together with ``residual``.
        act: the activation.
        bit_mask: whether to return what a backward pass tells its slope from too.
        statistics: whether to measure z (as stored) for a batch norm that follows.

    Returns:
        z (N, K, P, Q), rounded once to the storage dtype; its mask or None; the statistics of z or None.
    """
    y = wide_conv(conv_operand(main.u), main.weight, main.geometry)
    dtype = output_dtype(main.weight, residual, residual_scale)
    if second is not None:
        residual = wide_conv(conv_operand(second.u), second.weight, second.geometry)
        residual_scale, residual_shift = second.numbers
    v = normalised_sum(y, *main.numbers, residual, residual_scale, residual_shift)
    z, mask = activated(v, act, dtype, bit_mask=bit_mask)
    return BlockOutput(z, mask, bn_statistics(z) if statistics else None)


conv_bn_act = Op(_conv_bn_act, check=_check)


@conv_bn_act.triton
def _conv_bn_act_triton(
    main: Contraction,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    second: Contraction | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
    statistics: bool = False,
) -> BlockOutput:
    if why_no_kernel(main.u, main.weight, main.geometry) is not None or not storable(shortcut_input(residual)):
        return NotImplemented
    if second is not None and not _joins(second):
        residual, _ = conv_forward(second.u, second.weight, second.geometry)
        (residual_scale, residual_shift), second = _launched_numbers(second), None
    from fusedres.kernels.conv_bn_act import conv_bn_act_kernel

    bit_mask = bit_mask and not act.is_identity
    epilogue_bytes = int(bit_mask) if residual is None else residual.dtype.itemsize
    conv = conv_launch(main.u, main.weight, main.geometry, second=second is not None, epilogue_bytes=epilogue_bytes)
    if (
        bit_mask
        and not act.needs_input
        and conv.shape.groups > 1
        and conv.tile.groups_per_tile * conv.shape.k % word_channels(conv.size[1])
    ):
        return NotImplemented
    z = empty_rows(main.u.tensor, output_dtype(main.weight, residual, residual_scale), conv.size)
    mask = empty_mask(z, act) if bit_mask else None
    projected, sizes, read, flops = _projection(second, conv)
    beside = {
        "scale_ptr": main.scale, "shift_ptr": main.shift, **running_arguments(main.running),
        "residual_scale_ptr": residual_scale, "residual_shift_ptr": residual_shift,
    }  # fmt: skip
    sizes = {**sizes, "eps": eps_of(main.running), "second_eps": eps_of(second and second.running)}
    reads = ("x_ptr", "w_ptr", "x_scale_ptr", "x_shift_ptr", "ones_ptr", "residual_ptr", *beside, *projected)
    partials = empty_partials(conv.tile.tiles(conv.shape), z.shape[1], z.device) if statistics else None
    counts, mean, m2 = partials or (None, None, None)
    outputs = {"z_ptr": z, "mask_ptr": mask, "count_ptr": counts, "mean_ptr": mean, "m2_ptr": m2}
    launch(
        conv_bn_act_kernel, (conv.blocks,),
        {
            **conv.arguments, **residual_arguments(residual, z.shape), **beside, **projected, **sizes, **outputs,
            "ACT": device_activation(act),
        },
        reads=reads, kind="convolution", writes=tuple(outputs),
        partial={"x_ptr": conv.read, "second_x_ptr": read, **residual_read(residual)},
        flops=conv.flops + flops + (2 + 2 * _normalises(main) + 4 * statistics) * z.numel(),
        steps=(conv.tile.steps(conv.shape), *([] if second is None else [conv.tile.depth_steps(sizes["second_C"])])),
        **conv.tile.options,
    )  # fmt: skip
    return BlockOutput(z, mask, partials)


def _normalises(branch: Contraction) -> bool:
    return branch.scale is not None or branch.running is not None


def _launched_numbers(branch: Contraction) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, by a launch where they have to be formed; both or neither."""
    if branch.running is None:
        if branch.scale is None and branch.shift is not None:
            return torch.ones_like(branch.shift), branch.shift
        return branch.scale, branch.shift
    norm = bn_from_running(branch.running)
    return norm.scale, norm.shift


def _joins(second: Contraction) -> bool:
    """Whether the kernel contracts this projection too: 1x1, any stride, as every network's is."""
    _, padding, _, groups = second.geometry
    return second.weight.shape[2:] == (1, 1) and padding == (0, 0) and groups == 1


def _projection(
    second: Contraction | None, conv: ConvLaunch
) -> tuple[dict[str, Tensor | None], dict[str, Any], int, int]:
    """Tensors and sizes of the second contraction, the bytes it reads of its input, its FLOPs."""
    names = (
        "second_x_ptr", "second_w_ptr", "second_x_scale_ptr", "second_x_shift_ptr", "second_scale_ptr",
        "second_shift_ptr",
    )  # fmt: skip
    running = running_arguments(second and second.running, "second_")
    if second is None:
        sizes = {"second_C": 1, "second_H": 1, "second_W": 1, "second_stride_h": 1, "second_stride_w": 1}
        return (
            {**dict.fromkeys(names), **running},
            {**sizes, "SECOND_SAME": True, "SECOND_EVEN_C": True, "SECOND_X_ACT": None, "SECOND_C_MULTIPLE": 1},
            0,
            0,
        )
    x = channels_last(second.u.tensor)
    _, c, h, w = x.shape
    values = (
        x, channels_last(second.weight), second.u.scale, second.u.shift, second.scale, second.shift,
    )  # fmt: skip
    stride = second.geometry.stride
    described = {
        "second_C": c, "second_H": h, "second_W": w, "second_stride_h": stride[0], "second_stride_w": stride[1],
        "SECOND_SAME": stride == (1, 1), "SECOND_EVEN_C": c % conv.tile.block_c == 0, "SECOND_C_MULTIPLE": alignment(c),
        "SECOND_X_ACT": device_activation(second.u.act, second.u.scale),
    }  # fmt: skip
    read = bytes_in_windows(x, conv.size[2:], (1, 1), second.geometry)
    tensors = {**dict(zip(names, values, strict=True)), **running}
    return tensors, described, read, 2 * conv.shape.pixels * second.weight.numel()


@conv_bn_act.native
def _conv_bn_act_native(
    main: Contraction,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    second: Contraction | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
    statistics: bool = False,
) -> BlockOutput:
    # Folding rounds the weight once more, which 16 bits would show.
    if not onednn.runs(main.weight) or (residual is not None and residual.dtype != main.weight.dtype):
        return NotImplemented
    residual = shortcut_tensor(residual)
    if residual is not None and residual_scale is not None and residual_shift is not None:
        residual = residual * per_channel(residual_scale) + per_channel(residual_shift)
    if second is not None:
        residual = _normalised(second)
    z = _normalised(main)
    if residual is not None:
        # Joined to the product, the addition costs 5 ms more (64 -> 256 channels, 8 x 56 x 56) than behind it.
        z.add_(residual)
    # oneDNN's own ReLU turns NaN into 0, which would hide that a network has diverged.
    z, mask = activated(z, act, z.dtype, bit_mask=bit_mask, scratch=True)
    return BlockOutput(z, mask, bn_statistics(z) if statistics else None)


# A weight is multiplied by its scale in every pass where the output has so many more values: there a pass over the
# weight costs less than one over the output. Measured on two cores, 1 to 32 images of ResNet-50's layers.
_FOLDS_FROM = 32


def _normalised(branch: Contraction) -> Tensor:
    """conv(u, weight) * scale + shift, in new memory."""
    scale, shift = branch.numbers
    u, weight = conv_operand(branch.u), branch.weight
    p, q = branch.geometry.output_size(u.shape[2], u.shape[3], (weight.shape[2], weight.shape[3]))
    if scale is None or u.shape[0] * weight.shape[0] * p * q >= _FOLDS_FROM * weight.numel():
        folded = weight if scale is None else weight * scale.view(-1, 1, 1, 1)
        return onednn.conv(u, folded, shift, branch.geometry)
    assert shift is not None
    return affine(onednn.conv(u, weight, None, branch.geometry), scale, shift)
