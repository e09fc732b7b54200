"""fusedres.nn.ahead: a network's pass is gone through on paper before it, and nobody notices."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusedres
from fusedres.models import cifar_resnet
from fusedres.models.sources import source
from fusedres.nn import ahead
from fusedres.nn.ahead import launches_of, paper_copy, prepare
from fusedres.plan.gpus import GPUS

X = (8, 3, 16, 16)


@pytest.fixture
def compiled(monkeypatch):
    """What would be compiled, as if the CPU were an H100."""
    every = []
    monkeypatch.setattr(ahead, "is_wanted", lambda device: True)
    monkeypatch.setattr(ahead, "gpu_of", lambda x: GPUS["h100"])
    monkeypatch.setattr(ahead, "target_name", lambda index: "sm_90")
    monkeypatch.setattr(ahead, "compile_missing", lambda binaries, target: every.append((list(binaries), target)))
    return every


def network():
    torch.manual_seed(0)
    return fusedres.fuse(cifar_resnet(8).to(memory_format=torch.channels_last))


def images():
    return torch.randn(X).contiguous(memory_format=torch.channels_last)


def on_meta(training=True):
    with torch.device("meta"):
        model = cifar_resnet(8).to(memory_format=torch.channels_last)
    return fusedres.fuse(model).train(training)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_compiled_is_what_the_pass_launches(compiled, training):
    model, x = network().train(training), images()
    with torch.set_grad_enabled(training):
        prepare(model, x)
        expected = launches_of(on_meta(training), x.to("meta"), GPUS["h100"])
    [(binaries, target)] = compiled
    assert target == "sm_90"
    assert {*binaries} == {launch.binary for launch in expected}
    backward = any("backward" in binary.name or "grad" in binary.name for binary in binaries)
    assert backward is training and len(binaries) > 5


def test_the_network_the_images_and_random_numbers_are_as_before(compiled):
    model, x = network(), images()
    before, state, random = copy.deepcopy(model.state_dict()), {**model.__dict__}, torch.get_rng_state()
    prepare(model, x)
    assert len(compiled) == 1
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert {**model.__dict__, "fused_prepared": None} == {**state, "fused_prepared": None}
    assert torch.equal(torch.get_rng_state(), random)


def test_once_for_each_kind_of_pass_and_not_without_end(compiled, monkeypatch):
    monkeypatch.setattr(ahead, "MOST_KINDS", 4)
    model = network()
    for _ in range(3):
        prepare(model, images())
    assert len(compiled) == 1
    with torch.no_grad():
        prepare(model.eval(), images())
    prepare(model, images()[:4])
    assert len(compiled) == 3
    for n in (1, 2, 3):
        prepare(model, torch.randn(1, 3, 16, 8 * n))
    assert len(compiled) == ahead.MOST_KINDS
    fusedres.fuse(model)
    prepare(model, images())
    assert len(compiled) == ahead.MOST_KINDS + 1


def test_what_would_notice_is_left_alone(compiled):
    hooked, waiting, typed = network(), network(), network()
    seen = []
    next(hooked.children()).register_forward_hook(lambda *given: seen.append(given))
    prepare(hooked, images())
    waiting.add_module("sync", nn.SyncBatchNorm(4))
    prepare(waiting, images())

    class Mine(torch.Tensor):
        pass

    typed.register_buffer("mine", torch.zeros(3).as_subclass(Mine))
    prepare(typed, images())
    assert compiled == [] and seen == []


def test_a_forward_that_looks_at_values_is_compiled_as_it_is_launched(compiled):
    model = network()
    block = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    model.add_module("looks", nn.Identity())
    original = type(model).forward

    class Looks(type(model)):
        def forward(self, x):
            return original(self, x) if float(x.sum()) else x

    model.__class__ = Looks
    prepare(model, images())
    assert compiled == [] and block.weight.grad is None


def test_another_architecture_than_the_tables(compiled, monkeypatch):
    monkeypatch.setattr(ahead, "target_name", lambda index: "sm_87")
    prepare(network(), images())
    assert compiled == []


def test_a_copy_on_paper_shares_no_memory_and_keeps_what_is_shared():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    model.add_module("again", model[2])
    model[0].weight.requires_grad_(False)
    paper = paper_copy(model.to(memory_format=torch.channels_last))
    assert all(tensor.is_meta for tensor in (*paper.parameters(), *paper.buffers()))
    assert [(p.shape, p.stride(), p.requires_grad) for p in paper.parameters()] == [
        (p.shape, p.stride(), p.requires_grad) for p in model.parameters()
    ]
    assert paper.again is paper[2] and isinstance(paper[0].weight, nn.Parameter)


def test_passes_on_the_cpu_are_not_prepared(monkeypatch):
    monkeypatch.setattr("fusedres.nn.network.prepare", lambda *_: pytest.fail("prepared"))
    network()(images())


def test_a_pass_on_a_gpu_is_prepared_before_it_begins(monkeypatch):
    from fusedres.nn.network import network_pass

    told = []
    monkeypatch.setattr("fusedres.nn.network.prepare", lambda *given: told.append(given))
    monkeypatch.setattr("fusedres.nn.network.of_network", lambda *_: "the pass")
    monkeypatch.setattr("fusedres.nn.network.contraction_dtype", lambda x: torch.bfloat16)
    x = SimpleNamespace(is_cuda=True)
    here, plain = SimpleNamespace(goes_plain=lambda _: False), SimpleNamespace(goes_plain=lambda _: True)
    assert network_pass(here, x) == "the pass"
    network_pass(plain, x)
    assert told == [(here, x)]


class Drawn(nn.Module):
    """A block that is there in one of three passes."""

    def __init__(self):
        super().__init__()
        self.block = fusedres.nn.BasicBlock(16, 16)

    def forward(self, x):
        return self.block(x) if torch.rand(()).item() < 1 / 3 else x * 1


def test_blocks_that_draws_leave_out_are_listed_and_nobody_elses_draws_change():
    with torch.device("meta"):
        model = fusedres.fuse(Drawn())
    x = torch.empty(256, 16, 32, 32, device="meta", requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    before, missed = torch.get_rng_state(), torch.rand(3)
    torch.set_rng_state(before)
    assert missed[0] > 1 / 3  # a single pass would not see it
    assert launches_of(model, x, GPUS["h100"], autocast=torch.bfloat16) != []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_pass_makes_no_other_binaries_than_later_ones():
    model = fusedres.fuse(source("cifar_resnet20").on_meta())
    x = torch.empty(8, 3, 32, 32, device="meta").contiguous(memory_format=torch.channels_last)
    first, second = ({one.binary for one in launches_of(model, x, GPUS["a100"])} for _ in range(2))
    assert first == second != set()
