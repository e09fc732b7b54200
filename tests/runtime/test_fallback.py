"""fusedres.runtime.fallback: a kernel that can not be started makes its block run plain, with everything as it was."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.runtime import fallback, launch, switches
from fusedres.runtime.launch import LaunchFailed
from tests.comparison import relative_error
from tests.nn.twins import randomised
from tests.vgpu_support import needs_vgpu

pytestmark = needs_vgpu


@pytest.fixture(autouse=True)
def forgiving(monkeypatch):
    monkeypatch.setattr(switches, "STRICT", False)
    monkeypatch.setattr(fallback, "_warned", set())


@pytest.fixture
def failing(monkeypatch):
    """Names of kernels that run out of resources where they are started."""
    from triton.runtime.errors import OutOfResources

    names: set[str] = set()
    start = launch._execute

    def execute(kernel, *arguments):
        if kernel.__name__ in names:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return start(kernel, *arguments)

    monkeypatch.setattr(launch, "_execute", execute)
    return names


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    resnet = pytest.importorskip("torchvision").models.resnet
    plain = randomised(nn.Sequential(resnet.BasicBlock(16, 16), resnet.BasicBlock(16, 16)))
    plain.to(memory_format=torch.channels_last)
    return fusedres.fuse(copy.deepcopy(plain), schedule="prologue"), plain


X = (2, 16, 6, 6)


def step(model: nn.Module, *, checkpointed: bool = False) -> list[Tensor]:
    """Output, gradients and running statistics of a step in fp32 without TF32."""
    torch.manual_seed(1)
    x = torch.randn(X).contiguous(memory_format=torch.channels_last).requires_grad_()
    model.zero_grad()
    z = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    z.square().mean().backward()
    return [z.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone().float() for b in model.buffers())]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-3


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


FORWARD = ["conv_forward_kernel", "bn_finalize_kernel", "bn_act_kernel"]
BACKWARD = ["conv_weight_grad_kernel", "conv_input_grad_kernel", "bn_backward_apply_kernel"]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD, "the second of its kind"])
def test_a_step_is_the_plain_one(name, checkpointed, failing, monkeypatch):
    fused, plain = twins()
    if name in FORWARD or name in BACKWARD:
        failing.add(name)
    else:  # when the running statistics of the first layer have moved
        start, calls = launch._execute, []

        def execute(kernel, *arguments):
            calls.append(kernel.__name__)
            if calls.count("conv_forward_kernel") == 2:
                failing.add("conv_forward_kernel")
            return start(kernel, *arguments)

        monkeypatch.setattr(launch, "_execute", execute)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fusedres.backend("vgpu:sm_90"):
            ours = [step(fused, checkpointed=checkpointed) for _ in range(2)]
    for mine in ours:
        assert_same(mine, step(plain, checkpointed=checkpointed))
    told = [str(warning.message) for warning in caught if "fusedres" in str(warning.message)]
    if failing & set(BACKWARD) and not told:
        pytest.skip(f"this step launches no {name}")
    (message,) = told
    assert "could not be started on cpu" in message and "shared memory" in message
    assert (name if failing == {name} else "conv_forward_kernel") in message
    rows = fusedres.report(fused)
    assert all(not row.fused and "could not be started" in row.reason for row in rows)
    # Once the device can, whoever fuses again tries again.
    failing.clear()
    assert all(row.fused for row in fusedres.report(fusedres.fuse(fused)))


def test_inference_is_the_plain_one(failing):
    fused, plain = (model.eval() for model in twins())
    failing.add("conv_bn_act_kernel")
    with torch.no_grad(), fusedres.backend("vgpu:sm_90"), pytest.warns(UserWarning, match="conv_bn_act_kernel"):
        z = fused(torch.ones(X))
    assert relative_error(z, plain(torch.ones(X))) < 1e-5


def test_a_network_goes_on_from_where_its_stem_failed(failing):
    resnet = pytest.importorskip("torchvision").models.resnet
    torch.manual_seed(0)
    plain = randomised(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)).eval()
    fused = fusedres.fuse(copy.deepcopy(plain))
    failing.add("stem_pool_kernel")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), fusedres.backend("vgpu:sm_90"), pytest.warns(UserWarning, match="stem_pool_kernel"):
        z = fused(x)
    assert relative_error(z, plain(x)) < 1e-4
    assert [row.fused for row in fusedres.report(fused)] == [False, True, True, True, True]


def test_strictness_raises(failing, monkeypatch):
    monkeypatch.setattr(switches, "STRICT", True)
    fused, _ = twins()
    failing.add("conv_forward_kernel")
    with fusedres.backend("vgpu:sm_90"), pytest.raises(LaunchFailed, match="conv_forward_kernel could not be started"):
        step(fused)
    assert all(row.fused for row in fusedres.report(fused))


def test_kernels_asked_for_by_name_raise(monkeypatch):
    monkeypatch.setattr("fusedres.runtime.fallback.backends.current", lambda: "triton")
    failure = LaunchFailed("some_kernel", "cuda:0", RuntimeError("no"))
    with pytest.raises(LaunchFailed):
        fallback.give_up(twins()[0][0], failure)


def test_what_the_emulation_sees_in_a_kernel_is_not_forgiven(monkeypatch):
    def execute(kernel, *arguments):
        raise IndexError("out of bounds")

    monkeypatch.setattr(launch, "_execute", execute)
    with fusedres.backend("vgpu:sm_90"), pytest.raises(IndexError):
        step(twins()[0])


def test_switched_off_from_outside(monkeypatch):
    monkeypatch.setattr(switches, "DISABLED", True)
    fused, plain = twins()
    with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
        ours = step(fused)
    assert not trace.launches
    for mine, other in zip(ours, step(plain), strict=True):
        assert torch.equal(mine, other)
    assert {row.reason for row in fusedres.report(fused)} == {"FUSEDRES_DISABLE is set"}
