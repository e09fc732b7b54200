"""fusedres.rounded: every copy is of the weight as it is, and a pass over a model rounds once."""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import rounded as module
from fusedres.rounded import rounded
from fusedres.writes import count_backward

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_groups(monkeypatch):
    monkeypatch.setattr(module, "_groups", {})


def weight(*size: int, requires_grad: bool = True) -> Tensor:
    drawn = torch.randn(size or (8, 4, 3, 3)).contiguous(memory_format=torch.channels_last)
    return drawn.requires_grad_(requires_grad)


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
    """What rounding the weights in this order calls; every copy is checked."""

    with torch.no_grad():
        expected = [one.detach().to(BF16) for one in weights]
    with Roundings() as seen:
        copies = [rounded(one, BF16) for one in weights]
    for made, wanted in zip(copies, expected, strict=True):
        assert torch.equal(made, wanted)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert not made.requires_grad
    return seen.calls


def test_the_first_pass_rounds_one_by_one_and_every_later_one_at_once():
    weights = [weight(), weight(5, 3, 1, 1), weight(6, 1, 7, 7)]
    assert asked(*weights) == [1, 1, 1]
    for _ in range(3):
        assert asked(*weights) == [3]


def test_weights_of_any_layout_come_out_channels_last():
    weights = [torch.randn(8, 4, 3, 3).requires_grad_(), weight(), torch.randn(5, 3, 1, 1).requires_grad_()]
    assert asked(*weights) == [1, 1, 1]
    # Those whose copies have their strides go together.
    assert asked(*weights) == [2, 1]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda w: w.mul_(2), id="in place"),
        pytest.param(lambda w: setattr(w, "data", torch.randn_like(w)), id="data replaced"),
        pytest.param(lambda w: (count_backward(), w.data.mul_(2)), id="through data after a backward pass"),
    ],
)
def test_a_weight_written_to_while_its_copy_waits_is_rounded_again(write):
    first, second, third = weight(), weight(), weight()
    assert asked(first, second, third) == [1, 1, 1]
    assert asked(first) == [3]
    with torch.no_grad():
        write(second)
    asked(second, third)
    assert asked(first, second, third) == [3]


def test_a_fused_optimizer_is_noticed():
    """It writes without moving the counters that torch keeps of writes."""
    first, second = weight(), weight()
    asked(first, second)
    asked(first)
    first.grad = second.grad = torch.ones_like(first)
    torch.optim.SGD([first, second], lr=1.0, fused=True).step()
    assert asked(second) == [1]


def test_what_is_written_through_data_between_passes_is_seen():
    weights = [weight(), weight()]
    asked(*weights)
    for _ in range(3):
        asked(*weights)
        for one in weights:
            one.data.add_(1.0)


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 1), (1, 1, 0)], ids=str)
def test_a_weight_used_twice_in_a_pass(order):
    weights = [weight(), weight()]
    for _ in range(2):
        asked(*(weights[i] for i in order))
    for _ in range(3):
        assert sum(asked(*(weights[i] for i in order))) <= 4


def test_layers_that_are_left_out_are_rounded_no_more():
    weights = [weight() for _ in range(4)]
    asked(*weights)
    assert asked(*weights) == [4]
    asked(*weights[:2])
    assert asked(*weights[:2]) == [2]
    assert asked(*weights) == [2, 1, 1]
    assert asked(*weights) == [4]


@pytest.mark.parametrize(
    "elsewhere",
    [
        pytest.param(lambda w: w.data.double(), id="of another dtype"),
        pytest.param(lambda w: torch.empty(0), id="sharded away"),
    ],
)
def test_a_weight_that_was_moved_meanwhile_is_not_rounded_with_the_others(elsewhere):
    first, second, third = weight(), weight(), weight()
    asked(first, second, third)
    kept = second.data
    second.data = elsewhere(second)
    assert asked(first, third) == [2]
    second.data = kept
    assert asked(second) == [1]


