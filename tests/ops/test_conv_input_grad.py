"""fusedres.ops.conv_input_grad: against autograd of a convolution, with everything that is formed on load or joined."""

import pytest
import torch
from torch.nn.functional import conv2d

from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, Producer
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.bn_backward import bn_backward_reduce, masked_gradient
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_input_grad import at_producer, conv_input_grad, conv_producer_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close, naive_conv

# (N, C, H, W), (K, R, S), geometry
CASES = {
    "3x3": ((2, 5, 6, 6), (7, 3, 3), Geometry(padding=(1, 1))),
    "3x3 strided, odd size": ((2, 5, 9, 7), (6, 3, 3), Geometry((2, 2), (1, 1))),
    "3x3 strided, last row unread": ((2, 5, 8, 8), (6, 3, 3), Geometry((2, 2), (0, 0))),
    "3x3 dilated": ((2, 4, 9, 8), (6, 3, 3), Geometry((1, 1), (2, 2), (2, 2))),
    "3x3 grouped": ((2, 6, 5, 5), (9, 3, 3), Geometry(padding=(1, 1), groups=3)),
    "7x7 on three channels": ((2, 3, 16, 15), (8, 7, 7), Geometry((2, 2), (3, 3))),
    "1x1": ((3, 10, 4, 5), (13, 1, 1), Geometry()),
    "1x1 grouped": ((3, 10, 4, 5), (6, 1, 1), Geometry(groups=2)),
    "1x1 strided, odd size": ((2, 6, 7, 5), (9, 1, 1), Geometry((2, 2))),
    "1x1 strided, even size": ((2, 6, 8, 4), (9, 1, 1), Geometry((2, 2))),
    "nothing square": ((1, 4, 11, 8), (6, 5, 2), Geometry((3, 2), (2, 0), (1, 3))),
    "one pixel": ((1, 3, 1, 1), (4, 3, 3), Geometry(padding=(1, 1))),
}
FORMS = ("plain", "bits", "output", "coefficients", "frozen", "all")


