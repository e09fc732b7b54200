"""fusedres.train.distributed: which device a process takes, alone and among others."""

from contextlib import nullcontext

import pytest
import torch

from fusedres.train import distributed
from fusedres.train.distributed import world
from fusedres_cli.main import main


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    """A machine with two, of which nothing is there but the number; gives the devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or nullcontext())
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return current


@pytest.fixture
def torchrun(monkeypatch):
    """Makes this process one of several; gives the kinds of process groups that were joined."""
    joined = []
    monkeypatch.setattr(distributed.distributed, "init_process_group", joined.append)
    monkeypatch.setattr(distributed.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: joined.append("left"))

    def among(size, rank, local=None):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local or size))
        return joined

    return among


@pytest.mark.parametrize(("name", "device"), [(None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_a_process_alone_makes_its_gpu_the_current_one(two_gpus, name, device):
    with world(name) as here:
        assert (here.rank, here.size, here.device) == (0, 1, torch.device(device))
        assert two_gpus == [torch.device(device)]


def test_a_process_on_the_cpu_leaves_the_gpus_alone(two_gpus):
    with world("cpu") as here:
        assert here.device == torch.device("cpu")
    assert two_gpus == []


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_has_a_gpu_of_its_own(two_gpus, torchrun, rank):
    joined = torchrun(2, rank)
    with world("cuda") as here:
        assert here.device == torch.device("cuda", rank)
        assert two_gpus == [here.device]
        assert joined == ["nccl"]
    assert joined == ["nccl", "left"]


def test_processes_on_several_machines_are_counted_by_machine(torchrun):
    torchrun(4, 1, local=2)
    with world(None) as here:
        assert (here.size, here.device) == (4, torch.device("cuda", 1))


def test_any_number_of_processes_shares_a_cpu(torchrun):
    joined = torchrun(5, 4)
    with world("cpu") as here:
        assert (here.size, here.device) == (5, torch.device("cpu"))
        assert joined == ["gloo"]


@pytest.mark.parametrize("rank", [0, 2])
def test_more_processes_than_gpus_are_refused_by_all_of_them(torchrun, rank):
    joined = torchrun(3, rank)
    with pytest.raises(ValueError) as refusal, world(None):
        pytest.fail("it was let in")
    expected = "nproc-per-node: expected at most 2 on the GPUs of this machine (cuda:0, cuda:1), got 3"
    assert str(refusal.value) == expected
    assert joined == []


def test_a_single_gpu_for_all_processes_is_refused(torchrun):
    joined = torchrun(2, 0)
    with pytest.raises(ValueError) as refusal, world("cuda:1"):
        pytest.fail("it was let in")
    expected = "device: expected cuda, of which each of torchrun's processes takes one, got 'cuda:1'"
    assert str(refusal.value) == expected
    assert joined == []


@pytest.mark.parametrize("arguments", [["--device", "cuda:2"], []])
def test_the_command_refuses_before_any_file(torchrun, arguments, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    torchrun(3, 0)
    out = tmp_path / "out"
    assert main(["train", "--out", str(out), "--threads", str(threads + 1), *arguments]) == 2
    message = capsys.readouterr().err
    assert ("got 'cuda:2'" if arguments else "nproc-per-node: expected at most 2") in message
    assert not out.exists() and torch.get_num_threads() == threads
