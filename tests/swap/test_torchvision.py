"""fusedres.swap.families.torchvision: the ResNet family as it is used: traced, compiled, checkpointed, dissected."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from tests.comparison import relative_error
from tests.nn.twins import assert_twins, assert_unchanged, plain_copy, randomised, run, snapshot, tensor

models = pytest.importorskip("torchvision").models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

IMAGES = (4, 3, 32, 32)

BLOCKS = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnext50_32x4d": 16,
    "resnext101_32x8d": 33,
    "resnext101_64x4d": 33,
    "wide_resnet50_2": 16,
    "wide_resnet101_2": 33,
}


@pytest.mark.parametrize(("name", "blocks"), BLOCKS.items(), ids=BLOCKS)
def test_every_block_and_the_stem_are_fused(name, blocks):
    with torch.device("meta"):
        model = getattr(models, name)()
    classes = [type(module) for module in model.modules()]
    tensors = dict(model.state_dict(keep_vars=True))
    report = fusedres.report(fusedres.fuse(model))
    assert [row.fused for row in report] == [True] * (blocks + 1)
    assert [row.kind for row in report].count("ResNet stem") == 1
    state = model.state_dict(keep_vars=True)
    assert list(state) == list(tensors)
    assert all(value is tensors[key] for key, value in state.items())
    assert isinstance(model, models.ResNet)
    assert [type(module) for module in fusedres.unfuse(model).modules()] == classes


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_forward_and_backward_pass_has_the_shapes_of_eagers(name):
    with torch.device("meta"):
        model = fusedres.fuse(getattr(models, name)(num_classes=7), schedule="moments")
        logits = model(torch.empty(2, 3, 64, 64))
        logits.sum().backward()
    assert logits.shape == (2, 7)
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_real_weights_survive_bit_for_bit(name):
    torch.manual_seed(0)
    model = randomised(getattr(models, name)(num_classes=7))
    before = snapshot(model)
    state = copy.deepcopy(model.state_dict())
    fusedres.fuse(model)
    assert_unchanged(model, before)
    fusedres.unfuse(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("resnet18", "auto"),
        ("resnet50", "moments"),
        ("resnext50_32x4d", "auto"),
        ("wide_resnet50_2", "stats"),
    ],
)
def test_evaluated_from_running_statistics(name, schedule):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=7).eval()
    x = tensor(2, 3, 32, 32, dtype=torch.float32)
    expected = model(x)
    fusedres.fuse(model, schedule=schedule)
    assert relative_error(model(x), expected) <= 1e-5
    with torch.no_grad():
        assert relative_error(model(x), expected) <= 1e-5


@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("dilated", [False, True])
def test_options_of_the_constructor(zero_init, dilated):
    """gamma = 0 behind every block at the start, and dilation in place of stride (as for segmentation)."""
    torch.manual_seed(0)
    model = models.resnet.ResNet(
        models.resnet.Bottleneck,
        [1, 2, 1, 1],
        num_classes=5,
        zero_init_residual=zero_init,
        replace_stride_with_dilation=[dilated, dilated, False],
    ).double()
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(1024, 5).double()
    plain = copy.deepcopy(model)
    assert all(row.fused for row in fusedres.report(fusedres.fuse(model)))
    assert_twins(model, plain, tensor(*IMAGES), tolerance=1e-8)


@pytest.fixture(params=["train", "eval"])
def pair(request, resnet):
    """A fused model and its plain twin."""
    randomised(resnet).train(request.param == "train")
    return fusedres.fuse(resnet), plain_copy(resnet)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_jit(pair):
    fused, plain = pair
    traced = torch.jit.trace(copy.deepcopy(fused), tensor(*IMAGES), check_trace=False)
    expected = torch.jit.trace(copy.deepcopy(plain), tensor(*IMAGES), check_trace=False)
    assert relative_error(traced(tensor(*IMAGES, seed=2)), expected(tensor(*IMAGES, seed=2))) <= 1e-10
    if not plain.training:
        assert relative_error(traced(tensor(*IMAGES, seed=2)), plain(tensor(*IMAGES, seed=2))) <= 1e-10


def test_traced_by_fx(pair):
    fused, plain = pair
    graph = torch.fx.symbolic_trace(fused)
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert nodes == [node.target for node in torch.fx.symbolic_trace(plain).graph.nodes if node.op == "call_module"]
    assert "layer1.0.conv1" in nodes and "layer1.0.downsample.1" in nodes
    assert_twins(graph, plain, tensor(*IMAGES), tolerance=1e-8)


def test_dissected_by_a_feature_extractor(pair):
    fused, plain = pair
    assert get_graph_node_names(fused) == get_graph_node_names(plain)
    wanted = ["relu", "layer1.0.conv2", "layer1.0.add", "layer2", "fc"]
    ours = create_feature_extractor(fused, wanted)(tensor(*IMAGES))
    theirs = create_feature_extractor(plain, wanted)(tensor(*IMAGES))
    assert list(ours) == wanted
    assert all(relative_error(ours[name], theirs[name]) <= 1e-10 for name in wanted)


def test_compiled(pair):
    fused, plain = pair
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    actual, expected = run(compiled, tensor(*IMAGES)), run(plain, tensor(*IMAGES))
    assert relative_error(actual.z, expected.z) <= 1e-10
    assert relative_error(actual.dx, expected.dx) <= 1e-8
    for name, ours in fused.named_buffers():
        assert relative_error(ours, dict(plain.named_buffers())[name]) <= 1e-10, name
    torch._dynamo.reset()


def test_exported(resnet):
    fused = fusedres.fuse(randomised(resnet)).eval()
    program = torch.export.export(fused, (tensor(*IMAGES),))
    assert relative_error(program.module()(tensor(*IMAGES, seed=2)), fused(tensor(*IMAGES, seed=2))) <= 1e-10


@pytest.mark.parametrize("schedule", ["auto", "moments"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(resnet, reentrant, schedule):
    """Blocks run twice: gradients stay; statistics move twice, as they do in eager."""

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            model = self.model
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            for stage in (model.layer1, model.layer2):
                x = checkpoint(stage, x, use_reentrant=reentrant)
            return x

    plain = copy.deepcopy(randomised(resnet))
    fusedres.fuse(resnet, schedule=schedule)
    assert_twins(Checkpointed(resnet), Checkpointed(plain), tensor(*IMAGES), tolerance=1e-8)


def test_weights_shared_by_an_average_of_models(resnet):
    """Averaging copies the model whole and writes to the copy's parameters in place."""
    fused, plain = fusedres.fuse(randomised(resnet)).eval(), plain_copy(resnet).eval()
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (fused, plain)]
    for seed in (1, 2):
        for model, average in zip((fused, plain), averages, strict=True):
            average(tensor(*IMAGES))
            randomised(model, seed=seed)
            average.update_parameters(model)
    with torch.no_grad():
        assert relative_error(averages[0](tensor(*IMAGES)), averages[1](tensor(*IMAGES))) <= 1e-10


def test_parameters_as_arguments(resnet):
    """``torch.func.functional_call`` puts other tensors in the parameters' places for one call."""
    fused, plain = fusedres.fuse(resnet), plain_copy(resnet)
    state = {name: value.detach().clone() for name, value in randomised(plain_copy(resnet), 3).state_dict().items()}
    for training in (True, False):
        ours, theirs = (
            torch.func.functional_call(model.train(training), {k: v.clone() for k, v in state.items()}, tensor(*IMAGES))
            for model in (fused, plain)
        )
        assert relative_error(ours, theirs) <= 1e-10
