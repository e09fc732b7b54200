"""fusedres.freeze: a copy for inference alone, its batch norms folded once."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedres
from fusedres.models import cifar_resnet, densenet, preact_resnet
from fusedres.nn.fused import Fused
from fusedres.operands import Norm, NormNumbers
from fusedres.patterns import eager
from fusedres.patterns.choose import Choice, listening
from fusedres.swap.swap import Frozen
from tests.comparison import relative_error
from tests.nn.twins import randomised, tensor
from tests.vgpu_support import needs_vgpu

resnet = pytest.importorskip("torchvision").models.resnet
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

MODELS = {
    "basic blocks": lambda: resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=5),
    "bottlenecks": lambda: resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=5),
    "frozen norms": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, norm_layer=FrozenBatchNorm2d),
    "zero-pad shortcuts": lambda: cifar_resnet(8),
    "pre-activation": lambda: preact_resnet(11),
    "dense": lambda: densenet(16, 4),
    "biased convolutions": lambda: nn.Sequential(fusedres.nn.ConvBNAct(3, 4), nn.Conv2d(4, 5, 1)),
}
X = (2, 3, 32, 32)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomised(MODELS[name]()).double()
    if name == "biased convolutions":
        model[0].conv.bias = nn.Parameter(torch.randn(4, dtype=torch.float64))
    return model


def norms(model: nn.Module) -> int:
    return sum(hasattr(module, "running_mean") for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_model_does(name):
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for source in (model, fusedres.fuse(copy.deepcopy(model)), fusedres.unfuse(copy.deepcopy(model))):
        frozen = fusedres.freeze(source)
        with torch.no_grad():
            assert relative_error(frozen(tensor(*X)), source.eval()(tensor(*X))) <= 1e-10
        # Dense layers begin with a batch norm, which has no convolution before it.
        assert norms(frozen) < norms(source) or name == "dense"
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        source.train()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model has changed"


def test_every_batch_norm_of_a_resnet_is_folded_and_every_block_fused():
    frozen = fusedres.freeze(made("bottlenecks"))
    assert norms(frozen) == 0
    assert all(row.fused for row in fusedres.report(frozen))
    assert isinstance(frozen, resnet.ResNet)


def test_training_it_is_refused_and_changes_nothing():
    frozen = fusedres.freeze(made("basic blocks"))
    with pytest.raises(RuntimeError, match=r"train: expected mode=False, got True: .* fusedres\.freeze"):
        frozen.train()
    assert not any(module.training for module in frozen.modules())
    assert frozen.eval() is frozen and frozen.train(False) is frozen


def test_what_is_written_to_the_model_afterwards_is_not_seen():
    model = made("basic blocks")
    frozen = fusedres.freeze(model)
    with torch.no_grad():
        z = frozen(tensor(*X))
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(frozen(tensor(*X)), z)


def test_gradients_of_its_input_come_from_the_plain_modules():
    model = made("basic blocks").eval()
    frozen, grads = fusedres.freeze(model), []
    for one in (model, frozen):
        x = tensor(*X).requires_grad_()
        one(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) <= 1e-9


def test_copied_pickled_unfused_and_frozen_again():
    frozen = fusedres.freeze(made("basic blocks"))
    with torch.no_grad():
        z = frozen(tensor(*X))
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), fusedres.freeze(frozen)):
            assert relative_error(other(tensor(*X)), z) <= 1e-12
            assert isinstance(other, Frozen)
        plain = fusedres.unfuse(copy.deepcopy(frozen))
        assert relative_error(plain(tensor(*X)), z) <= 1e-12
    assert not any(isinstance(module, Fused) for module in plain.modules())
    assert isinstance(plain, Frozen) and isinstance(plain, resnet.ResNet)


def test_parts_that_others_use_too_are_not_folded():
    one, two = fusedres.nn.ConvBNAct(4, 4), fusedres.nn.ConvBNAct(4, 4, stride=2)
    two.conv.weight, two.bn = one.conv.weight, one.bn
    model = randomised(nn.Sequential(one, two)).double().eval()
    frozen = fusedres.freeze(model)
    with torch.no_grad():
        assert relative_error(frozen(tensor(2, 4, 6, 6)), model(tensor(2, 4, 6, 6))) <= 1e-10
    assert norms(frozen) == 1


def test_exported():
    model = made("bottlenecks").float().eval()
    frozen = fusedres.freeze(model)
    program = torch.export.export(frozen, (tensor(*X).float(),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batch_norm" in target for target in targets)
    with torch.no_grad():
        assert relative_error(program.module()(tensor(*X).float()), model(tensor(*X).float())) <= 1e-4


@needs_vgpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_kernels(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = randomised(resnet.BasicBlock(16, 16)).eval()
    stem = randomised(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)).eval()
    for one, x in ((model, torch.randn(1, 16, 6, 6)), (stem, torch.randn(1, 3, 32, 32))):
        exact = copy.deepcopy(one).double()
        eager = copy.deepcopy(one).to(dtype)
        frozen = fusedres.freeze(copy.deepcopy(one).to(dtype))
        with torch.no_grad():
            with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
                z = frozen(x.to(dtype))
            truth = exact(x.to(dtype).double())
            allowed = 1.5 * relative_error(eager(x.to(dtype)), truth)
        assert trace.by_kernel()["conv_bn_act_kernel"] >= 2
        # Folding rounds every weight once, which eager's batch norm does not.
        assert relative_error(z, truth) <= allowed + 2 * torch.finfo(dtype).eps


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fusedres.freeze(3)


@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_eager_pytorch_is_weighed_for_a_frozen_model_too(name):
    model = fusedres.freeze(made(name).float()).to("meta")
    chosen: list[Choice] = []
    with torch.no_grad(), fusedres.record("sm_90"), listening(chosen.append):
        out = model(torch.empty(*X, device="meta"))
    assert out.shape[:2] == (2, 5 if name not in ("zero-pad shortcuts", "pre-activation", "dense") else 10)
    assert chosen and all({"eager", "block_end"} == {*choice.estimates} for choice in chosen)


def test_what_eager_pytorch_does_of_a_folded_norm():
    y = torch.randn(2, 3, 4, 4)
    assert eager.normalised(y, Norm(bias=torch.ones(3), numbers=NormNumbers(batch_stats=False))) is y
