"""fusedres.patterns.chain: what is checked at the door, and the dtype of the contractions."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, ZeroPad
from fusedres.operands import Geometry, Layer, Norm, NormNumbers, PoolGeometry
from fusedres.patterns.chain import run_chain
from fusedres.patterns.choose import AUTO
from fusedres.patterns.door import check_norm_numbers
from fusedres.patterns.stem import run_stem
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.autocast import contraction_dtype
from tests.comparison import relative_error
from tests.nn.twins import tensor


def layer(
    k: int, c: int, r: int = 1, *, geometry: Geometry | None = None, training: bool = True, seed: int = 0
) -> Layer:
    norm = Norm(
        tensor(k, seed=seed + 1),
        tensor(k, seed=seed + 2),
        tensor(k, seed=seed + 3),
        tensor(k, seed=seed + 4).square() + 0.5,
        numbers=NormNumbers(batch_stats=training),
    )
    return Layer(tensor(k, c, r, r, seed=seed), geometry or Geometry(padding=(r // 2, r // 2)), norm)


def eager(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    weight, gamma, beta, mean, var, bias, _ = layer.tensors
    y = F.conv2d(x, weight, bias, *layer.geometry)
    norm = layer.norm.numbers
    return F.batch_norm(y, mean.clone(), var.clone(), gamma, beta, norm.batch_stats, norm.momentum, norm.eps)


@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
@pytest.mark.parametrize("shortcut", ["none", "identity", "projection", "zero_pad", "residual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_four_layers_with_every_shortcut(schedule, shortcut, training, mode):
    """Longer than any block of the library."""
    stride = (2, 2) if shortcut in ("projection", "zero_pad") else (1, 1)
    x = tensor(3, 6 if shortcut == "zero_pad" else 8, 7, 6)
    widths = (x.shape[1], 4, 5, 4, 8)
    layers = [
        layer(k, c, 3 if i % 2 else 1, training=training, seed=10 * i)
        for i, (c, k) in enumerate(itertools.pairwise(widths))
    ]
    layers[1] = layers[1]._replace(geometry=Geometry(stride, (1, 1)))
    projection = (
        layer(8, 8, geometry=Geometry(stride), training=training, seed=50) if shortcut == "projection" else None
    )
    u = x
    for step in layers[:-1]:
        u = torch.relu(eager(u, step))
    expected = eager(u, layers[-1])
    residual = tensor(*expected.shape, seed=60) if shortcut == "residual" else None
    if shortcut == "identity":
        expected = expected + x
    elif projection:
        expected = expected + eager(x, projection)
    elif shortcut == "zero_pad":
        expected = expected + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    elif residual is not None:
        expected = expected + residual
    for one in layers:
        one.weight.requires_grad_()
    with mode():
        joins = {
            "none": NO_SHORTCUT,
            "identity": Identity(),
            "projection": Projection(projection),
            "zero_pad": ZeroPad(stride),
            "residual": Residual(residual),
        }
        z = run_chain(x, layers, shortcut=joins[shortcut], schedule=schedule)
    assert z.requires_grad == (mode is torch.enable_grad)
    assert relative_error(z, torch.relu(expected)) <= 1e-10


@pytest.mark.parametrize(
    "pool",
    [PoolGeometry(), PoolGeometry((2, 2), (2, 2), (0, 0)), PoolGeometry((3, 2), (1, 3), (1, 0))],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_stem(pool, training):
    first = layer(6, 3, 5, training=training)
    expected = F.max_pool2d(torch.relu(eager(tensor(2, 3, 13, 11), first)), *pool)
    for gradient in (True, False):
        first.weight.requires_grad_(gradient)
        fresh = first._replace(norm=first.norm._replace(running_mean=first.norm.running_mean.clone()))
        assert relative_error(run_stem(tensor(2, 3, 13, 11), fresh, pool), expected) <= 1e-10


def test_stem_refuses_too_few_pixels_for_the_pool():
    with pytest.raises(ValueError, match=r"pool: 2 x 2 pixels"):
        run_stem(tensor(2, 3, 2, 2), layer(6, 3), PoolGeometry((5, 5), (1, 1), (0, 0)))


@pytest.mark.parametrize(
    ("shortcut", "names"),
    [
        (Identity(), r"x: .*\(2, 6, 5, 5\).*\(2, 4, 5, 5\)"),
        (Projection(layer(5, 4)), r"projection: .*\(2, 6, 5, 5\).*\(2, 5, 5, 5\)"),
        (Projection(layer(6, 3)), r"projection: .*3 channels.*4"),
        (ZeroPad((2, 2)), r"shortcut: .*\(2, 6, 5, 5\).*\(2, 6, 3, 3\)"),
        (Residual(tensor(2, 4, 5, 5)), r"residual: .*\(2, 6, 5, 5\)"),
    ],
    ids=["identity", "projection", "projection of other channels", "zero pad", "residual"],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_does_not_join_is_refused(shortcut, names, training):
    layers = [layer(4, 4, training=training), layer(6, 4, 3, training=training)]
    kept = [one.norm.running_mean.clone() for one in layers]
    with pytest.raises(ValueError, match=names):
        run_chain(tensor(2, 4, 5, 5), layers, shortcut=shortcut)
    assert all(torch.equal(one.norm.running_mean, value) for one, value in zip(layers, kept, strict=True))


def test_a_weight_on_another_device_is_refused():
    there = layer(4, 4)
    there = there._replace(weight=there.weight.to("meta"))
    with pytest.raises(ValueError, match="weight of x: expected it on cpu, got meta"):
        run_chain(tensor(2, 4, 5, 5), [there])


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_contraction_dtype_is_eagers(dtype, autocast, expected):
    x = torch.zeros(1, 2, 3, 3, dtype=dtype)
    weight = torch.zeros(2, 2, 1, 1, dtype=dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert contraction_dtype(x) == expected == F.conv2d(x, weight).dtype


def test_contraction_dtype_on_a_device_without_autocast():
    assert contraction_dtype(torch.zeros(1, 2, 3, 3, device="meta")) == torch.float32


@pytest.mark.parametrize(
    ("norm", "values", "names"),
    [
        (NormNumbers(momentum=float("nan")), 9, "momentum of it: .*nan"),
        (NormNumbers(eps=float("inf")), 9, "eps of it: .*inf"),
        (NormNumbers(eps=-1e-5), 9, "eps of it: .*at least 0, got -1e-05"),
        (NormNumbers(), 1, "it: .*more than 1 value.*1"),
    ],
)
def test_check_norm_refuses(norm, values, names):
    with pytest.raises(ValueError, match=names):
        check_norm_numbers("it", norm, values)


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (NormNumbers(momentum="0.1"), "momentum of it: expected a number, got '0.1'"),
        (NormNumbers(momentum=None), "momentum of it: expected a number, got None"),
        (NormNumbers(eps=[1e-5]), "eps of it: expected a number, got "),
    ],
)
def test_check_norm_refuses_what_is_no_number(norm, names):
    with pytest.raises(TypeError, match=names):
        check_norm_numbers("it", norm, 9)


def test_check_norm_accepts_no_eps():
    check_norm_numbers("it", NormNumbers(eps=0.0), 9)


def test_check_norm_accepts_one_value_without_batch_statistics():
    check_norm_numbers("it", NormNumbers(batch_stats=False), 1)
    check_norm_numbers("it", NormNumbers(), 2)
