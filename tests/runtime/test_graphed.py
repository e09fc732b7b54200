"""Steps as CUDA graphs: the bits of the step as it is written, and rules in words where one can not be captured."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn import BasicBlock
from fusedres.runtime.graphed import WARM_UP, NotCapturable, graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "sgd, its rate a tensor": lambda parameters: torch.optim.SGD(
        parameters, torch.tensor(0.1, device="cuda"), momentum=0.9, fused=True
    ),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3, capturable=True),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, 1e-3, capturable=True, fused=True),
}


def network():
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(*stem, BasicBlock(16, 16), *head)


def training(optimizer, *, amp=False):
    """A network on a GPU and a whole step of it: with clipping, GradScaler and a moving average."""
    model = fusedres.fuse(network().cuda().to(memory_format=torch.channels_last))
    average = copy.deepcopy(model)
    chosen = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cuda", enabled=amp)

    def step(images, labels):
        chosen.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.float16, enabled=amp):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(chosen)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(chosen)
        scaler.update()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)
        return loss.detach()

    return model, average, chosen, step


def batches(count=7):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(4, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
        yield images.cuda(), torch.randint(0, 4, (4,), generator=generator).cuda()


def trained(optimizer, *, amp, graph):
    model, average, chosen, step = training(optimizer, amp=amp)
    sample = next(batches())
    call = graphed(step, *sample) if graph else step
    losses = []
    for i, (images, labels) in enumerate(batches()):
        if i == 5:  # a schedule
            for group in chosen.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(0.01)
                else:
                    group["lr"] *= 0.1
        losses.append(call(images, labels).clone())
    return torch.stack(losses), model.state_dict(), average.state_dict(), getattr(call, "captures", 0)


@needs_gpu
@pytest.mark.parametrize(
    ("optimizer", "amp", "captures"),
    [
        ("sgd", False, 2), ("sgd, its rate a tensor", False, 1), ("sgd, its rate a tensor", True, 1),
        ("adamw", False, 2), ("adamw, fused", True, 2),
    ],
)  # fmt: skip
def test_a_graphed_training_has_the_bits_of_one_by_python(optimizer, amp, captures):
    expected, found = (trained(optimizer, amp=amp, graph=graph) for graph in (False, True))
    assert torch.equal(expected[0], found[0])
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert found[3] == captures


@needs_gpu
def test_an_inference_is_graphed_and_sees_new_weights():
    model = fusedres.fuse(network().cuda().eval())
    with torch.no_grad():
        infer = graphed(model, next(batches())[0])
        for images, _ in batches():
            assert torch.equal(infer(images), model(images))
            model[0].weight.mul_(1.1)
    assert infer.captures == 1


@needs_gpu
@pytest.mark.parametrize("what", ["item", "hook", "momentum", "scaler"])
def test_what_may_not_be_inside_is_said(what):
    model, _, _, step = training("sgd", amp=what == "scaler")
    words = {
        "item": "test_graphed.py:.* not permitted when stream is capturing; inside a graphed step nothing may",
        "hook": r"model\.3: its hooks would run once",
        "momentum": r"model\.1: momentum=None",
        "scaler": "test_graphed.py:.*step",
    }

    def looking(images, labels):
        loss = step(images, labels)
        if what == "item":
            loss.item()
        return loss

    if what == "hook":
        model[3].register_forward_hook(lambda *_: None)
    if what == "momentum":
        model[1].momentum = None
    sample = next(batches())
    call = graphed(looking, *sample, warm_up=1)
    call(*sample)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotCapturable, match=words[what]):
        call(*sample)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@needs_gpu
def test_a_batch_of_another_shape_is_refused():
    sample = next(batches())
    call = graphed(lambda images, labels: images.sum(), *sample)
    with pytest.raises(ValueError, match=r"value 0 as \(4, 3, 8, 8\) torch.float32, got \(2, 3, 8, 8\)"):
        call(sample[0][:2], sample[1])
    with pytest.raises(ValueError, match="batch: expected 2 values as in the sample, got 1"):
        call(sample[0])


@pytest.mark.parametrize(
    ("sample", "warm_up", "words"),
    [
        ((torch.zeros(1),), WARM_UP, "sample: expected tensors on one GPU, which has graphs, got cpu"),
        ((1,), WARM_UP, "sample: expected tensors on one GPU, which has graphs, got no tensors"),
        ((torch.zeros(1),), 0, "warm_up: expected at least 1 call, in which kernels are compiled, got 0"),
    ],
)
def test_what_can_not_be_graphed_is_refused(sample, warm_up, words):
    with pytest.raises(ValueError, match=words):
        fusedres.graphed(lambda x: x, *sample, warm_up=warm_up)
