"""fusedres.patterns.inference: eval without gradients is eager's, whatever was written to the model in between."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from tests.comparison import relative_error
from tests.nn.twins import plain_copy, randomised, tensor

TOLERANCE = 1e-5


def image(*size: int, seed: int = 1) -> Tensor:
    return tensor(*size, seed=seed, dtype=torch.float32)


X = (2, 3, 12, 10)


@pytest.fixture
def model() -> nn.Module:
    """One block of every kind, fused, in eval, with the running statistics of real activations."""
    torch.manual_seed(0)
    network = nn.Sequential(
        fusedres.nn.ConvBNAct(3, 8, bias=True),
        fusedres.nn.BasicBlock(8, 8),
        fusedres.nn.BasicBlock(8, 10, 2, shortcut="zero_pad"),
        fusedres.nn.Bottleneck(10, 4),
        fusedres.nn.Bottleneck(16, 4),
        fusedres.nn.ConvBNAct(16, 20, 1, act=None),
    )
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for bn in norms:
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.uniform_(-0.2, 0.5)
            bn.momentum = 0.9
        network(image(8, 3, 12, 10, seed=4))
    return network.eval()


def assert_eager(model: nn.Module, x: Tensor, mode: Callable = torch.no_grad) -> Tensor:
    """The fused model gives what an unfused copy of it, as it is now, gives."""
    with mode():
        z = model(x)
        expected = plain_copy(model)(x)
    assert z.dtype == expected.dtype and z.shape == expected.shape
    assert not z.requires_grad
    assert relative_error(z, expected) <= (TOLERANCE if x.dtype == torch.float32 else 1e-12)
    return z


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_torchvision_at_64_pixels(name, mode):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    network = getattr(models, name)().eval()
    # Running statistics of real activations, so that signals neither die nor grow.
    with torch.no_grad():
        network.train()(image(8, 3, 64, 64))
    x = image(2, 3, 64, 64, seed=2)
    fusedres.fuse(network.eval())
    assert_eager(network, x, mode)
    assert_eager(network, x.contiguous(memory_format=torch.channels_last), mode)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_block(model, mode):
    first = assert_eager(model, image(*X), mode)
    assert torch.equal(first, assert_eager(model, image(*X), mode)), "a warm cache changed the result"


def test_without_a_gradient_asked_for_grad_mode_makes_no_difference(model):
    model.requires_grad_(False)
    assert_eager(model, image(*X), torch.enable_grad)


def test_sizes_and_batches_one_after_the_other(model):
    for size in ((2, 3, 12, 10), (1, 3, 12, 10), (5, 3, 7, 9), (1, 3, 1, 1), (2, 3, 12, 10), (3, 3, 33, 17)):
        assert_eager(model, image(*size))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_agree(model, backend):
    with fusedres.backend(backend):
        assert_eager(model, image(*X))


def bottleneck(model: nn.Module) -> nn.Module:
    return model[3]


def optimizer_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(image(*X, seed=8)).square().mean().backward()
    optimizer.step()
    model.eval()


def optimizer_step_in_eval(model: nn.Module) -> None:
    """Fine-tuning with frozen batch norm never leaves eval."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(image(*X, seed=8)).square().mean().backward()
    optimizer.step()


