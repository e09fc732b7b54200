"""One small network of every kind, fused beside plain: a step in fp64, the errors of fp32, a run on digits.

Every kind of block, shortcut, order and stem that `fusedres.models` builds is here, small enough for a fast test.
"""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres import models
from fusedres.models.iresnet import improved_resnet
from fusedres.patterns.choose import AUTO
from tests.comparison import relative_error
from tests.nn.twins import randomised

KINDS: dict[str, Callable[..., nn.Module]] = {
    "cifar, zero-pad": lambda **o: models.cifar_resnet(8, **o),
    "cifar, projection": lambda **o: models.cifar_resnet(8, shortcut="projection", **o),
    "cifar, projection always": lambda **o: models.cifar_resnet(8, shortcut="projection_always", **o),
    "cifar, plain": lambda **o: models.plain(8, **o),
    "resnext": lambda **o: models.resnext(11, cardinality=2, base_width=4, **o),
    "stochastic depth": lambda **o: models.stochastic_resnet(8, survival=0.5, **o),
    "pre-activation, basic": lambda **o: models.preact_resnet(14, **o),
    "pre-activation, bottleneck": lambda **o: models.preact_resnet(11, block="bottleneck", **o),
    "wide": lambda **o: models.wide_resnet(10, 1, **o),
    **{
        variant: lambda variant=variant, **o: models.variant_resnet(8, variant, **o)
        for variant in ("constant_scaling", "exclusive_gating", "shortcut_gating", "dropout_shortcut", "bn_after_add",
                        "relu_before_add", "relu_only")
    },
    "highway": lambda **o: models.highway(stages=((8, 8), (12, 12)), **o),
    "dense": lambda **o: models.densenet(10, 4, **o),
    "dense, bottlenecks": lambda **o: models.densenet(16, 4, bc=True, **o),
    "improved": lambda **o: improved_resnet((2, 4), (8, 16), **o),
}  # fmt: skip
STAGES = {"layers": (1, 2, 1, 1), "channels": (8, 8, 8, 16)}
OF_LIBRARIES: dict[str, Callable[..., nn.Module]] = {
    "inverted residuals": lambda **o: models.create(
        "mobilenet_v2", inverted_residual_setting=[[1, 8, 1, 1], [6, 12, 2, 2]], width_mult=0.25, dropout=0.0, **o
    ),
    "squeeze and excitation": lambda **o: models.create("seresnet50", stem_width=16, **STAGES, **o),
    "deep stem": lambda **o: models.create("resnet50d", stem_width=8, **STAGES, **o),
    "split attention": lambda **o: models.create("resnest50", stem_width=8, **STAGES, **o),
}
EVERY = [
    *(pytest.param(make, 12, id=name) for name, make in KINDS.items()),
    *(pytest.param(make, 40, id=name, marks=pytest.mark.slow) for name, make in OF_LIBRARIES.items()),
]
# The bias before the batch norm of a small split attention has a gradient of the plain twin's rounding alone, which is
# more than 1e-9 allows; resnest50 and 101 are tried below.
ROUNDING = "split attention"
NAMED = (
    "densenet161", "iresnet50", "vgg16_bn", "mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf", "seresnet50",
    "resnet50d", "resnest50",
)  # fmt: skip
IMAGENET: dict[str, Callable[..., nn.Module]] = {
    "resnet18": lambda **o: models.resnet18(**o),
    "resnet50": lambda **o: models.resnet50(**o),
    "resnet50, v1": lambda **o: models.resnet50(stride_in_first=True, **o),
    "plain18": lambda **o: models.plain(18, **o),
    "pre-activation 50": lambda **o: models.imagenet_preact_resnet(50, **o),
    "densenet121": lambda **o: models.densenet121(**o),
    **{name: lambda name=name, **o: models.create(name, **o) for name in NAMED},
}
LARGER = [
    name
    for name in models.names()
    if name in ("densenet264", "iresnet101", "iresnet152")
    or (models.entry(name).library_name is not None and name not in IMAGENET and "rcnn" not in name)
    if name not in ("vgg16", "vgg19")
]
"""Of the same blocks as smaller ones. VGG without batch norms has nothing that is fused."""
RANDOM = ("stochastic depth", "dropout_shortcut")
"""Twins draw from torch's generator, in the same order."""


def twins(make: Callable[..., nn.Module], schedule: str, classes: int = 5, **options: int) -> list[nn.Module]:
    """The fused and the plain network of one seed, with batch norms that do something."""
    made = []
    for fused in (True, False):
        torch.manual_seed(3)
        model = make(num_classes=classes, fused=fused, **options).to(memory_format=torch.channels_last)
        made.append(randomised(model, seed=1))
    fused, plain = made
    assert not any(row.fused for row in fusedres.report(plain))
    fusedres.fuse(fused, schedule=schedule)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    return made


def images(side: int, batch: int = 4, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator, dtype=torch.float64)
    # Dropout draws in the order of memory, so twins have one format.
    return x.contiguous(memory_format=torch.channels_last), torch.randint(0, 5, (batch,), generator=generator)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers of one step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    logits = model(x)
    F.cross_entropy(logits, labels).backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {"logits": logits.detach(), "gradient of the images": x.grad, **grads, **buffers}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """A gradient that vanishes but for rounding (before a batch norm) is measured against the largest."""
    assert ours.keys() == theirs.keys()
    largest = max(float(t.norm()) for name, t in theirs.items() if name.startswith("gradient"))
    for name, exact in theirs.items():
        scale = max(float(exact.norm()), 1e-6 * largest) if name.startswith("gradient") else None
        error = relative_error(ours[name], exact, scale)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check_fp64(make: Callable[..., nn.Module], schedule: str, side: int) -> None:
    fused, plain = (model.double() for model in twins(make, schedule))
    x, labels = images(side)
    for _ in range(2):
        assert_same(step(fused, x, labels), step(plain, x, labels), 1e-9)
    with torch.no_grad():
        assert relative_error(fused.eval()(x), plain.eval()(x)) <= 1e-9


