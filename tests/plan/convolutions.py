"""Convolutions on the meta device, each one launch of a kernel for convolutions, whose binary is compiled then."""

import torch
from torch import Tensor

from fusedres.activation import IDENTITY, RELU
from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, Producer
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_weight_grad import summed_weight_grad
from fusedres.ops.features import FeatureGrads
from fusedres.ops.input_gradients import InputMatrices, launch_input_grad

Size = tuple[int, int, int, int]
BF16, FP32 = torch.bfloat16, torch.float32


def on_meta(*size: int, dtype: torch.dtype = FP32) -> Tensor:
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def input_of(size: Size, dtype: torch.dtype, *, formed: bool = True) -> ConvInput:
    x = on_meta(*size, dtype=dtype)
    return ConvInput(x, on_meta(size[1]), on_meta(size[1])) if formed else ConvInput(x)


def bits(size: Size) -> Tensor:
    return pack_relu_mask(on_meta(*size))


def gradient_of(size: Size, dtype: torch.dtype, *, formed: bool = True, mask: bool = False) -> OutputGrad:
    vectors = [on_meta(size[1]) for _ in range(4)]
    g, open_ = on_meta(*size, dtype=dtype), bits(size) if mask else None
    return OutputGrad(g, open_, on_meta(*size, dtype=dtype), *vectors) if formed else OutputGrad(g, open_)


def producer_of(size: Size, dtype: torch.dtype) -> Producer:
    return Producer(on_meta(*size, dtype=dtype), Normaliser(*(on_meta(size[1]) for _ in range(4))))


def around(window: int, stride: int = 1, groups: int = 1) -> Geometry:
    return Geometry((stride, stride), (window // 2, window // 2), groups=groups)


def forward(size: Size, k: int, window: int = 1, dtype: torch.dtype = BF16, *, formed: bool = False, stride: int = 1,
            groups: int = 1) -> None:  # fmt: skip
    weight = on_meta(k, size[1] // groups, window, window, dtype=dtype)
    conv_forward(input_of(size, dtype, formed=formed), weight, around(window, stride, groups), statistics=True)


def block_end(size: Size, k: int, window: int = 1, dtype: torch.dtype = BF16, *, formed: bool = True,
              residual: torch.dtype | None = None, mask: bool = False, act: bool = True) -> None:  # fmt: skip
    weight, vector = on_meta(k, size[1], window, window, dtype=dtype), on_meta(k)
    main = Contraction(input_of(size, dtype, formed=formed), weight, around(window), vector, vector)
    shortcut = None if residual is None else on_meta(size[0], k, *size[2:], dtype=residual)
    conv_bn_act(main, residual=shortcut, act=RELU if act else IDENTITY, bit_mask=mask, statistics=not act)


def two_contractions(size: Size, k: int, window: int = 1, dtype: torch.dtype = BF16, *, formed: bool = True,
                     second_formed: bool = False, mask: bool = False) -> None:  # fmt: skip
    vector = on_meta(k)
    weight = on_meta(k, size[1], window, window, dtype=dtype)
    main = Contraction(input_of(size, dtype, formed=formed), weight, around(window), vector, vector)
    second = Contraction(
        input_of(size, dtype, formed=second_formed), on_meta(k, size[1], 1, 1, dtype=dtype), Geometry(), vector, vector
    )
    conv_bn_act(main, second=second, act=RELU if mask else IDENTITY, bit_mask=mask, statistics=not mask)


def input_gradient(size: Size, k: int, window: int = 1, dtype: torch.dtype = BF16, *, formed: bool = True,
                   mask: bool = False, producer: bool = False, features: bool = False, add: bool = False,
                   matrices: bool = False, stride: int = 1, groups: int = 1) -> None:  # fmt: skip
    n, c, h, w = size
    weight = on_meta(k, c // groups, window, window, dtype=dtype)
    dy = gradient_of((n, k, h // stride, w // stride), dtype, formed=formed, mask=mask)
    # Features lie in the first channels of a wider buffer.
    x = on_meta(n, 2 * c, h, w, dtype=dtype)[:, :c] if features else on_meta(*size, dtype=dtype)
    norm = Normaliser(*(on_meta(c) for _ in range(4)))
    launch_input_grad(
        dy, weight, size, around(window, stride, groups), add=OutputGrad(x) if add else None,
        producer=Producer(x, norm) if producer or features else None, features=FeatureGrads(x, x) if features else None,
        x=input_of(size, dtype) if matrices else None,
        matrices=InputMatrices(on_meta(c, 1, c, dtype=dtype), on_meta(1, c)) if matrices else None,
    )  # fmt: skip


def weight_gradient(size: Size, k: int, window: int = 1, dtype: torch.dtype = BF16, *, formed: bool = True,
                    mask: bool = False, input_formed: bool = True, stride: int = 1, sum_dy: bool = False,
                    sum_u: bool = False) -> None:  # fmt: skip
    n, _, h, w = size
    dy = gradient_of((n, k, h // stride, w // stride), dtype, formed=formed, mask=mask)
    u = input_of(size, dtype, formed=input_formed)
    summed_weight_grad(dy, u, (window, window), around(window, stride), sum_dy=sum_dy, sum_u=sum_u)
