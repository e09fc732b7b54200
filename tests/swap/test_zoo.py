"""Every family of torchvision and timm: a step and an evaluation in fp32, fused beside eager and fp64.

Every channel is open, so that no ReLU flips for rounding: where some do, the gradients of two eager networks in other
memory formats are as far from each other as either is from fp64, and which is closer is drawn by chance.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from tests.comparison import relative_error
from tests.swap.accounts import norms_left, tensors
from tests.zoo.libraries import needs_no_onednn, network, opened
from tests.zoo.names import AS_THEY_COME, LARGER, QUICK, SLOW

NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


class Step(NamedTuple):
    """What a training step leaves; ``z`` is all outputs as one vector."""

    z: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def gradient(self) -> Tensor:
        return joined(self.gradients.values())


def joined(output: object) -> Tensor:
    return torch.cat([one.double().flatten() for one in tensors(output if isinstance(output, dict) else list(output))])


def images(px: int, seed: int) -> Tensor:
    """Of coarse patches: means over pixels differ from image to image, so that batch norms of few pixels have variances
    to divide by."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(3, 3, size, size, generator=generator) for size in (4, px))
    x = F.interpolate(3 * coarse, size=(px, px)) + fine
    return x.contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor) -> Step:
    """The loss weighs all outputs at random; dropout draws the same in every model."""
    torch.manual_seed(1)
    z = list(tensors(model.train()(x)))
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    sum((torch.randn(one.shape, generator=generator).to(one) * one).mean() for one in z).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Step(joined(z).detach(), gradients, buffers)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    return joined(tensors(model.eval()(x))).detach()


def channels_last(model: nn.Module) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradient_errors(*of: Step) -> list[float]:
    """Of the gradient of the whole network, against the last of these, relative in norm."""
    return [relative_error(one.gradient, of[-1].gradient) for one in of[:-1]]


def fused_copy(model: nn.Module) -> nn.Module:
    """Its classes change, and nothing else."""
    fused = copy.deepcopy(model)
    classes, state = [type(part) for part in fused.modules()], fused.state_dict(keep_vars=True)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    fusedres.fuse(fused)
    assert len(norms_left(fused)) < norms, "nothing is fused"
    now = fused.state_dict(keep_vars=True)
    assert list(now) == list(state) and all(now[key] is state[key] for key in state)
    assert all(isinstance(part, cls) for part, cls in zip(fused.modules(), classes, strict=True))
    return fused


def assert_same_buffers(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Relative in norm, means of a batch norm to its deviations."""
    assert ours.keys() == eager.keys()
    for key, buffer in eager.items():
        deviation = eager[key.replace("running_mean", "running_var")].double().abs().sqrt()
        scale = float(deviation.norm()) if key.endswith("running_mean") else None
        if buffer.is_floating_point():
            assert relative_error(ours[key], buffer, scale) <= 1e-4, key
        else:
            assert torch.equal(ours[key], buffer), key


# In fp32; less is nobody's error.
FLOOR = 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_step_and_an_evaluation_and_the_way_back(name, monkeypatch):
    px = LARGER.get(name, 64)
    model = channels_last(network(name, px) if name in AS_THEY_COME else opened(network(name, px)))
    fused, exact = fused_copy(model), copy.deepcopy(model).double()
    if needs_no_onednn(model):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)

    def steps(seed: int) -> list[Step]:
        x = images(px, seed)
        return [step(fused, x), step(model, x), step(exact, x.double())]

    ours, eager, of_fp64 = steps(0)
    assert relative_error(ours.z, eager.z) <= 1e-4
    assert_same_buffers(ours.buffers, eager.buffers)
    assert ours.gradients.keys() == eager.gradients.keys()
    errors = [gradient_errors(ours, eager, of_fp64)]
    # One channel of small variance can hold half of the error of a batch: then others are asked, too.
    for seed in range(1, 4) if errors[0][0] > max(1.5 * errors[0][1], FLOOR) else ():
        errors.append(gradient_errors(*steps(seed)))
    mine, theirs = (rms(list(of)) for of in zip(*errors, strict=True))
    assert mine <= max(1.5 * theirs, FLOOR), f"{mine:.1e}, eager's is {theirs:.1e}"

    x = images(px, 0)
    fused.load_state_dict(model.state_dict())
    # With gradients: without them "auto" evaluates by the plain modules.
    expected = evaluated(model, x)
    assert relative_error(evaluated(fused, x), expected) <= 1e-4
    fusedres.unfuse(fused)
    assert [type(part) for part in fused.modules()] == [type(part) for part in model.modules()]
    assert torch.equal(evaluated(fused, x), expected)
