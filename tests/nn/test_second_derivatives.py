"""Gradient penalties, Hessian-vector products and MAML through fused modules, against their plain twins in fp64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hvp, jacobian
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import nn as fnn
from fusedres.patterns.choose import AUTO
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import plain_copy, randomised, tensor

# A block of each kind and the size of its input.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv, bn, act": (lambda: fnn.ConvBNAct(4, 6, bias=True), (3, 4, 5, 6)),
    "basic, identity": (lambda: fnn.BasicBlock(6, 6), (3, 6, 5, 4)),
    "basic, zero-pad": (lambda: fnn.BasicBlock(6, 9, 2, shortcut="zero_pad"), (3, 6, 5, 4)),
    "bottleneck, identity": (lambda: fnn.Bottleneck(16, 4), (3, 16, 4, 5)),
    "bottleneck, projection": (lambda: fnn.Bottleneck(6, 4, 2), (3, 6, 5, 6)),
    "pre-activation, identity": (lambda: fnn.PreActBasicBlock(6, 6), (3, 6, 5, 4)),
    "pre-activation, projection": (lambda: fnn.PreActBottleneck(6, 4, 2), (3, 6, 5, 6)),
    "pre-activation, activated before": (lambda: fnn.PreActBasicBlock(6, 9, 2, shortcut="zero_pad", preact=False),
                                         (3, 6, 5, 4)),
    "batch norm and ReLU": (lambda: fnn.BNAct(6), (3, 6, 4, 5)),
    "dense": (lambda: fnn.DenseBlock(3, 5, 3), (3, 5, 4, 5)),
    "dense, without bottlenecks": (lambda: fnn.DenseBlock(2, 5, 3, bottleneck=None), (3, 5, 4, 5)),
    "transition": (lambda: fnn.Transition(6, 4), (3, 6, 6, 4)),
    "scaled": (lambda: fnn.ScaledBlock(6, 6), (3, 6, 5, 4)),
    "ReLU before the sum": (lambda: fnn.ActivationBasicBlock(6, 6, order="relu_before_add"), (3, 6, 5, 4)),
    "batch norm after the sum": (lambda: fnn.ActivationBasicBlock(6, 6, order="bn_after_add"), (3, 6, 5, 4)),
}  # fmt: skip
blocks = pytest.mark.parametrize("block", BLOCKS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def twins(block: str, schedule: str = AUTO, training: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """Fused, plain, and an input."""
    make, size = BLOCKS[block]
    torch.manual_seed(0)
    fused = fusedres.fuse(randomised(make().double()), schedule=schedule).train(training)
    assert fusedres.report(fused)[0].fused
    return fused, plain_copy(fused), tensor(*size)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """One that vanishes but for rounding is measured against the largest."""
    assert ours.keys() == theirs.keys()
    largest = max(float(exact.norm()) for exact in theirs.values())
    for name, exact in theirs.items():
        error = relative_error(ours[name], exact, max(float(exact.norm()), 1e-3 * largest))
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def penalised(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """The gradients of a critic's loss with a gradient penalty, as in Gulrajani et al. 2017."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    z = (run or model)(x).to(x.dtype)
    loss = (z * tensor(*z.shape).to(z)).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + (dx.flatten(1).norm(dim=1) - 1).square().sum()).backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@blocks
@modes
def test_gradient_penalties(block, training, each_backend):
    fused, plain, x = twins(block, training=training)
    assert_same(penalised(fused, x), penalised(plain, x))


@blocks
def test_running_statistics_and_counters_move_once(block):
    fused, plain, x = twins(block)
    penalised(fused, x)
    with torch.no_grad():
        plain(x)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert relative_error(ours, theirs) <= 1e-12, name


@pytest.mark.parametrize("schedule", ["stats", "prologue", "moments"])
@pytest.mark.parametrize("block", ["basic, zero-pad", "bottleneck, identity", "bottleneck, projection",
                                   "pre-activation, identity", "pre-activation, projection", "dense"])  # fmt: skip
def test_gradient_penalties_on_every_schedule(block, schedule):
    fused, plain, x = twins(block, schedule)
    assert_same(penalised(fused, x), penalised(plain, x))


