"""How the tests compare numbers: against an exact result, and against the error that eager PyTorch makes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedres.runtime.backends import backend

LOW = (torch.bfloat16, torch.float16)
STORAGE = (torch.float32, *LOW)


def relative_error(actual: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Norm of the difference over the norm of ``exact`` (or over ``scale``), in fp64; absolute where that is 0."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    exact = exact.detach().double()
    norm = float(exact.norm()) if scale is None else scale
    if not norm > 0:
        norm = 1.0
    return float((actual.detach().double() - exact).norm()) / norm


def assert_close(
    actual: Tensor, exact: Tensor, tolerance: float = 1e-12, *, scale: float | None = None, name: str = "tensor"
) -> None:
    """Relative in norm; NaN never passes."""
    error = relative_error(actual, exact, scale)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_as_accurate_as_eager(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    factor: float = 1.5,
    floor: float | None = None,
    *,
    name: str = "tensor",
) -> None:
    """At most ``factor`` times eager's own error against ``exact``, or ``floor``, both relative in norm.

    The floor keeps an eager error of almost zero from failing us. It defaults to half a unit in the last place in 16
    bits, where storage rounds, and to four units in fp32 and fp64, where sums of different order do.
    """
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager gives {eager.dtype}"
    allowed = torch.finfo(actual.dtype).eps * (0.5 if actual.dtype in LOW else 4) if floor is None else floor
    theirs = relative_error(eager, exact)
    ours = relative_error(actual, exact)
    assert ours <= max(factor * theirs, allowed), (
        f"{name}: relative error {ours:.2e}, eager's is {theirs:.2e}, allowed max({factor} x eager's, {allowed:.0e})"
    )


def naive_conv(
    u: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The definition of a convolution, one einsum per tap."""
    k, c, kernel_h, kernel_w = weight.shape
    n, _, h, w = u.shape
    padded = u.new_zeros(n, u.shape[1], h + 2 * padding[0], w + 2 * padding[1])
    padded[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w] = u
    p = (padded.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    q = (padded.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    y = u.new_zeros(n, groups, k // groups, p, q)
    for r in range(kernel_h):
        for s in range(kernel_w):
            rows = slice(r * dilation[0], r * dilation[0] + (p - 1) * stride[0] + 1, stride[0])
            columns = slice(s * dilation[1], s * dilation[1] + (q - 1) * stride[1] + 1, stride[1])
            tap = padded[:, :, rows, columns].unflatten(1, (groups, c))
            y = y + torch.einsum("ngcpq,gkc->ngkpq", tap, weight[:, :, r, s].unflatten(0, (groups, -1)))
    return y.flatten(1, 2)


def seeded() -> Iterator[None]:
    """Body of an autouse fixture: every test draws the same numbers, in whichever order tests run."""
    torch.manual_seed(0)
    yield


@pytest.fixture(params=["native", "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend that needs neither a GPU nor a compiler, inside it."""
    with backend(request.param):
        yield request.param
