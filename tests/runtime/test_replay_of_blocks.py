"""fusedres.runtime.replay: whole blocks, whose replayed steps are the same bits, launches included."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.runtime import replay
from fusedres.runtime.launch import launch
from fusedres.runtime.replay import replayed
from tests.nn.twins import plain_copy
from tests.runtime.replays import TIMES, assert_same, block, noted
from tests.small_kernels import copy_kernel, triton
from tests.vgpu_support import needs_vgpu

pytestmark = pytest.mark.usefixtures("no_check")


def three_steps(model: nn.Module, size=(2, 16, 5, 5)) -> list[Tensor]:
    """Outputs, gradients and running statistics of each."""
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(size).to(memory_format=torch.channels_last).requires_grad_()
        model.zero_grad(set_to_none=True)
        z = model(x)
        z.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        seen += [z, x.grad, *grads, *(buffer.clone() for buffer in model.buffers())]
    return seen


def frozen(model: nn.Module) -> None:
    model.conv2.weight.requires_grad_(False)


def cumulative(model: nn.Module) -> None:
    model.bn1.momentum = None  # another number at each step


CHANGES = {
    "trained": (lambda model: None, 2),
    "with a frozen weight": (frozen, 2),
    "with frozen statistics": (lambda model: model.bn2.eval(), 2),
    "with a cumulative average": (cumulative, 0),
}


@pytest.mark.parametrize("name", ["native", "reference", pytest.param("vgpu:sm_90", marks=needs_vgpu)])
@pytest.mark.parametrize(("change", "passes"), CHANGES.values(), ids=CHANGES)
def test_steps_of_a_block_are_the_same_bits(change, passes, name):
    ours, theirs = block(), block()
    change(ours)
    change(theirs)
    with fusedres.backend(name):
        steps = three_steps(ours)
        assert len(noted()) == passes
        with replay.off():
            assert_same(tuple(steps), tuple(three_steps(theirs)))


@needs_vgpu
def test_launches_are_done_again(monkeypatch):
    started = []
    execute = fusedres.runtime.launch._execute
    monkeypatch.setattr(
        fusedres.runtime.launch, "_execute", lambda *given: (started.append(given[0].__name__), execute(*given))
    )
    steps = []
    model = block()
    with fusedres.backend("vgpu:sm_90"):
        for _ in range(TIMES):
            started.clear()
            model(torch.randn(2, 16, 5, 5)).sum().backward()
            steps.append(list(started))
    assert steps[0] and all(step == steps[0] for step in steps)


@pytest.mark.parametrize("name", ["native", pytest.param("vgpu:sm_90", marks=needs_vgpu)])
def test_inference_sees_new_parameters(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = block().eval()
    plain = plain_copy(model)
    with fusedres.backend(name), torch.no_grad():
        for i in range(TIMES):
            for one in (model, plain):
                one.bn2.running_mean.fill_(0.1 * i)
                one.conv1.weight.mul_(1.5)
            x = torch.randn(2, 16, 5, 5)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


# --- on a GPU ---


class Launcher:
    """Stands for what hands a binary and its arguments to the driver."""

    started: ClassVar[list[tuple]] = []

    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        Launcher.started.append((self.name, (x, y, z), stream, arguments))


@pytest.fixture
def gpu(monkeypatch):
    """Tensors and Triton as on a GPU of which nothing is there but the compiler."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    properties = {"max_shared_mem": 232448}
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 7, launcher_cls=Launcher,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties, unload_module=lambda module: None,
            load_binary=lambda name, binary, shared, device: (1, 2, 32, 0, 1024),
        ),
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(
        "fusedres.runtime.launch._device_target", lambda index: fusedres.compiler.targets.TARGETS["sm_90"]
    )
    Launcher.started.clear()
    yield
    # While the driver is there that its binaries are told to be unloaded by.
    copy_kernel.device_caches.clear()
    replay._notes.clear()
    gc.collect()


@needs_vgpu
def test_a_launch_on_a_gpu_is_done_again_with_the_same_arguments(gpu):
    def copied(x, block):
        y = torch.empty_like(x)
        arguments = {"x_ptr": x, "y_ptr": y, "rows": x.shape[0], "C": x.shape[1], "BLOCK_ROWS": block, "BLOCK_C": 32}
        launch(copy_kernel, (triton.cdiv(x.shape[0], block),), arguments, reads=["x_ptr"], writes=["y_ptr"])
        return y

    given = []
    for _ in range(TIMES):
        x = torch.randn(10, 24)
        given.append((x, replayed(copied, x, 4)))
    assert len(noted()) == 1 and len(Launcher.started) == TIMES
    for (x, y), (name, grid, stream, arguments) in zip(given, Launcher.started, strict=True):
        assert (name, grid, stream) == ("copy_kernel", (3, 1, 1), 7)
        named = dict(zip(copy_kernel.arg_names, arguments, strict=True))
        assert named.pop("x_ptr") is x and named.pop("y_ptr") is y
        assert named == {"rows": 10, "C": 24, "BLOCK_ROWS": 4, "BLOCK_C": 32}
