"""Whole networks of torchvision, fused, beside eager: a step, a run of steps, hostile input, saved bytes.

Two things decide how an fp32 gradient can be compared. Eager's own error depends on the memory format (in
oneDNN, channels_last convolutions round twice as much as NCHW ones), so eager is channels_last here, as fused
blocks are. And a ReLU whose input is within rounding of zero flips: one flip in a layer of 2 x 2 pixels is a
gradient error of 1e-2, in eager as in fused. So every gradient of the whole network is checked in fp64, where
nothing flips. In fp32 a step is held to 1e-4 where biases keep every channel open or closed, every gradient on its
own to eager's error where each ReLU opens for half of the pixels with zero in a gap between them, and the whole
gradient of the network as it comes, where ReLUs flip, to eager's error over some seeds.
"""

import copy
import functools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres.bench.saved_activations import image_loss
from fusedres.ops.bn_backward import NormSums
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime import replay
from fusedres.traffic.saved import per_image, saved_bytes
from tests.comparison import relative_error

models = pytest.importorskip("torchvision").models

PX, BATCH = 64, 4
QUICK = {"resnet18": (AUTO, *SCHEDULES), "resnet50": (AUTO, "moments")}
RUNGS = [
    pytest.param(name, rung, marks=() if rung in QUICK[name] else pytest.mark.slow, id=f"{name}-{rung}")
    for name in QUICK
    for rung in (AUTO, *SCHEDULES)
]
rungs = pytest.mark.parametrize(("name", "schedule"), RUNGS)


class Step(NamedTuple):
    """What one step of SGD leaves."""

    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(models, name)().to(memory_format=torch.channels_last)