def fused_optimizer_step_in_eval(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    model(image(*X, seed=8)).square().mean().backward()
    optimizer.step()


def foreach_step_in_eval(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    model(image(*X, seed=8)).square().mean().backward()
    optimizer.step()


def scaled(choose: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        with torch.no_grad():
            choose(model).mul_(1.5)

    return write


def load(model: nn.Module) -> None:
    model.load_state_dict(randomised(plain_copy(model), seed=9).state_dict())


def load_by_assignment(model: nn.Module) -> None:
    model.load_state_dict(randomised(plain_copy(model), seed=9).state_dict(), assign=True)


def through_data(model: nn.Module) -> None:
    """torch does not count writes through ``.data``; a change of mode is where they become visible."""
    bottleneck(model).conv3.weight.data.mul_(1.5)
    bottleneck(model).bn2.running_var.data.mul_(2.0)
    model.eval()


def data_replaced(model: nn.Module) -> None:
    bottleneck(model).conv1.weight.data = torch.randn_like(bottleneck(model).conv1.weight)


def memory_replaced(model: nn.Module) -> None:
    """New memory where the old was, as when weights come back from elsewhere: same address, nothing counted."""
    weight = bottleneck(model).conv1.weight
    new, address = torch.randn_like(weight), weight.data_ptr()
    weight.data = torch.empty(0)
    waiting = []
    for _ in range(100):
        weight.data = torch.empty_like(new)
        if weight.data_ptr() == address:
            break
        waiting.append(weight.data)
    weight.data.copy_(new)


def step_by_hand_in_eval(model: nn.Module) -> None:
    model(image(*X, seed=8)).square().mean().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad


def parameter_replaced(model: nn.Module) -> None:
    block = bottleneck(model)
    block.conv1.weight = nn.Parameter(torch.randn_like(block.conv1.weight))
    block.bn1.weight = nn.Parameter(torch.randn_like(block.bn1.weight))


def gamma_replaced(model: nn.Module) -> None:
    block = bottleneck(model)
    block.bn1.weight = nn.Parameter(torch.randn_like(block.bn1.weight))


def beta_dropped(model: nn.Module) -> None:
    bottleneck(model).bn3.register_parameter("bias", None)


def bias_given(model: nn.Module) -> None:
    bottleneck(model).conv2.bias = nn.Parameter(torch.ones(4))


def stride_changed(model: nn.Module) -> None:
    model[0].conv.stride = (2, 2)


def padding_changed(model: nn.Module) -> None:
    model[0].conv.padding = (2, 2)


def dilation_changed(model: nn.Module) -> None:
    bottleneck(model).conv2.dilation = bottleneck(model).conv2.padding = (2, 2)


def batch_norm_replaced(model: nn.Module) -> None:
    bottleneck(model).bn1 = randomised(nn.BatchNorm2d(4), seed=4).eval()


def statistics_swapped(model: nn.Module) -> None:
    """Two layers of one shape exchange their batch norms."""
    one, two = model[3], model[4]
    one.bn2, two.bn2 = two.bn2, one.bn2


def to_and_fro(model: nn.Module) -> None:
    model.double()
    assert_eager(model, tensor(*X))
    model.float()


def through_bf16(model: nn.Module) -> None:
    model.bfloat16().float()


def to_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def unfused_and_fused(model: nn.Module) -> None:
    fusedres.unfuse(model)
    scaled(lambda m: bottleneck(m).conv1.weight)(model)
    fusedres.fuse(model, schedule="moments")


def trained_statistics(model: nn.Module) -> None:
    with torch.no_grad():
        model.train()(image(*X, seed=8))
    model.eval()


def reset_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def exponential_average(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [torch.randn_like(p) for p in model.parameters()], 0.3)


WRITES = (
    optimizer_step,
    optimizer_step_in_eval,
    fused_optimizer_step_in_eval,
    foreach_step_in_eval,
    load,
    load_by_assignment,
    through_data,
    data_replaced,
    memory_replaced,
    step_by_hand_in_eval,
    parameter_replaced,
    gamma_replaced,
    beta_dropped,
    bias_given,
    stride_changed,
    padding_changed,
    dilation_changed,
    batch_norm_replaced,
    statistics_swapped,
    to_and_fro,
    through_bf16,
    to_channels_last,
    unfused_and_fused,
    trained_statistics,
    reset_statistics,
    exponential_average,
)
PARTS = {
    "weight": lambda model: bottleneck(model).conv3.weight,
    "projection": lambda model: bottleneck(model).downsample[0].weight,
    "gamma": lambda model: bottleneck(model).bn1.weight,
    "beta": lambda model: bottleneck(model).bn3.bias,
    "bias": lambda model: model[0].conv.bias,
    "running mean": lambda model: bottleneck(model).bn2.running_mean,
    "running variance": lambda model: bottleneck(model).downsample[1].running_var,
}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_is_seen_by_the_next_call(model, write, mode):
    before = assert_eager(model, image(*X), mode)
    write(model)
    after = assert_eager(model, image(*X), mode)
    if write not in (to_and_fro, to_channels_last):
        assert before.shape != after.shape or relative_error(after, before) > 1e-3, "the write changed nothing"


@pytest.mark.parametrize("choose", PARTS.values(), ids=PARTS)
def test_a_write_to_any_part_is_seen(model, choose):
    before = assert_eager(model, image(*X))
    scaled(choose)(model)
    assert relative_error(assert_eager(model, image(*X)), before) > 1e-4, "the write changed nothing"


def test_eps_is_read_at_every_call(model):
    before = assert_eager(model, image(*X))
    bottleneck(model).bn2.eps = 0.5
    assert relative_error(assert_eager(model, image(*X)), before) > 1e-4


def test_a_copy_of_a_warm_model_has_weights_of_its_own(model):
    before = assert_eager(model, image(*X))
    twin = copy.deepcopy(model)
    assert torch.equal(assert_eager(twin, image(*X)), before)
    scaled(PARTS["weight"])(twin)
    assert relative_error(assert_eager(twin, image(*X)), before) > 1e-4
    assert torch.equal(assert_eager(model, image(*X)), before)


def test_training_between_inferences(model):
    """Train, evaluate, train: as a training loop does it."""
    plain = plain_copy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, plain)]
    for epoch in range(3):
        for network, optimizer in zip((model, plain), optimizers, strict=True):
            network.train()
            optimizer.zero_grad()
            network(image(*X, seed=epoch)).square().mean().backward()
            optimizer.step()
            network.eval()
        with torch.no_grad():
            assert relative_error(model(image(*X)), plain(image(*X))) <= 1e-4
        assert_eager(model, image(*X))


def test_weights_shared_between_layers_with_different_batch_norms():
    one, two = fusedres.nn.ConvBNAct(4, 4), fusedres.nn.ConvBNAct(4, 4)
    randomised(one, seed=1), randomised(two, seed=2)
    two.conv.weight = one.conv.weight
    model = nn.Sequential(one, two).eval()
    for _ in range(2):
        assert_eager(model, image(2, 4, 5, 6))


def test_one_convolution_at_two_strides():
    one, two = fusedres.nn.ConvBNAct(4, 4), fusedres.nn.ConvBNAct(4, 4, stride=2)
    two.conv.weight, two.bn = one.conv.weight, one.bn
    model = nn.Sequential(one, two).eval()
    for _ in range(2):
        assert_eager(model, image(2, 4, 5, 6))


def test_a_model_born_in_inference_mode():
    with torch.inference_mode():
        model = randomised(fusedres.nn.Bottleneck(3, 4)).eval()
        before = assert_eager(model, image(*X), torch.inference_mode)
        model.conv3.weight.mul_(1.5)
        assert relative_error(assert_eager(model, image(*X), torch.inference_mode), before) > 1e-4


def test_nothing_is_kept_of_a_model_that_is_gone(model):
    gone = copy.deepcopy(model)
    assert_eager(gone, image(*X))
    dead = [weakref.ref(parameter) for parameter in gone.parameters()]
    del gone
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(model, dtype):
    model.to(dtype)
    x = image(*X).to(dtype)
    with torch.no_grad():
        z, eager = model(x), plain_copy(model)(x)
        exact = plain_copy(model).double()(x.double())
    assert z.dtype == dtype
    floor = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert relative_error(z, exact) <= max(1.5 * relative_error(eager, exact), floor)


def test_autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z, eager = model(image(*X)), plain_copy(model)(image(*X))
    with torch.no_grad():
        exact = plain_copy(model)(image(*X))
        assert relative_error(z, exact) <= max(1.5 * relative_error(eager, exact), 2**-8)
        assert z.dtype == eager.dtype
        assert_eager(model, image(*X))


def test_nan_weights_show():
    model = fusedres.nn.ConvBNAct(3, 4).eval()
    with torch.no_grad():
        model.conv.weight[0] = float("nan")
        z = model(image(*X))
    assert z[:, 0].isnan().all() and not z[:, 1:].isnan().any()


def test_the_input_is_not_written_to(model):
    x = image(*X).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    assert_eager(model, x)
    y = torch.relu(image(2, 16, 6, 5)).contiguous(memory_format=torch.channels_last)
    kept_y = y.clone()
    assert_eager(model[4], y)
    assert torch.equal(x, kept) and torch.equal(y, kept_y)


def test_under_autocast_weights_are_rounded_in_every_pass():
    """What is written through ``.data`` between two passes is not counted by torch, and seen."""
    block = randomised(fusedres.nn.BasicBlock(8, 8), seed=2).eval()
    x, outputs = image(2, 8, 6, 6), []
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append((block(x), plain_copy(block)(x)))
        block.conv1.weight.data.mul_(2)
    for ours, theirs in outputs:
        assert relative_error(ours, theirs) < 2**-7
    assert relative_error(outputs[1][0], outputs[0][0]) > 2**-6
