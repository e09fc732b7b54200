"""fusedres.bench.resnet_cpu: the gate refuses what is wrong, and the rounds are fair."""

import copy
import csv

import pytest
import torch
from torch import nn

from fusedres.bench import resnet_cpu


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))


@pytest.mark.parametrize("train", [True, False])
def test_gate_accepts_a_copy_and_changes_nothing(batch, train):
    model = network()
    before = copy.deepcopy(model.state_dict())
    resnet_cpu.gate(model, copy.deepcopy(model), *batch, train=train)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("train", "message"), [(True, "loss differ"), (False, "logits differ")])
def test_gate_refuses_a_wrong_forward(batch, train, message):
    wrong = network()
    with torch.no_grad():
        wrong[0].weight[0] *= -1
    with pytest.raises(RuntimeError, match=message):
        resnet_cpu.gate(network(), wrong, *batch, train=train)


def test_gate_refuses_a_wrong_backward(batch):
    class Reversed(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return 2 * y.detach() - y

    wrong = network()
    wrong[0].__class__ = Reversed
    with pytest.raises(RuntimeError, match="gradients differ"):
        resnet_cpu.gate(network(), wrong, *batch, train=True)


def test_gate_refuses_a_gradient_that_is_missing(batch):
    wrong = network()
    wrong[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight"):
        resnet_cpu.gate(network(), wrong, *batch, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_gate_refuses_nan(batch, train):
    wrong = network()
    with torch.no_grad():
        wrong[5].bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="differ by nan"):
        resnet_cpu.gate(network(), wrong, *batch, train=train)


def test_rounds_alternate_and_warm_up_is_thrown_away():
    calls: list[str] = []
    seconds = resnet_cpu.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1
    )
    assert "".join(calls) == "abbaabba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_timing_is_median_and_quantiles():
    timing = resnet_cpu.Timing.of("train", "eager", [5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.5, 2.0, 5.0, 6)


def test_script_writes_table_and_csv(tmp_path, capsys):
    pytest.importorskip("torchvision")
    path = tmp_path / "times.csv"
    threads = torch.get_num_threads()
    try:
        arguments = ["--model", "resnet18", "--batch", "4", "--px", "64", "--rounds", "1", "--threads", "1"]
        assert resnet_cpu.main([*arguments, "--csv", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "resnet18, batch 4, 64 px" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert [(row["workload"], row["model"]) for row in rows] == [
        ("train", "eager"),
        ("train", "fused"),
        ("infer", "eager"),
        ("infer", "fused"),
    ]
    assert all(float(row["median"]) > 0 for row in rows)
