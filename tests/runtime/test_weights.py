"""fusedres.runtime.weights: every copy is of the weight as it is now, and a network's pass rounds once."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.models import cifar_resnet
from fusedres.runtime.weights import of_network, rounded
from tests.comparison import relative_error
from tests.nn.twins import plain_copy, randomised

BF16 = torch.bfloat16


def weight(*size: int) -> Tensor:
    return torch.randn(size or (8, 4, 3, 3)).contiguous(memory_format=torch.channels_last).requires_grad_()


class Roundings(TorchDispatchMode):
    """How many weights each call rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_copy_.default:
            self.calls.append(len(args[0]))
        elif func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == BF16 and args[0].dim() == 4:
            # Biases of classifiers and images are cast elsewhere.
            self.calls.append(1)
        return func(*args, **(kwargs or {}))


def roundings(call) -> list[int]:
    with Roundings() as seen:
        call()
    return seen.calls


def asked(*weights: Tensor) -> list[int]:
    """What rounding the weights together calls; every copy is checked."""
    with torch.no_grad():
        expected = [one.detach().to(BF16) for one in weights]
    with Roundings() as seen:
        copies = rounded(weights, BF16)
    for made, wanted in zip(copies, expected, strict=True):
        assert torch.equal(made, wanted)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert not made.requires_grad
    return seen.calls


def test_weights_of_a_block_are_rounded_together_in_every_pass():
    weights = [weight(), weight(5, 3, 1, 1), weight(6, 1, 7, 7)]
    for _ in range(3):
        assert asked(*weights) == [3]
        for one in weights:
            one.data.add_(1.0)  # which torch does not count


def test_weights_of_any_layout_come_out_channels_last():
    # Those whose copies have their strides go together.
    assert asked(torch.randn(8, 4, 3, 3), weight(), torch.randn(5, 3, 1, 1)) == [2, 1]


def test_a_weight_of_the_dtype_asked_for_is_itself():
    one, other = weight(), weight().detach().bfloat16()
    copies = rounded([one, other], BF16)
    assert copies[1] is other and copies[0].dtype == BF16