def output_grad(size, dtype, form):
    """A gradient in one of its forms, and the plain one that it stands for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, y = torch.randn(2, *size, dtype=wide).to(dtype)
    z = torch.randn(size, dtype=wide).to(dtype).relu()
    p, q, r = torch.randn(3, size[1], dtype=wide)
    grad = OutputGrad(g)
    exact = g.double()
    if form in ("bits", "output", "frozen", "all"):
        grad = grad._replace(mask=z if form == "output" else pack_relu_mask(z))
        exact = exact * (z > 0)
    if form in ("coefficients", "frozen", "all"):
        grad = grad._replace(p=p)
        exact = exact * p.double()[:, None, None]
    if form in ("coefficients", "all"):
        grad = grad._replace(y=y, q=q, r=r)
        exact = exact + y.double() * q.double()[:, None, None] + r.double()[:, None, None]
    return grad, exact


def setting(case, dtype, form="plain"):
    size, (k, r, s), geometry = CASES[case]
    weight = torch.randn(k, size[1] // geometry.groups, r, s).to(dtype)
    out_size = (size[0], k, *geometry.output_size(*size[2:], (r, s)))
    grad, exact_grad = output_grad(out_size, dtype, form)
    u = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(naive_conv(u, weight.double(), *geometry), u, exact_grad)
    return weight, size, geometry, grad, exact_grad, exact


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_is_autograd_of_the_convolution(case, form, each_backend):
    weight, size, geometry, grad, _, exact = setting(case, torch.float64, form)
    assert_close(conv_input_grad(grad, weight, size, geometry), exact)


@pytest.mark.parametrize("mask", ["none", "bits", "output"])
@pytest.mark.parametrize("case", CASES)
def test_another_gradient_joins(case, mask, each_backend):
    weight, size, geometry, grad, _, exact = setting(case, torch.float64, "all")
    other = torch.randn(size, dtype=torch.float64)
    z = torch.randn(size, dtype=torch.float64).relu()
    add = OutputGrad(other, {"none": None, "bits": pack_relu_mask(z), "output": z}[mask])
    copies = other.clone(), grad.g.clone()
    du = conv_input_grad(grad, weight, size, geometry, add=add)
    assert_close(du, exact + (other if mask == "none" else other * (z > 0)))
    assert torch.equal(other, copies[0]), "the shortcut's gradient was written to"
    assert torch.equal(grad.g, copies[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_do_not_matter(layout, each_backend):
    for case in ("3x3", "1x1"):
        weight, size, geometry, grad, _, exact = setting(case, torch.float64)
        grad = OutputGrad(grad.g.contiguous(memory_format=layout))
        add = torch.randn(size, dtype=torch.float64)
        for other in (add, add.contiguous(memory_format=torch.channels_last)):
            du = conv_input_grad(grad, weight, size, geometry, add=OutputGrad(other))
            assert_close(du, exact + add)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("case", ["3x3", "3x3 strided, odd size", "3x3 grouped", "1x1", "1x1 strided, odd size"])
def test_rounds_no_more_than_eager(case, form, joined, dtype, each_backend):
    weight, size, geometry, grad, exact_grad, exact = setting(case, dtype, form)
    u = torch.zeros(size, dtype=dtype, requires_grad=True)
    (eager,) = torch.autograd.grad(conv2d(u, weight, None, *geometry), u, exact_grad.to(dtype))
    add = None
    if joined:
        other = torch.randn(size).to(dtype)
        eager, exact, add = eager + other, exact + other, OutputGrad(other)
    du = conv_input_grad(grad, weight, size, geometry, add=add)
    # fp32 sums differ in their order alone.
    assert_as_accurate_as_eager(du, eager, exact, floor=1e-6 if dtype == torch.float32 else None)


def test_wider_shortcut_gradient_keeps_its_dtype(each_backend):
    weight, size, geometry, grad, _, exact = setting("1x1", torch.bfloat16)
    other = torch.randn(size)
    du = conv_input_grad(grad, weight, size, geometry, add=OutputGrad(other))
    assert du.dtype == torch.float32
    assert_close(du, exact + other, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
def test_at_the_producer(dtype, each_backend):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, du = torch.randn(2, 3, 5, 7, 4, dtype=wide).to(dtype)
    mean, invstd, scale, shift = torch.rand(4, 5, dtype=wide)
    norm = Normaliser(mean, invstd, scale, shift)
    z = y.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    grad = at_producer(du, Producer(y, norm))
    exact = du.double() * (z > 0)
    assert torch.equal(grad.g.double(), exact)
    normalised = (y.double() - mean.double()[:, None, None]) * invstd.double()[:, None, None]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_close(grad.sums.sum_g, exact.sum((0, 2, 3)), tolerance)
    assert_close(grad.sums.sum_gy, (exact * normalised).sum((0, 2, 3)), tolerance)
    assert {vector.dtype for vector in grad.sums} == {wide}
    assert grad.g.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("bits", [False, True], ids=["output", "bits"])
def test_at_the_end_of_a_block(bits, dtype, each_backend):
    """The mask is of the sum, the sums are of the batch norm before it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, du, out = torch.randn(3, 3, 5, 7, 4, dtype=wide).to(dtype)
    out = out.relu()
    norm = Normaliser(*torch.rand(4, 5, dtype=wide))
    grad = at_producer(du, Producer(y, norm, out, pack_relu_mask(out) if bits else None))
    exact = du.double() * (out > 0)
    assert torch.equal(grad.g.double(), exact)
    sums = bn_backward_reduce.reference(
        OutputGrad(exact), y.double(), Normaliser(*(v.double() for v in norm.vectors.values()))
    )
    for name, ours, theirs in zip(sums._fields, grad.sums, sums, strict=True):
        assert_close(ours, theirs, 1e-13 if dtype == torch.float64 else 1e-6, name=name)