@blocks
@modes
def test_hessian_vector_products(block, training):
    """In the input, and in all parameters at once."""
    fused, plain, x = twins(block, training=training)
    found = []
    for model in (fused, plain):
        _, in_x = hvp(lambda at, model=model: model(at).pow(3).sum(), x, tensor(*x.shape, seed=5))
        names, values = zip(*model.named_parameters(), strict=True)

        def loss(*parameters, model=model, names=names):
            return functional_call(model, dict(zip(names, parameters, strict=True)), (x,)).pow(3).sum()

        _, products = hvp(loss, tuple(p.detach() for p in values), tuple(tensor(*p.shape) for p in values))
        found.append({"x": in_x, **dict(zip(names, products, strict=True))})
    assert_same(*found)


@pytest.mark.parametrize("block", ["basic, zero-pad", "bottleneck, projection", "pre-activation, identity", "dense"])
def test_learning_to_learn(block):
    """Two inner steps of MAML (Finn et al. 2017), then the gradient of a loss in the parameters before them."""
    fused, plain, x = twins(block)
    found = []
    for model in (fused, plain):
        parameters = dict(model.named_parameters())
        adapted = parameters
        for seed in range(2):
            loss = functional_call(model, adapted, (tensor(*x.shape, seed=seed),)).square().mean()
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            steps = zip(adapted.items(), grads, strict=True)
            adapted = {name: parameter - 0.05 * grad for (name, parameter), grad in steps}
        functional_call(model, adapted, (x,)).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in parameters.items()})
    assert_same(*found)


@pytest.mark.parametrize("block", ["basic, identity", "bottleneck, projection", "pre-activation, identity", "dense",
                                   "ReLU before the sum"])  # fmt: skip
@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians(block, vectorize):
    fused, plain, x = twins(block)
    x = x[:2, :, :2, :2]
    jacobians = [
        jacobian(lambda at, model=model: model(at).sum((2, 3)), x, vectorize=vectorize) for model in (fused, plain)
    ]
    assert relative_error(*jacobians) <= 1e-10


@pytest.mark.parametrize("block", ["bottleneck, projection", "dense"])
def test_checkpoints_and_memory_elsewhere(block):
    fused, plain, x = twins(block)

    def elsewhere(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return fused(x)

    for run in (lambda x: checkpoint(fused, x, use_reentrant=False), elsewhere):
        assert_same(penalised(fused, x, run), penalised(plain, x))


@pytest.mark.parametrize("frozen", ["conv", "bn", "weight"])
@pytest.mark.parametrize("block", ["bottleneck, projection", "pre-activation, identity", "dense"])
def test_parameters_that_take_no_gradient(block, frozen):
    fused, plain, x = twins(block)
    found = []
    for model in (fused, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        grads = penalised(model, x)
        found.append({name: grad for name, grad in grads.items() if grad is not None})
    assert_same(*found)


def test_an_image_without_gradient():
    """The squared norm of the parameters' gradient as a penalty."""
    fused, plain, x = twins("bottleneck, projection")
    found = []
    for model in (fused, plain):
        grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same(*found)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block", ["basic, identity", "bottleneck, projection", "pre-activation, identity"])
def test_low_precision(block, autocast):
    """No further from fp64 than eager PyTorch in the same precision, all parameters together.

    Betas of 6 keep ReLUs open: one that flips within rounding is an error of its own, in eager PyTorch too.
    """
    exact, plain, x = twins(block)
    for model in (exact, plain):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 6.0)
                nn.init.constant_(module.weight, 0.7)
    truth = penalised(plain, x)
    plain, fused = plain.float(), fusedres.fuse(copy.deepcopy(plain).float())
    found = []
    for model in (fused, plain):

        def run(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(x)

        found.append(penalised(model, x.float(), run))
    whole = [torch.cat([grad.flatten() for grad in run.values()]) for run in (*found, truth)]
    # In fp32 the library accumulates statistics in fp64; a formula of elementary operations rounds each of them.
    assert_as_accurate_as_eager(*whole, floor=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("family", ["resnet18", "resnet50", "densenet121"])
@modes
def test_whole_networks(family, training):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    plain = getattr(models, family)(num_classes=4).double().train(training)
    fused = fusedres.fuse(copy.deepcopy(plain))
    x = tensor(4, 3, 32, 32)
    # Dozens of batch norms over four pixels each make more of rounding than one does.
    assert_same(penalised(fused, x), penalised(plain, x), 1e-7)