def images(batch: int, px: int, seed: int, classes: int = 1000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, px, px, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.randint(0, classes, (batch,), generator=generator)


def step(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Step:
    """One step of a copy of the model; its classes stay what they are."""
    model = copy.deepcopy(model).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, labels = images(BATCH, PX, seed)
    loss = F.cross_entropy(model(x.to(dtype)), labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return Step(loss.detach(), gradients, parameters, dict(model.named_buffers()))


def fused(model: nn.Module, schedule: str) -> nn.Module:
    return fusedres.fuse(copy.deepcopy(model), schedule=schedule)


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


@functools.lru_cache(maxsize=1)  # a ResNet-50 in fp64 with its gradients is 0.4 GB
def plain_step(name: str, dtype: torch.dtype) -> Step:
    """The plain network's step, made once for all rungs."""
    return step(network(name, 0), 0, dtype)


def assert_same_step(ours: Step, theirs: Step, tolerance: float) -> None:
    """Loss, running statistics and parameters, each tensor on its own, relative in norm."""
    assert relative_error(ours.loss, theirs.loss) <= tolerance, "loss"
    for kind in ("buffers", "parameters"):
        for name, exact in getattr(theirs, kind).items():
            actual = getattr(ours, kind)[name]
            if not exact.is_floating_point():
                assert torch.equal(actual, exact), name
                continue
            error = relative_error(actual, exact)
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


@rungs
def test_a_step_in_fp64_is_eagers(name, schedule):
    """No ReLU flips in fp64, so that every tensor of the network can be compared on its own."""
    exact = plain_step(name, torch.float64)
    ours = step(fused(network(name, 0), schedule), 0, torch.float64)
    assert_same_step(ours, exact, 1e-9)
    for key, gradient in exact.gradients.items():
        assert relative_error(ours.gradients[key], gradient) <= 1e-9, key


@rungs
def test_loss_and_running_statistics_after_a_step_in_fp32(name, schedule):
    """They are made before any gradient, so flips do not reach them."""
    eager = plain_step(name, torch.float32)
    ours = step(fused(network(name, 0), schedule), 0)
    assert_same_step(ours._replace(parameters={}), eager._replace(parameters={}), 1e-4)


def without_flips(model: nn.Module) -> nn.Module:
    """Every channel wholly open or closed: gammas of 0.1, betas of +-1, one sign along all shortcuts."""
    generator = torch.Generator().manual_seed(5)
    ends = "bn3" if hasattr(model.layer1[0], "bn3") else "bn2"
    signs: dict[str, Tensor] = {}
    for name, bn in model.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            joins = "downsample" in name or name.endswith(ends)
            drawn = torch.rand(bn.num_features, generator=generator)
            sign = signs.setdefault(name.split(".")[0] if joins else name, torch.where(drawn < 0.5, -1.0, 1.0))
            with torch.no_grad():
                bn.bias.copy_(sign)
                bn.weight.fill_(0.1)
    return model


@rungs
def test_a_step_in_fp32_where_no_relu_flips(name, schedule):
    model = without_flips(network(name, 0))
    assert_same_step(step(fused(model, schedule), 0), step(model, 0), 1e-4)


def widest_gap(z: Tensor) -> Tensor:
    """Per channel of (N, C, H, W), the middle of the widest gap in the middle half of its values."""
    values = z.transpose(0, 1).flatten(1).sort().values
    quarter = values.shape[1] // 4
    middle = values[:, quarter:-quarter]
    width, left = middle.diff().max(1)
    return middle.gather(1, left.unsqueeze(1)).squeeze(1) + width / 2


def with_gaps(model: nn.Module, x: Tensor) -> nn.Module:
    """Moves betas so that, for these images, zero lies in a gap of what each ReLU receives, half of it open."""

    def centre(norms: Iterator[nn.BatchNorm2d], _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        zero = widest_gap(inputs[0])
        next(norms).bias.sub_(zero)
        return inputs[0] - zero.view(1, -1, 1, 1)

    model = model.double()
    hooks = []
    for name, relu in model.named_modules():
        if isinstance(relu, nn.ReLU):  # A block has one for all of its batch norms, called in their order.
            owner = model.get_submodule(name.rpartition(".")[0])
            norms = iter([child for child in owner.children() if isinstance(child, nn.BatchNorm2d)])
            hooks.append(relu.register_forward_pre_hook(functools.partial(centre, norms)))
    with torch.no_grad():
        model(x.double())
    for hook in hooks:
        hook.remove()
    return model.float()


def relu_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What each ReLU of an eager model receives, in fp64."""
    received: list[Tensor] = []
    model = copy.deepcopy(model).to(x.dtype)
    for module in model.modules():
        if isinstance(module, nn.ReLU):  # in place, so what it received must be copied
            module.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].detach().double().clone()))
    with torch.no_grad():
        model(x)
    return received


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("resnet18", 0),
        ("resnet18", 1),
        ("resnet50", 0),
        *(pytest.param("resnet50", seed, marks=pytest.mark.slow) for seed in (1, 2, 3)),
    ],
)
def test_with_gaps_every_channel_is_mixed_and_nothing_is_within_rounding_of_zero(name, seed):
    """The premise of the comparison of every gradient on its own; without gaps ResNet-50 flips 20 ReLUs at seed 0."""
    x, _ = images(BATCH, PX, seed)
    model = with_gaps(network(name, seed), x)
    received = relu_inputs(model, x.double())
    assert len(received) == {"resnet18": 17, "resnet50": 49}[name]
    for rounded, exact in zip(relu_inputs(model, x), received, strict=True):
        open_ = (exact > 0).double().mean((0, 2, 3))
        assert float((open_ - 0.5).abs().max()) < 0.3
        assert float((rounded - exact).abs().max()) < float(exact.abs().min()) / 4


def rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def ratios_to_eager(
    name: str, schedules: Sequence[str], seeds: Sequence[int], prepare: Callable[[nn.Module, Tensor], nn.Module]
) -> dict[str, dict[str, float]]:
    """Per schedule: RMS over seeds of errors against fp64, over eager's, of the whole network and per parameter."""
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        model = prepare(network(name, seed), images(BATCH, PX, seed)[0])
        exact = step(model, seed, torch.float64)
        for kind in ("eager", *schedules):
            done = step(model if kind == "eager" else fused(model, kind), seed)
            compared = {
                "all gradients": (whole(done.gradients), whole(exact.gradients)),
                "all parameters after the step": (whole(done.parameters), whole(exact.parameters)),
            } | {key: (done.gradients[key], gradient) for key, gradient in exact.gradients.items()}
            for key, pair in compared.items():
                errors.setdefault(kind, {}).setdefault(key, []).append(relative_error(*pair))
    eager = errors.pop("eager")
    ratios = {
        kind: {key: rms(values) / rms(eager[key]) for key, values in tensors.items()}
        for kind, tensors in errors.items()
    }
    for kind, of in ratios.items():
        worst = max(of, key=of.__getitem__)
        print(f"{name} {kind}: all gradients {of['all gradients']:.2f}, worst {worst} {of[worst]:.2f}")
    return ratios


def too_large(ratios: dict[str, dict[str, float]], prefix: str = "") -> list[str]:
    """Those that are not at most 1.5."""
    return [
        f"{kind}: {key} {ratio:.2f}"
        for kind, of in ratios.items()
        for key, ratio in of.items()
        if key.startswith(prefix) and not ratio <= 1.5
    ]


def as_it_comes(model: nn.Module, _: Tensor) -> nn.Module:
    return model


# One by one only without flips: with them, RMS over 8 of 32 seeds, a schedule of ResNet-50 exceeds 1.5 in some of the
# 161 parameters in 20 to 31 % of draws, and eager, held to that schedule, in 9 to 58 %. With gaps the log of one seed's
# ratio has a deviation of 0.06, and the largest of 12 seeds, all parameters and all schedules is 1.22.
@pytest.mark.parametrize(
    ("name", "schedules", "seeds"),
    [
        pytest.param("resnet18", (AUTO, *SCHEDULES), (0, 1), id="resnet18"),
        pytest.param("resnet50", (AUTO, "moments"), (0,), id="resnet50"),
        pytest.param("resnet50", (AUTO, *SCHEDULES), (1, 2, 3), id="resnet50-all", marks=pytest.mark.slow),
    ],
)
def test_gradients_one_by_one_are_as_close_to_fp64_as_eagers(name, schedules, seeds):
    assert not too_large(ratios_to_eager(name, schedules, seeds, with_gaps))


# Not one by one: moving an open channel moves nothing behind the next 1x1 convolution and batch norm, so that the exact
# gradient of its beta is 0. And over some seeds: one channel of small variance can hold half of a seed's squared error,
# the log of a seed's ratio has a deviation of 0.2, and the largest of 32 seeds of ResNet-50 and all schedules is 1.74;
# of 2000 draws of 8 of them it is 1.32.
@pytest.mark.parametrize(
    ("name", "seeds"), [("resnet18", range(3)), pytest.param("resnet50", range(8), marks=pytest.mark.slow)]
)
def test_gradients_together_are_as_close_to_fp64_as_eagers_where_channels_are_open_or_closed(name, seeds):
    ratios = ratios_to_eager(name, (AUTO, *SCHEDULES), seeds, lambda model, _: without_flips(model))
    assert not too_large(ratios, "all gradients")


@pytest.mark.slow
def test_gradients_of_resnet50_together_are_as_close_to_fp64_as_eagers():
    """Some ReLUs flip in every seed, in eager as in fused: errors of 2e-2 either way, compared as RMS."""
    assert not too_large(ratios_to_eager("resnet50", [AUTO, "moments"], (0, 1, 2), as_it_comes), "all ")


def tf32(t: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


def bfloat16(t: Tensor) -> Tensor:
    return t.bfloat16().to(t.dtype)


# With flips neither can be told from none: over three seeds of ResNet-50 as it comes they do not move the ratios.
@pytest.mark.parametrize(
    ("op", "rounded"),
    [
        pytest.param(
            "fusedres.ops.conv_input_grad.bn_backward_reduce",
            lambda sums: NormSums(*map(bfloat16, sums)),
            id="sums of batch norm's gradient in bfloat16",
        ),
        pytest.param(
            "fusedres.ops.conv_input_grad.input_grad",
            tf32,
            id="input gradients in TF32",
        ),
    ],
)
def test_planted_rounding_is_caught_in_most_gradients(op, rounded, monkeypatch):
    exact = pkgutil.resolve_name(op)
    monkeypatch.setattr(op, lambda *operands, **options: rounded(exact(*operands, **options)))
    with replay.off():
        assert len(too_large(ratios_to_eager("resnet18", ["stats"], (0,), with_gaps))) > 31


def losses(model: nn.Module, lr: float, dtype: torch.dtype = torch.float32, steps: int = 20) -> list[float]:
    model = copy.deepcopy(model).to(dtype)
    x, labels = images(8, PX, 0, classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=1e-4)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def furthest_apart(ours: list[float], theirs: list[float]) -> float:
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"loss {theirs[0]:.3f} to {theirs[-1]:.3f}, largest relative difference of a step {apart:.1e}")
    assert theirs[-1] != theirs[0], "nothing was learnt, so nothing is compared"
    return apart


def ten_classes(name: str, seed: int) -> nn.Module:
    model = network(name, seed)
    model.fc = nn.Linear(model.fc.in_features, 10)
    return model


@pytest.mark.parametrize("schedule", [AUTO, "moments", pytest.param("stats", marks=pytest.mark.slow)])
def test_twenty_steps_of_resnet18_keep_the_loss_curves_together(schedule):
    """From 2.5 to 0.02 without momentum; eager in NCHW is 0.2 to 0.7 % from eager in channels_last here."""
    model = ten_classes("resnet18", 2)
    assert furthest_apart(losses(fused(model, schedule), 0.01), losses(model, 0.01)) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [AUTO, "moments"])
def test_six_steps_of_resnet50_keep_the_loss_curves_together(schedule):
    """Small images make ResNet-50 chaotic: a difference grows twentyfold a step.

    Eager in NCHW and eager in channels_last, both in fp64, part from 1e-14 at the first step to 1e-1 at the tenth,
    and in fp32 within a few steps, so that longer curves say nothing of whoever computes them.
    """
    model = ten_classes("resnet50", 0)
    ours, theirs = (losses(m, 0.001, torch.float64, 6) for m in (fused(model, schedule), model))
    assert furthest_apart(ours, theirs) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
def test_twenty_steps_of_resnet50_where_no_relu_flips(schedule):
    model = without_flips(ten_classes("resnet50", 0))
    assert furthest_apart(losses(fused(model, schedule), 0.0002), losses(model, 0.0002)) <= 0.01


@pytest.mark.parametrize("schedule", ["moments", AUTO])
@pytest.mark.parametrize("shape", [(4, 16, 20, 17), (2, 64, 56, 56)], ids=str)
def test_a_mean_of_500_deviations_keeps_the_variance(schedule, shape):
    """Raw second moments would cancel in fp32: 500^2 is 2.5e5, and fp32 carries 1.7e7."""
    torch.manual_seed(0)
    channels = shape[1]
    block = fusedres.fuse(fusedres.nn.ConvBNAct(channels, 4 * channels, 1), schedule=schedule)
    block.bn.momentum = 1.0
    exact = fusedres.unfuse(copy.deepcopy(block)).double()
    x = torch.randn(shape) * torch.linspace(0.1, 10, channels).view(-1, 1, 1)
    x = x + 500 * x.std((0, 2, 3), keepdim=True)
    block(x), exact(x.double())
    for name, buffer in exact.bn.named_buffers():
        error = relative_error(dict(block.bn.named_buffers())[name], buffer)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    worst = ((block.bn.running_var - exact.bn.running_var).abs() / exact.bn.running_var).max()
    assert worst < 1e-4, f"worst channel's variance: relative error {worst:.1e}"


def test_a_bottleneck_with_a_large_mean_between_its_layers():
    """The moments are of relu(bn2(conv2)): beta 500 times gamma is the hostile case inside a block."""
    torch.manual_seed(0)
    block = fusedres.nn.Bottleneck(64, 16)
    with torch.no_grad():
        block.bn2.weight.fill_(0.1)
        block.bn2.bias.fill_(50.0)
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.momentum = 1.0
    fusedres.fuse(block, schedule="moments")
    exact = fusedres.unfuse(copy.deepcopy(block)).double()
    x = torch.randn(4, 64, 14, 14)
    block(x), exact(x.double())
    assert relative_error(block.bn3.running_var, exact.bn3.running_var) < 1e-4


def test_bytes_saved_for_backward_by_resnet50_at_224_pixels():
    """Megabytes per image in bf16 elements; the whole of a batch of 128, and the slope over the batch.

    No bound on auto: without kernels for the device it trades memory for time.
    """
    device = torch.device("meta")
    with device:
        eager = models.resnet50().to(memory_format=torch.channels_last)
    batch, table = 128, {}
    for schedule in ("eager", *SCHEDULES, AUTO):
        model = eager if schedule == "eager" else fused(eager, schedule)
        saved = saved_bytes(model, lambda m: image_loss(m, batch, 224, device))
        table[schedule] = saved.as_dtype(torch.bfloat16) / batch / 1e6
    slope = per_image(fused(eager, "moments"), lambda m, n: image_loss(m, n, 224, device), batch).slope
    print({name: f"{megabytes:.2f}" for name, megabytes in table.items()})
    print(f"moments, per further image: {slope.as_dtype(torch.bfloat16) / 1e6:.2f}")
    assert table["eager"] == pytest.approx(43.8, abs=0.2)
    assert table["moments"] <= 20.5
    assert slope.as_dtype(torch.bfloat16) / 1e6 <= 20.5
    assert table["prologue"] <= table["stats"] <= table["block_end"] <= table["eager"]
