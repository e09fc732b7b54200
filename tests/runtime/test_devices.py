"""fusedres.runtime.devices: what a name stands for on machines with and without GPUs, which need not be here."""

import pytest
import torch

from fusedres.runtime.devices import default_device, existing_device, gpus, made_current
from tests.gpu_support import needs_gpu


@pytest.fixture
def machine(monkeypatch):
    """Makes PyTorch see so many GPUs."""

    def with_gpus(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return with_gpus


@pytest.mark.parametrize(
    ("count", "names"), [(0, ["cpu"]), (1, ["cpu", "cuda", "cuda:0"]), (2, ["cpu", "cuda", "cuda:0", "cuda:1"])]
)
def test_devices_that_are_here(machine, count, names):
    machine(count)
    assert [str(existing_device(name)) for name in names] == names
    assert gpus() == [name for name in names if ":" in name]
    assert default_device() == ("cuda" if count else "cpu")


@pytest.mark.parametrize("name", ["cuda:2", "cuda:-1", "cuda:01", "gpu", "tpu", "", "meta", "cpu:1", "mps"])
def test_other_names_are_refused_with_those_that_are_here(machine, name):
    machine(2)
    with pytest.raises(ValueError) as refusal:
        existing_device(name)
    assert str(refusal.value) == f"device: expected cpu, cuda, cuda:0, cuda:1, got {name!r}"


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_a_gpu_the_message_says_so(machine, name):
    machine(0)
    with pytest.raises(ValueError) as refusal:
        existing_device(name, "auto")
    assert str(refusal.value) == f"device: expected cpu, auto (PyTorch sees no GPU here), got {name!r}"


def test_gpus_that_can_not_be_used_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus() == []


def test_the_current_device_is_the_one_asked_for(monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    with made_current(torch.device("cpu")):
        assert entered == []
    with made_current(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    assert entered[-1] == "left"


@needs_gpu
def test_a_gpu_is_current_inside_alone():
    before = torch.cuda.current_device()
    for name in gpus():
        with made_current(existing_device(name)):
            assert str(torch.empty(1, device="cuda").device) == name
        assert torch.cuda.current_device() == before
