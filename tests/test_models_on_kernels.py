"""Blocks and a whole network in training, their kernels executed on the CPU, against the formulas."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fusedres
from fusedres import vgpu
from fusedres.models import cifar_resnet
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import assert_as_accurate_as_eager, assert_close, seeded
from tests.models.test_exactness import KINDS, OF_LIBRARIES
from tests.nn.twins import randomised
from tests.vgpu_support import skip_module_without_vgpu

skip_module_without_vgpu()
torchvision = pytest.importorskip("torchvision")

from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

seed = pytest.fixture(autouse=True)(seeded)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would differ from the formulas by more than anything that is looked for here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


each_target = pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.slow) for name in vgpu.TARGETS]
)


def projection(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


BLOCKS = {
    "basic": (lambda: BasicBlock(16, 16), (2, 16, 9, 7)),
    "basic, projection": (lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)), (2, 16, 9, 7)),
    "bottleneck": (lambda: Bottleneck(64, 16), (2, 64, 7, 7)),
    "bottleneck, projection": (lambda: Bottleneck(32, 16, 2, projection(32, 64, 2)), (2, 32, 7, 5)),
}
# Batch norms, each three launches forward (a projection's joins the block end on the upper rungs) and three backward.
LAYERS = {"basic": 2, "basic, projection": 3, "bottleneck": 3, "bottleneck, projection": 4}


class Step(NamedTuple):
    """What a training step computes."""

    z: Tensor
    dx: Tensor | None
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Step:
    x = x.clone().requires_grad_(labels is None)
    z = model(x)
    loss = z.float().square().mean() if labels is None else cross_entropy(z, labels)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(z.detach(), x.grad, grads, {name: buffer.clone() for name, buffer in model.named_buffers()})


def on_both(model: nn.Module, target: str, *data: Tensor) -> tuple[Step, Step, Any]:
    """The step on kernels, the same step on the formulas, and the account of the launches."""
    twin = copy.deepcopy(model)
    with fusedres.backend(f"vgpu:{target}"), fusedres.record() as trace:
        ours = step(model, *data)
    with fusedres.backend("reference"):
        return ours, step(twin, *data), trace


def assert_agree(ours: Step, theirs: Step, tolerance: float) -> None:
    assert_close(ours.z, theirs.z, tolerance, name="z")
    if ours.dx is not None and theirs.dx is not None:
        assert_close(ours.dx, theirs.dx, tolerance, name="dx")
    for mine, other in ((ours.grads, theirs.grads), (ours.buffers, theirs.buffers)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert_close(tensor, other[name], tolerance, name=name)


def assert_as_accurate(ours: Step, theirs: Step, exact: Step) -> None:
    """No tensor further from fp64 than 1.5 times the plain modules in the same dtype, or half a unit of rounding."""
    for mine, other, truth in (
        ({"z": ours.z}, {"z": theirs.z}, {"z": exact.z}),
        (ours.grads, theirs.grads, exact.grads),
        (ours.buffers, theirs.buffers, exact.buffers),
    ):
        for name, tensor in mine.items():
            if tensor.dtype.is_floating_point:
                assert_as_accurate_as_eager(tensor, other[name], truth[name], name=name)


@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_block_trains_on_kernels(block: str, schedule: str, dtype: torch.dtype) -> None:
    make, size = BLOCKS[block]
    model = fusedres.fuse(nn.Sequential(make().to(dtype)), schedule=schedule)
    x = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
    plain, wide = fusedres.unfuse(copy.deepcopy(model)), copy.deepcopy(model).double()
    ours, theirs, trace = on_both(model, "sm_90", x)
    if dtype == torch.float32:
        assert_agree(ours, theirs, 1e-5)
    else:
        assert_as_accurate(ours, step(plain, x), step(wide, x.double()))
    launches = trace.by_kernel()
    if schedule == "block_end":
        names = ("bn_statistics", "bn_finalize", "bn_act", "bn_backward_reduce", "bn_backward_finish")
        for name in (*names, "bn_backward_apply"):
            assert launches[f"{name}_kernel"] == LAYERS[block], name
    else:
        assert launches["bn_finalize_kernel"] + launches["moments_finalize_kernel"] == LAYERS[block]


@each_target
def test_resnet20_trains_on_kernels(target: str) -> None:
    """The network of `fusedres demo`, one step on images of its size."""
    model = fusedres.fuse(cifar_resnet(20, in_channels=1))
    ours, theirs, trace = on_both(model, target, torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,)))
    assert_agree(ours, theirs, 1e-5)
    assert trace.by_kernel()["bn_finalize_kernel"] == 19  # two in each of nine blocks, and the stem
    assert len({launch.binary for launch in trace.launches}) <= 52  # one of them the stem's


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "moments"])
def test_an_improved_resnet_trains_on_kernels(schedule: str) -> None:
    """Its passes are found by what the code of its blocks computes."""
    model = fusedres.fuse(KINDS["improved"](num_classes=5), schedule=schedule)
    ours, theirs, trace = on_both(model, "sm_90", torch.randn(2, 3, 24, 24), torch.tensor([0, 2]))
    assert_agree(ours, theirs, 1e-5)
    launches = trace.by_kernel()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert launches["bn_finalize_kernel"] + launches["moments_finalize_kernel"] == norms


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_LIBRARIES)
def test_networks_of_libraries_infer_on_kernels(kind: str) -> None:
    """With statistics that are kept, which few images do not make extreme."""
    pytest.importorskip("timm")
    model = randomised(OF_LIBRARIES[kind](num_classes=5)).eval()
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
            z = model(x)
        with fusedres.backend("reference"):
            assert_close(z, model(x), 1e-5)
    assert trace.by_kernel()["conv_bn_act_kernel"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "prologue", "moments"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_resnet20_trains_three_steps(target: str, dtype: torch.dtype, tolerance: float, schedule: str) -> None:
    """Every convolution of every block on kernels, the weights in fp32, contractions in the dtype of autocast."""
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    model = fusedres.fuse(cifar_resnet(20, in_channels=1), schedule=schedule)
    losses = {}
    for backend in (f"vgpu:{target}", "reference"):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        losses[backend] = []
        for _ in range(3):
            with fusedres.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = cross_entropy(twin(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    for ours, theirs in zip(*losses.values(), strict=True):
        assert abs(ours - theirs) <= tolerance * theirs, losses


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_stem_trains_on_kernels(target: str, dtype: torch.dtype) -> None:
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, name, nn.Identity())
    model.fc = nn.Linear(64, 3)
    model = fusedres.fuse(model.to(dtype))
    ours, theirs, trace = on_both(model, target, torch.randn(2, 3, 22, 18).to(dtype), torch.tensor([0, 2]))
    assert trace.by_kernel()["stem_pool_kernel"] == trace.by_kernel()["stem_pool_backward_kernel"] == 1
    assert_agree(ours, theirs, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_evaluation_on_kernels_needs_no_statistics() -> None:
    model = fusedres.fuse(nn.Sequential(BasicBlock(16, 16))).eval()
    x = torch.randn(2, 16, 6, 5)
    ours, theirs, trace = on_both(model, "sm_90", x)
    assert_agree(ours, theirs, 1e-5)
    assert "bn_statistics_kernel" not in trace.by_kernel()


def test_the_backward_pass_stays_on_the_kernels_of_the_forward_pass() -> None:
    model = fusedres.fuse(nn.Sequential(BasicBlock(16, 16)), schedule="block_end")
    with fusedres.backend("vgpu:sm_80"):
        z = model(torch.randn(2, 16, 6, 5))
    with fusedres.record() as trace:
        z.sum().backward()
    assert trace.by_kernel()["bn_backward_reduce_kernel"] == 2
    assert all(launch.counters is not None for launch in trace.launches)


def test_a_dry_run_of_resnet50_at_full_size() -> None:
    """224 px, batch 256, on the meta device: launches and bytes without computing anything."""
    with torch.device("meta"):
        model = torchvision.models.resnet50().to(memory_format=torch.channels_last).bfloat16()
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    normalised = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: normalised.append(2 * output.numel()))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    model(x)
    for hook in hooks:
        hook.remove()  # a block whose inner modules have hooks is not fused
    model = fusedres.fuse(model, schedule="block_end")
    with fusedres.record() as trace:
        model(x).sum().backward()
    launches = trace.by_kernel()
    assert launches["bn_finalize_kernel"] == 53  # batch norms
    assert launches["stem_pool_kernel"] == launches["stem_pool_backward_kernel"] == 1
    assert all(launch.counters is None for launch in trace.launches)
    read = sum(launch.read["y_ptr"] for launch in trace.launches if launch.name == "bn_statistics_kernel")
    written = sum(launch.written["dy_ptr"] for launch in trace.launches if launch.name == "bn_backward_apply_kernel")
    assert read == written == sum(normalised)


@pytest.mark.parametrize(("network", "megabytes", "launches"), [("resnet50", 56, 58), ("resnet18", 20, 24)])
def test_inference_is_a_launch_for_each_convolution(network: str, megabytes: float, launches: int) -> None:
    """Eager ResNet-50 moves 160 MB per image in 16 bits. A projection joins the last convolution of its block."""
    with torch.device("meta"):
        model = getattr(torchvision.models, network)().to(memory_format=torch.channels_last).bfloat16().eval()
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    projections = sum(isinstance(module, nn.Sequential) and len(module) == 2 for module in model.modules())
    projections -= sum(len(module) == 2 for name, module in model.named_children() if name.startswith("layer"))
    with torch.no_grad(), fusedres.record() as trace:
        fusedres.fuse(model)(x)
    # The stem's convolution has nothing to fuse beside its pooling, and is the library's: 2 passes of 1.6 and 0.3 MB.
    assert trace.by_kernel() == {"conv_bn_act_kernel": convolutions - 1 - projections, "stem_pool_kernel": 1}
    library = (224 * 224 * 3 + 112 * 112 * 64) * 2 / 1e6
    assert (trace.bytes_read + trace.bytes_written) / 256e6 + library <= megabytes
    assert len(trace.launches) + 1 <= launches
    assert len({launch.binary for launch in trace.launches}) <= 28


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_forward_pass_needs_few_binaries(schedule: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50().to(memory_format=torch.channels_last).bfloat16()
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with fusedres.record() as trace:
        fusedres.fuse(model, schedule=schedule)(x)
    assert len({launch.binary for launch in trace.launches}) <= 28


def test_evaluation_sees_parameters_change() -> None:
    model = fusedres.fuse(nn.Sequential(BasicBlock(16, 16))).eval()
    x = torch.randn(1, 16, 5, 5)
    for _ in range(2):
        with torch.no_grad(), fusedres.backend("vgpu:sm_90"):
            z = model(x)
        with torch.no_grad(), fusedres.backend("reference"):
            assert_close(z, model(x), 1e-6)
        with torch.no_grad():
            model[0].bn2.weight.mul_(3.0)
            model[0].bn1.running_var.mul_(2.0)
