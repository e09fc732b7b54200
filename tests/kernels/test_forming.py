"""fusedres.kernels.forming, compiled and executed: what becomes TF32 is rounded to the nearest, both operands of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from fusedres.operands import ConvInput, Geometry, OutputGrad
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import conv_input_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from tests.kernels.convolutions import as_tf32
from tests.kernels.executed import TESTED, executed

SIZE, K, SAME = (1, 32, 12, 12), 32, Geometry(padding=(1, 1))


def operand(*size: int) -> Tensor:
    """Positive numbers: what is cut off of them adds up."""
    return (torch.rand(size) + 0.5).contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    return (
        lambda: conv_forward(ConvInput(x), weight, SAME, statistics=True)[0],
        lambda x, weight: conv2d(x, weight, None, *SAME),
    )


def formed(x: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    numbers = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    return (
        lambda: conv_forward(ConvInput(x, *numbers), weight, SAME, statistics=True)[0],
        lambda x, weight: conv2d(x, weight, None, *SAME),
    )


def input_grad(dy: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    return (
        lambda: conv_input_grad(OutputGrad(dy), weight, SIZE, SAME),
        lambda dy, weight: conv2d_input(SIZE, weight, dy, padding=1),
    )


def weight_grad(dy: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    return (
        lambda: conv_weight_grad(OutputGrad(dy), ConvInput(x), (3, 3), SAME),
        lambda dy, x: conv2d_weight(x, (K, SIZE[1], 3, 3), dy, padding=1),
    )


WEIGHT = (K, SIZE[1], 3, 3)
PRODUCTS = {
    "forward": (forward, SIZE, WEIGHT),
    "formed on load": (formed, SIZE, WEIGHT),
    "input gradient": (input_grad, SIZE, WEIGHT),
    "weight gradient": (weight_grad, SIZE, SIZE),
}


def check(ours: Tensor, theirs: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> None:
    """The mean error is that of rounded operands, far below that of operands cut off, which is half a unit of each."""
    exact = theirs(first.double(), second.double())
    rounded = theirs(as_tf32(first).double(), as_tf32(second).double())
    cut = theirs(*((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (first, second)))
    assert (rounded - exact).mean().abs() < 0.1 * (cut - exact).mean().abs()
    assert (ours.double() - exact).mean().abs() < 0.1 * (cut - exact).mean().abs()
    assert (ours.double() - exact).norm() <= 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("target", [name for name in TESTED if name.startswith("sm_")])
def test_tf32_is_the_nearest(target: str, product: str) -> None:
    make, *sizes = PRODUCTS[product]
    first, second = (operand(*size) for size in sizes)
    ours, theirs = make(first, second)
    check(executed(target, ours)[0], theirs, first, second)
