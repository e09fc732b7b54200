"""fusedres.ops.centred_product: against the sum over windows written out."""

import pytest
import torch
from torch.nn.functional import unfold

import fusedres
from fusedres.ops.centred_product import centred_product
from fusedres.ops.contract import ConvInput, Geometry
from tests.comparison import relative_error
from tests.vgpu_support import needs_vgpu

CASES = [
    pytest.param((3, 4, 9, 7), 5, (3, 3), Geometry((2, 1), (1, 0)), id="stride and padding of their own"),
    pytest.param((2, 3, 11, 10), 8, (7, 7), Geometry((2, 2), (3, 3)), id="a stem"),
    pytest.param((2, 6, 5, 5), 3, (1, 1), Geometry(), id="1x1"),
]


def written_out(y, u, kernel, geometry):
    """E (K, C R S) and the windows' mean, in fp64."""
    windows = (
        unfold(u.double(), kernel, geometry.dilation, geometry.padding, geometry.stride).transpose(0, 1).flatten(1)
    )
    rows = y.double().transpose(0, 1).flatten(1)
    return (rows - rows.mean(1, keepdim=True)) @ windows.t(), windows.mean(1)


def operands(size, k, kernel, geometry, dtype, offset=0.0):
    generator = torch.Generator().manual_seed(4)
    u = torch.randn(size, generator=generator).to(dtype)
    p, q = geometry.output_size(size[2], size[3], kernel)
    y = (torch.randn(size[0], k, p, q, generator=generator) + offset).to(dtype)
    return (tensor.contiguous(memory_format=torch.channels_last) for tensor in (y, u))


@pytest.mark.parametrize(("size", "k", "kernel", "geometry"), CASES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("vgpu:sm_90", marks=needs_vgpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_windows(size, k, kernel, geometry, backend, dtype):
    y, u = operands(size, k, kernel, geometry, dtype)
    with fusedres.backend(backend):
        found = centred_product(y, ConvInput(u), kernel, geometry)
    product, mean = written_out(y, u, kernel, geometry)
    assert found.product.dtype == found.mean.dtype == torch.float32
    assert relative_error(found.product, product) < 1e-5
    assert relative_error(found.mean, mean) < 1e-5


@needs_vgpu
@pytest.mark.parametrize("backend", ["reference", "vgpu:sm_80"])
def test_a_large_mean_of_the_output_does_not_drown_it(backend):
    """Sums in fp32 keep what is left of outputs 300 deviations off zero, to a thousandth and better."""
    kernel, geometry = (3, 3), Geometry((1, 1), (1, 1))
    y, u = operands((4, 4, 12, 12), 8, kernel, geometry, torch.float32, offset=300.0)
    with fusedres.backend(backend):
        found = centred_product(y, ConvInput(u), kernel, geometry)
    product, _ = written_out(y, u, kernel, geometry)
    assert relative_error(found.product, product) < 5e-4


def test_a_dry_run_reads_the_output_once():
    y = torch.empty(8, 64, 112, 112, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    u = torch.empty(8, 3, 224, 224, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with fusedres.record() as trace:
        found = centred_product(y, ConvInput(u), (7, 7), Geometry((2, 2), (3, 3)))
    assert [tuple(part.shape) for part in found] == [(64, 147), (147,)]
    (launch,) = (entry for entry in trace.launches if entry.name == "conv_weight_grad_kernel")
    assert launch.read == {"g_ptr": y.nbytes, "x_ptr": u.nbytes}
