"""A structure is trusted after its passes have agreed with the plain forward: what is planted is found."""

import statistics
import time

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.nn import proof, steps, structure, structured
from tests.nn.twins import assert_unchanged, randomised, snapshot


class Between(nn.Module):
    """Chains with something between them, a shortcut, and a lone batch norm."""

    def __init__(self, channels: int = 8, *, wide: bool = False) -> None:
        super().__init__()
        inner = 512 if wide else channels
        self.first = nn.Sequential(nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.SiLU())
        self.gate = nn.Conv2d(inner, inner, 1)
        self.last = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        z = self.first(x)
        z = z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        return torch.relu(self.norm(torch.relu(self.last(z) + x)))


@pytest.fixture(autouse=True)
def _unknown(monkeypatch):
    """Nothing is known from tests before."""
    monkeypatch.setattr(structure, "_known", {})
    monkeypatch.setattr(proof, "_trusted", set())
    yield


def refusal(module):
    """Why it was left alone, of a plain module that was given to `fuse`."""
    with pytest.raises(structured.NotFusable) as why:
        structured.taken_apart(module, None)
    return str(why.value)


def scaled_output(run):
    return lambda *args, **kwargs: run(*args, **kwargs) * (1 + 1e-7)


def scaled_gradient(run):
    def scaled(*args, **kwargs):
        z = run(*args, **kwargs)
        return z if not z.requires_grad else z * (1 + 1e-7) - z.detach() * 1e-7

    return scaled


def unmeasured(run):
    """Running statistics stay as they were."""

    def run_without(x, layers, **kwargs):
        kept = [layer._replace(norm=layer.norm._replace(running_mean=None, running_var=None)) for layer in layers]
        measured = all(layer.norm.numbers.batch_stats for layer in layers)
        return run(x, kept if measured else layers, **kwargs)

    return run_without


@pytest.mark.parametrize("wide", [False, True], ids=["as a whole", "pass by pass"])
@pytest.mark.parametrize(
    ("function", "fault", "where"),
    [
        ("run_chain", scaled_output, "output 0 by"),
        ("run_chain", scaled_gradient, "the gradient of"),
        ("run_chain", unmeasured, "running_mean by"),
        ("run_bn_act", scaled_output, "output 0 by"),
        ("run_bn_act", scaled_gradient, "the gradient of"),
    ],
)
def test_a_planted_fault_is_found(function, fault, where, wide, monkeypatch):
    block = randomised(Between(wide=wide))
    structured.taken_apart(block, None)  # is trusted without the fault
    monkeypatch.setattr(structure, "_known", {})
    monkeypatch.setattr(proof, "_trusted", set())
    monkeypatch.setattr(steps, function, fault(getattr(steps, function)))
    reason = refusal(block)
    assert reason.startswith("its fused form differs in fp64: ") and where in reason
    # In evaluation nothing is measured.
    assert isinstance(fusedres.fuse(nn.Sequential(block))[0], structured.FusedStructure) == (fault is unmeasured)


def test_a_pass_that_fails_is_refused(monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("planted")

    monkeypatch.setattr(steps, "run_bn_act", fails)
    assert refusal(Between()) == "its fused form fails on a small input (ValueError: planted)"


def test_what_is_built_alike_is_tried_once(monkeypatch):
    tried = []

    def counted(found, *args):
        tried.append(found)
        return prove(found, *args)

    prove = structured.prove
    monkeypatch.setattr(structured, "prove", counted)
    model = fusedres.fuse(nn.Sequential(Between(8), Between(16), Between(8)))
    assert all(row.fused for row in fusedres.report(model))
    # The block and what it has within, in training and in evaluation.
    assert len(tried) == len({id(found) for found in tried}) == 4
    fusedres.fuse(nn.Sequential(Between(24)))
    assert len(tried) == 4


@pytest.mark.parametrize("wide", [False, True], ids=["as a whole", "pass by pass"])
def test_trying_changes_nothing_and_draws_nothing(wide):
    block = randomised(Between(wide=wide))
    before, drawn = snapshot(block), torch.get_rng_state()
    called = []
    hook = block.gate.register_forward_hook(lambda *shown: called.append(shown))
    structured.taken_apart(block, None)
    assert torch.equal(torch.get_rng_state(), drawn) and not called
    hook.remove()
    assert_unchanged(block, before)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "mnasnet0_5", "vgg11_bn"])
def test_trying_takes_little_time(name, monkeypatch):
    taken = []

    def timed(*args):
        start = time.process_time()
        reason = prove(*args)
        taken.append(time.process_time() - start)
        return reason

    prove = proof.prove
    monkeypatch.setattr(structured, "prove", timed)
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fusedres.fuse(model)
    torch.set_num_threads(threads)
    # Seconds of a processor that others use, too.
    assert taken and statistics.median(taken) < 0.05


def test_fusing_a_resnet_takes_little_time():
    model = torchvision.models.resnet50()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fusedres.fuse(model)
        times.append(time.perf_counter() - start)
        fusedres.unfuse(model)
    assert min(times) < 0.3


def test_a_class_of_a_module_that_was_never_imported_is_fused():
    made = {"__name__": "nowhere", "nn": nn}
    source = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()
"""
    exec(source, made)
    model = fusedres.fuse(nn.Sequential(made["Block"]()))
    assert fusedres.report(model).to_dict()["norms_fused"] == 1