WRITES = {
    "in place": lambda w: w.mul_(2),
    "data replaced": lambda w: setattr(w, "data", torch.randn_like(w)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_weight_written_to_during_its_networks_pass_is_rounded_again(write):
    weights = [weight(), weight(), weight()]
    with of_network(torch.randn(1, 4, 3, 3), BF16, lambda: weights):
        assert asked(weights[0]) == []
        with torch.no_grad():
            write(weights[1])
        assert asked(*weights[1:]) == [1]
    assert asked(*weights) == [3]


def test_a_weight_used_twice_in_a_pass():
    weights = [weight(), weight()]
    with of_network(torch.randn(1, 4, 3, 3), BF16, lambda: weights):
        assert asked(weights[0], weights[1], weights[0]) == []


def test_a_network_inside_another_is_rounded_for_by_the_outer_one():
    weights = [weight(), weight()]
    x = torch.randn(1, 4, 3, 3)
    with of_network(x, BF16, lambda: weights):
        with of_network(x, BF16, lambda: pytest.fail("asked again")):
            assert asked(*weights) == []
        assert asked(*weights) == []


@pytest.mark.parametrize(
    "elsewhere",
    [pytest.param(lambda w: w.double(), id="of another dtype"), pytest.param(lambda w: torch.empty(0), id="sharded")],
)
def test_a_weight_that_can_not_be_rounded_with_the_others_is_left_out(elsewhere):
    first, second, third = weight(), weight(), weight()
    whole = second.data
    second.data = elsewhere(second.data)
    with Roundings() as seen, of_network(torch.randn(1, 4, 3, 3), BF16, lambda: [first, second, third]):
        assert seen.calls == [2]
        second.data = whole
        assert asked(second) == [1]


def test_nothing_is_kept_behind_a_pass():
    weights = [weight(), weight()]
    with of_network(torch.randn(1, 4, 3, 3), BF16, lambda: weights):
        kept = rounded(weights, BF16)
    memory = weakref.ref(kept[0].untyped_storage())
    kept.clear()
    gc.collect()
    assert memory() is None


def test_an_error_in_a_pass_leaves_nothing_behind():
    one = weight()
    with pytest.raises(KeyError), of_network(torch.randn(1, 4, 3, 3), BF16, lambda: [one]):
        raise KeyError
    one.data.add_(1.0)
    assert asked(one) == [1]


def network() -> nn.Module:
    torch.manual_seed(3)
    blocks = [fusedres.nn.BasicBlock(8, 8), fusedres.nn.Bottleneck(8, 2, 2), fusedres.nn.ConvBNAct(8, 8)]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, *, checkpointed: bool = False) -> None:
    z = x
    with torch.autocast("cpu", BF16):
        for block in model:
            z = checkpoint(block, z, use_reentrant=False) if checkpointed else block(z)
    z.float().square().mean().backward()


@pytest.mark.parametrize("schedule", ["auto", "prologue", "moments"])
def test_blocks_on_their_own_round_once_each(schedule):
    model = fusedres.fuse(network(), schedule=schedule)
    seen = roundings(lambda: step(model, torch.randn(2, 8, 6, 6)))
    assert [call for call in seen if call > 1] == [2, 4]


@pytest.mark.parametrize("training", [True, False])
def test_a_network_rounds_once(training):
    model = fusedres.fuse(cifar_resnet(8)).to(memory_format=torch.channels_last).train(training)
    convs = sum(isinstance(part, nn.Conv2d) for part in model.modules())

    def call() -> None:
        with torch.autocast("cpu", BF16), torch.set_grad_enabled(training):
            model(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))

    for _ in range(2):
        assert [seen for seen in roundings(call) if seen > 1] == [convs]


def test_a_hook_may_write_to_what_comes_behind_it():
    model = randomised(cifar_resnet(8)).eval()
    plain = plain_copy(model)

    def scale(stage: nn.Module, _: object, __: object) -> None:
        following[stage].conv1.weight.data.mul_(-1)

    following = {one.layer1: one.layer2[0] for one in (model, plain)}
    for stage in following:
        stage.register_forward_hook(scale)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", BF16), torch.no_grad():
        ours, theirs = model(x), plain(x)
    with torch.autocast("cpu", BF16), torch.no_grad():  # another: PyTorch keeps its casts as long as one lasts
        again = plain(x)  # the hook undoes what it wrote
    assert relative_error(ours, theirs) < 0.3 * relative_error(again, theirs)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_as_with_every_weight_rounded_alone(checkpointed, monkeypatch):
    """Three steps, bit by bit, with and without checkpointing."""
    models = [network() for _ in range(2)]
    x = torch.randn(2, 8, 6, 6)
    for model, alone in zip(models, (False, True), strict=True):
        if alone:
            monkeypatch.setattr(
                "fusedres.patterns.door.rounded",
                lambda weights, dtype: [w.detach().to(dtype, memory_format=torch.channels_last) for w in weights],
            )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            step(model, x, checkpointed=checkpointed)
            optimizer.step()
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_two_models_in_turn():
    """A momentum encoder's weights follow the other's between the two passes, through ``.data``."""
    query, plain = cifar_resnet(8), plain_copy(cifar_resnet(8))
    plain.load_state_dict(query.state_dict())
    key, plain_key = copy.deepcopy(query), copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    outputs: list[list[Tensor]] = [[], []]
    for models, found in (((query, key), outputs[0]), ((plain, plain_key), outputs[1])):
        for _ in range(2):
            with torch.autocast("cpu", BF16):
                found.append(models[0](x))
                for own, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
                    own.data.mul_(0.5).add_(other.data, alpha=0.7)
                with torch.no_grad():
                    found.append(models[1](x))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.detach().abs().max()))
