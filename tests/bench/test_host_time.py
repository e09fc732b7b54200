"""fusedres.bench.host_time: nothing is executed, everything is launched, and replays launch the same."""

import pytest
import torch

import fusedres
from fusedres import vgpu
from fusedres.bench.host_time import host_time, main
from fusedres.runtime import replay
from tests.nn.twins import randomised
from tests.vgpu_support import needs_vgpu

pytestmark = needs_vgpu


def network() -> torch.nn.Module:
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)]
    return randomised(torch.nn.Sequential(fusedres.nn.BasicBlock(8, 8), *head))


@pytest.mark.parametrize("training", [True, False])
def test_launches_are_counted_and_nothing_is_executed(training, monkeypatch):
    monkeypatch.setattr(vgpu, "run", lambda *_, **__: pytest.fail("a kernel was executed"))
    model, x = network().train(training), torch.randn(2, 8, 6, 6)
    with replay.off():
        through = host_time(model, x, steps=1)
    played = host_time(model, x, steps=2)
    assert through.launches == played.launches > 1
    assert through.forward > 0 and (through.backward > 0) == (played.backward > 0) == training


def test_the_command_prints_all(capsys):
    assert main(["--model", "cifar_resnet20", "--px", "16", "--steps", "1", "--compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cifar_resnet20, training step" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["gone", "replayed", "compiled", "as"]
    assert all(float(line.split()[-1]) > 0 for line in lines[2:5])


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--px", "-1"], ["--model", "resnet51"], ["--schedule", "nope"]]
)
def test_what_can_not_be_run_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        host_time(network(), torch.randn(1, 8, 4, 4), steps=0)
