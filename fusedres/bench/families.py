"""Every kernel once on a device, small, held against fp64 to the error that eager PyTorch makes there.

What benchmarks time covers most of them (`bench.ops`, a bottleneck on the deepest rung); the others have cases here.
Kernels run whatever is predicted to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.bench.cases import Case, ModelCase, OpCase
from fusedres.bench.contenders import CONTENDERS
from fusedres.bench.declared import target_for
from fusedres.bench.gate import Gate
from fusedres.bench.ops import OPS
from fusedres.bench.setting import Device, Setting
from fusedres.compiler.targets import TARGETS
from fusedres.nn.plain import Bottleneck
from fusedres.operands import ConvInput, Geometry, Norm, Normaliser, Partials, statistics_dtype
from fusedres.ops.act_mask import act_backward, pack_relu_mask
from fusedres.ops.bn_finalize import bn_combine, bn_from_running
from fusedres.ops.bn_prelu import bn_prelu, bn_prelu_backward
from fusedres.ops.conv_forward import conv_forward
from fusedres.plan.pointwise_tiles import PointwiseTile, has_descriptors, pinned
from fusedres.runtime.launch import record

__all__ = ["KERNELS", "Checked", "checked"]

KERNELS = (
    "act_backward_kernel", "bn_act_kernel", "bn_backward_apply_kernel", "bn_backward_finish_kernel",
    "bn_backward_reduce_kernel", "bn_combine_kernel", "bn_finalize_kernel", "bn_prelu_apply_kernel", "bn_prelu_kernel",
    "bn_prelu_reduce_kernel", "bn_running_kernel", "bn_statistics_kernel", "conv_backward_kernel",
    "conv_bn_act_kernel", "conv_forward_kernel", "conv_input_grad_kernel", "conv_pointwise_kernel",
    "conv_weight_grad_kernel", "input_moments_finish_kernel", "input_moments_kernel", "moments_centre_kernel",
    "moments_finalize_kernel", "moments_matrices_kernel", "space_to_depth_kernel", "stem_pool_backward_kernel",
    "stem_pool_kernel", "sum_parts_kernel",
)  # fmt: skip
OF_DESCRIPTORS = "conv_pointwise_kernel"
BATCH, PX, CHANNELS, PARTS = 2, 12, 40, 37


@dataclass(frozen=True)
class Checked:
    """A case, the kernels that it launched, and what is wrong with it; None: nothing."""

    case: str
    kernels: frozenset[str]
    reason: str | None


def _drawn(*sizes: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    """Operands: channels_last activations in the dtype that is asked for, and vectors in fp32, above 0."""

    def operands(n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        found = []
        for size in sizes:
            if len(size) == 4:
                drawn = torch.randn(size, generator=generator)
                found.append(drawn.to(dtype).contiguous(memory_format=torch.channels_last))
            else:
                found.append(torch.rand(size, generator=generator) + 0.5)
        return tuple(found)

    return operands


def _masked(n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    g, z = _drawn(IMAGES, IMAGES)(n, px, dtype, generator)
    return g, pack_relu_mask(z.relu()), z.relu()


def _parts(n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Statistics of as many sets of 1 to 8 pixels."""
    counts, mean, m2 = _drawn((PARTS,), (PARTS, CHANNELS), (PARTS, CHANNELS))(n, px, dtype, generator)
    return (8 * (counts - 0.5)).ceil().clamp(min=1), mean, m2


def _prelu_backward(op: Any) -> Callable[..., Any]:
    def run(g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor) -> Any:
        norm = Normaliser(mean, invstd, gamma * invstd, -gamma * invstd * mean)
        return op(g, y, norm, slope, gamma, batch_stats=True)

    return run