def test_two_models_that_take_turns():
    one, two = [weight(), weight()], [weight(), weight()]
    asked(*one)
    asked(*two)
    for _ in range(3):
        assert asked(*one, *two) == [4]
    for _ in range(2):
        asked(*one)
    assert asked(*one) == [2]


def test_weights_without_gradients_are_rounded_where_they_are_used():
    """A teacher's weights are written through ``.data``, possibly between two forward passes."""
    trained, teacher = weight(), weight(requires_grad=False)
    for _ in range(3):
        asked(trained)
        teacher.data.add_(1.0)
        assert asked(teacher) == [1]
    with torch.no_grad():
        assert asked(trained) == [1]


def test_another_tensor_in_the_place_of_one_that_is_gone():
    first = weight()
    for _ in range(20):
        second = weight()  # freed without the garbage collector, so that the next one may have its address
        asked(first, second)
        asked(first)
        del second
        asked(weight())


def test_any_order_of_questions_and_writes():
    draw = random.Random(7)
    weights = [weight(4, 2, 1, 1) for _ in range(5)]
    for _ in range(300):
        action = draw.randrange(6)
        chosen = draw.choice(weights)
        if action == 0:
            count_backward()
            chosen.data.mul_(1.5)
        elif action == 1:
            with torch.no_grad():
                chosen.add_(1.0)
        elif action == 2:
            chosen.data = torch.randn_like(chosen)
        elif action == 3:
            weights[draw.randrange(5)] = weight(4, 2, 1, 1)
        else:
            asked(*draw.sample(weights, draw.randint(1, 5)), *draw.sample(weights, 1))


def test_nothing_is_kept_of_weights_that_are_gone():
    weights = [weight(), weight()]
    asked(*weights)
    kept = [rounded(one, BF16) for one in weights]
    memory = weakref.ref(kept[0].untyped_storage())
    dead = weakref.ref(weights[1])
    del weights, kept
    gc.collect()
    assert dead() is None
    assert memory() is None


def network() -> nn.Module:
    torch.manual_seed(3)
    # With 2 to 6 input channels oneDNN's fp32 weight gradient of a strided 1x1 convolution, the projection's here,
    # writes beyond its memory (PyTorch 2.11 and 2.14): processes ended in a later free().
    blocks = [fusedres.nn.BasicBlock(8, 8), fusedres.nn.Bottleneck(8, 2, 2), fusedres.nn.ConvBNAct(8, 8)]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, *, checkpointed: bool = False) -> None:
    z = x
    with torch.autocast("cpu", BF16):
        for block in model:
            z = checkpoint(block, z, use_reentrant=False) if checkpointed else block(z)
    z.float().square().mean().backward()


@pytest.mark.parametrize("schedule", ["auto", "prologue", "moments"])
def test_a_training_step_rounds_once(schedule):
    model = fusedres.fuse(network(), schedule=schedule)
    x = torch.randn(2, 8, 6, 6)
    weights = sum(isinstance(part, nn.Conv2d) for part in model.modules())
    step(model, x)
    seen = roundings(lambda: step(model, x))
    assert seen.count(weights) == 1
    assert len([call for call in seen if call > 1]) == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_as_with_every_weight_rounded_alone(checkpointed, monkeypatch):
    """Three steps, bit by bit, with and without checkpointing."""
    models = [network() for _ in range(2)]
    x = torch.randn(2, 8, 6, 6)
    for model, alone in zip(models, (False, True), strict=True):
        if alone:
            monkeypatch.setattr("fusedres.chain.rounded", module._alone)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            step(model, x, checkpointed=checkpointed)
            optimizer.step()
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_copy_of_a_model_trains_on_its_own_weights():
    model, x = network(), torch.randn(2, 8, 6, 6)
    step(model, x)
    step(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    model.zero_grad()
    twin.zero_grad()
    step(model, x)
    step(twin, x)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert not torch.equal(ours.grad, theirs.grad)