def test_at_the_producer_uses_the_rounded_output_as_its_mask(each_backend):
    """What the forward pass would have rounded to zero has no gradient."""
    y = torch.full((1, 1, 1, 1), 2.0**-20, dtype=torch.float16)
    one, tiny, zero = torch.ones(1), torch.full((1,), 2.0**-20), torch.zeros(1)
    grad = at_producer(torch.ones_like(y), Producer(y, Normaliser(zero, one, tiny, zero)))
    assert not masked_gradient(OutputGrad(grad.g)).any()


@pytest.mark.parametrize("case", CASES)
def test_to_the_producer_is_one_after_the_other(case, each_backend):
    weight, size, geometry, grad, _, exact = setting(case, torch.float64, "all")
    mean, invstd, scale, shift = torch.rand(4, size[1], dtype=torch.float64)
    producer = Producer(torch.randn(size, dtype=torch.float64), Normaliser(mean, invstd, scale, -shift))
    ours, apart = conv_producer_grad(grad, weight, geometry, producer), at_producer(exact, producer)
    assert_close(ours.g, apart.g)
    for name, mine, theirs in zip(apart.sums._fields, ours.sums, apart.sums, strict=True):
        assert_close(mine, theirs, name=name)


@pytest.mark.parametrize("case", CASES)
def test_to_the_end_of_a_block_behind_its_shortcut(case, each_backend):
    weight, size, geometry, grad, _, exact = setting(case, torch.float64, "all")
    y, out, other = torch.randn(3, *size, dtype=torch.float64)
    producer = Producer(y, Normaliser(*torch.rand(4, size[1], dtype=torch.float64)), out.relu(), pack_relu_mask(out))
    u, add = producer.output, OutputGrad(other)
    dw, ours = conv_producer_backward(grad, u, weight, geometry, producer, add=add)
    for found in (ours, conv_producer_grad(grad, weight, geometry, producer, add=add)):
        assert_close(found.g, torch.where(out > 0, exact + other, 0.0))
        assert_close(found.sums.sum_g, found.g.sum((0, 2, 3)))
        centred = y - producer.norm.mean[:, None, None]
        assert_close(found.sums.sum_gy, (found.g * centred).sum((0, 2, 3)) * producer.norm.invstd)
    assert_close(dw, conv_weight_grad(grad, ConvInput(out.relu()), weight.shape[2:], geometry))


def test_an_end_of_no_block_is_refused(each_backend):
    weight, dy, size = torch.zeros(6, 4, 1, 1), OutputGrad(torch.zeros(2, 6, 5, 5)), (2, 4, 5, 5)
    y, norm = torch.zeros(size), Normaliser(*torch.zeros(4, 4))
    for producer, words in (
        (Producer(y, norm, torch.zeros(2, 4, 5, 4)), r"producer.out: expected shape \(2, 4, 5, 5\)"),
        (Producer(y, norm, y.double()), "producer.out: expected .* in torch.float32, got .* in torch.float64"),
        (Producer(y, norm, None, pack_relu_mask(y)), "producer.mask: expected None without producer.out"),
    ):
        with pytest.raises(ValueError, match=words):
            conv_producer_grad(dy, weight, Geometry(), producer)


def test_refused_by_name(each_backend):
    weight, size = torch.zeros(6, 4, 1, 1), (2, 4, 5, 5)
    with pytest.raises(ValueError, match="dy: expected 6 channels, got 5"):
        conv_input_grad(OutputGrad(torch.zeros(2, 5, 5, 5)), weight, size, Geometry())
    with pytest.raises(ValueError, match="dy: expected a 4-D tensor"):
        conv_input_grad(OutputGrad(torch.zeros(6, 5, 5)), weight, size, Geometry())
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 6, 5, 5\), got \(2, 6, 5, 4\)"):
        conv_input_grad(OutputGrad(torch.zeros(2, 6, 5, 4)), weight, size, Geometry())
    with pytest.raises(ValueError, match="size: expected 4 channels"):
        conv_input_grad(OutputGrad(torch.zeros(2, 6, 5, 5)), weight, (2, 3, 5, 5), Geometry())