def _from_running(op: Any) -> Callable[..., Any]:
    def run(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Any:
        return tuple(op(Norm(gamma, beta, mean, var), statistics_dtype(mean.dtype)))

    return run


def _combined(op: Any) -> Callable[..., Any]:
    return lambda counts, mean, m2: tuple(op(Partials(counts, mean, m2)))


def _stem(x: Tensor, weight: Tensor) -> Tensor:
    # Statistics are asked for, since a convolution alone is the library's.
    return conv_forward(ConvInput(x), weight, Geometry((2, 2), (3, 3)), statistics=True)[0]


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    with pinned(PointwiseTile(64, 64, 64, 4, 3, 2)):
        return conv_forward(ConvInput(x), weight, Geometry(), statistics=True)[0]


IMAGES, VECTOR = (BATCH, CHANNELS, PX, PX), (CHANNELS,)
_OWN = (
    OpCase("act_backward", _masked, lambda g, _, z: torch.ops.aten.threshold_backward(g, z, 0.0),
           lambda g, mask, _: act_backward(g, mask), PX, BATCH),
    OpCase("bn_prelu", _drawn(IMAGES, VECTOR, VECTOR, VECTOR), bn_prelu.reference, bn_prelu, PX, BATCH),
    OpCase("bn_prelu_backward", _drawn(IMAGES, IMAGES, *[VECTOR] * 4), _prelu_backward(bn_prelu_backward.reference),
           _prelu_backward(bn_prelu_backward), PX, BATCH),
    OpCase("bn_from_running", _drawn(*[VECTOR] * 4), _from_running(bn_from_running.reference),
           _from_running(bn_from_running), PX, BATCH),
    OpCase("bn_combine", _parts, _combined(bn_combine.reference), _combined(bn_combine), PX, BATCH),
    OpCase("stem_conv", _drawn((BATCH, 3, 20, 26), (16, 3, 7, 7)), lambda x, w: F.conv2d(x, w, None, 2, 3), _stem, 20,
           BATCH),
)  # fmt: skip
_POINTWISE = OpCase(
    "conv_pointwise", _drawn((BATCH, 64, 14, 14), (64, 64, 1, 1)), lambda x, w: F.conv2d(x, w), _pointwise, 14, BATCH
)
# With a projection, trained without its last convolutions' outputs.
_BLOCK = ModelCase("bottleneck", "block", lambda: Bottleneck(32, 16, stride=2), channels=32, px=8, batch=BATCH)


def _cases(target: str) -> Iterator[tuple[Case, str, str]]:
    """Case, mode, contender."""
    for name, case in OPS.items():
        if name.endswith(".stage1") or "." not in name:
            yield case, "op", "fused"
    for case in _OWN:
        yield case, "op", "fused"
    if has_descriptors(TARGETS[target]):
        yield _POINTWISE, "op", "fused"
    yield _BLOCK, "train", "fused-moments"


def checked(device: Device, dtype: str = "bf16") -> Iterator[Checked]:
    """Each case on a device, one after the other, and at last the kernels that none of them has launched.

    Args:
        device: a GPU, or one whose kernels are executed on the CPU.
        dtype: of `bench.setting.DTYPES`.
    """
    target = target_for(device)
    if device.is_gpu:
        device = replace(device, backend="triton")
    launched: set[str] = set()
    for case, mode, contender in _cases(target):
        setting = Setting(mode, dtype, BATCH, case.px if case in (_BLOCK, *_OWN, _POINTWISE) else PX, device)
        with record() as trace:
            try:
                with device.made_current(), setting.arithmetic():
                    reason = Gate(case, setting).judge(CONTENDERS[contender]).reason
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        kernels = frozenset(trace.by_kernel())
        launched |= kernels
        yield Checked(case.name, kernels, reason if reason or kernels else "it launched no kernel")
    missing = set(KERNELS) - launched
    if not has_descriptors(TARGETS[target]):
        missing.discard(OF_DESCRIPTORS)
    for name in sorted(missing):
        yield Checked(name, frozenset(), "no case launched it")