@pytest.mark.parametrize("schedule", [AUTO, "moments"])
@pytest.mark.parametrize(("make", "side"), [case for case in EVERY if case.id != ROUNDING])
def test_a_step_in_fp64_is_the_plain_twins(make, side, schedule):
    check_fp64(make, schedule, side)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [AUTO, "block_end", "stats", "prologue", "moments"])
@pytest.mark.parametrize("make", IMAGENET.values(), ids=IMAGENET)
def test_a_step_of_an_imagenet_network_in_fp64_is_the_plain_twins(make, schedule):
    check_fp64(make, schedule, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_a_step_of_a_larger_network_in_fp64_is_the_plain_twins(name):
    check_fp64(lambda **o: models.create(name, **o), AUTO, 64)


@pytest.mark.parametrize("schedule", [pytest.param(AUTO, marks=pytest.mark.slow), "moments"])
@pytest.mark.parametrize(("make", "side"), EVERY)
def test_fp32_is_as_close_to_fp64_as_the_plain_twin(make, side, schedule):
    """RMS over seeds of images: one ReLU that flips within rounding decides a seed, in either network."""
    fused, plain = twins(make, schedule)
    exact = copy.deepcopy(plain).double()
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    squares: dict[str, list[float]] = {}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64)
        x, labels = x.contiguous(memory_format=torch.channels_last), torch.randint(0, 5, (4,), generator=generator)
        done = []
        for model in (fused, plain, exact):
            model.load_state_dict(state)
            dtype = next(model.parameters()).dtype
            done.append(step(model, x.to(dtype), labels))
        ours, theirs, truth = done
        for who, found in (("ours", ours), ("theirs", theirs)):
            squares.setdefault(f"{who} logits", []).append(relative_error(found["logits"], truth["logits"]) ** 2)
            grads, exacts = (
                torch.cat([t.double().flatten() for name, t in d.items() if name.startswith("gradient")])
                for d in (found, truth)
            )
            squares.setdefault(f"{who} gradients", []).append(relative_error(grads, exacts) ** 2)
    for name in ("logits", "gradients"):
        error, eager = ((sum(squares[f"{who} {name}"]) / 6) ** 0.5 for who in ("ours", "theirs"))
        assert error <= max(1.5 * eager, 4 * torch.finfo(torch.float32).eps), (name, error, eager)


def curve(model: nn.Module, steps: int, dtype: torch.dtype) -> list[float]:
    """Losses of SGD with momentum on shuffled batches of digits, all draws from one seed."""
    from fusedres.train.digits import load_digits

    digits = load_digits()
    model.to(dtype, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(4)
    losses = []
    for i_batch in order[: 16 * steps].split(16):
        optimizer.zero_grad()
        x = digits.train_images[i_batch].to(dtype, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), digits.train_labels[i_batch])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_training_on_digits_gives_the_same_curve(make):
    """In fp64, where rounding stays rounding: ten steps later the losses still agree to 1e-7."""
    pytest.importorskip("sklearn")
    curves = []
    for fused in (True, False):
        torch.manual_seed(3)
        model = make(num_classes=10, in_channels=1, fused=fused)
        curves.append(curve(fusedres.fuse(model, schedule="moments") if fused else model, 10, torch.float64))
    assert len(curves[1]) == 10 and curves[1][-1] != curves[1][0]
    for ours, theirs in zip(*curves, strict=True):
        assert abs(ours - theirs) <= 1e-7 * abs(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_training_on_digits_in_fp32_stays_together(make):
    """Twenty steps, as far apart as the plain twin is from itself with weights one unit in the last place off."""
    pytest.importorskip("sklearn")
    curves = {}
    for kind in ("fused", "plain", "plain, a unit off"):
        torch.manual_seed(3)
        model = make(num_classes=10, in_channels=1, fused=kind == "fused")
        if "off" in kind:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape).sign())
        curves[kind] = curve(model, 20, torch.float32)
    plain = curves["plain"]
    ours, rounding = (
        max(abs(a - b) for a, b in zip(curves[kind], plain, strict=True)) for kind in ("fused", "plain, a unit off")
    )
    print(f"{plain[0]:.3f} to {plain[-1]:.3f}: fused {ours:.1e} apart, a unit in the last place {rounding:.1e}")
    assert min(plain[10:]) < plain[0]
    assert ours <= max(0.001 * plain[0], 3 * rounding)


DEEP = """
import sys, torch
from torch.nn import functional as F
from fusedres.models import create
name, fused, rung = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
import fusedres
model = create(name, fused=fused).to(memory_format=torch.channels_last)
if fused:
    fusedres.fuse(model, schedule=rung)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
loss.backward()
optimizer.step()
assert bool(torch.isfinite(loss))
# Not ru_maxrss, which a process takes over from the one that started it.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rung", [AUTO, "prologue"])
@pytest.mark.parametrize("name", ["cifar_resnet1202", "preact_resnet1001"])
def test_the_deepest_networks_step_within_6_gb(name, fused, rung):
    """Peak resident memory of a process of its own, torch and all, at batch 2."""
    if not fused and rung != AUTO:
        pytest.skip("the plain network has no schedule")
    done = subprocess.run(
        [sys.executable, "-c", DEEP, name, str(fused), rung], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout)
    print(f"{name} fused={fused} {rung}: {peak:.2f} GiB")
    assert peak <= 6.0
