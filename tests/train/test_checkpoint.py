"""fusedres.train.checkpoint: whole files or none, random states, and what differs in words."""

import random

import pytest
import torch
from torch import nn

from fusedres.train import checkpoint

CPU = torch.device("cpu")


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {
        "config": {"lr": 0.1, "at": (1, 2.5), "none": None},
        "model": {"weight": torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)},
        "random": [checkpoint.random_state(CPU)],
    }
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert loaded["config"] == state["config"]
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert loaded["model"]["weight"].is_contiguous(memory_format=torch.channels_last)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"config": {}, "step": 1})

    def full(content, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"config": {}, "step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["c.pt"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint.os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *a, _name=name, _real=real: calls.append(_name) or _real(*a))
    checkpoint.save(tmp_path / "c.pt", {"config": {}})
    assert calls == ["fsync", "replace", "fsync"]  # of the file, then of its folder


def test_random_states_continue_every_generator():
    np = pytest.importorskip("numpy")
    np.random.normal()  # leaves half of a pair behind
    state = checkpoint.random_state(CPU)

    def draw():
        return random.random(), np.random.normal(), np.random.rand(), torch.rand(1).item()

    expected = draw()
    draw()
    checkpoint.restore_random_state(state, CPU)
    assert draw() == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "c.pt is truncated"),
        (lambda path: path.write_bytes(b""), "c.pt is truncated"),
        (lambda path: torch.save({"weight": torch.ones(1)}, path), "c.pt is no checkpoint of fusedres train"),
        (lambda path: torch.save({"config": {}, "format": 99}, path), "c.pt has format 99, this version reads 1"),
        (lambda path: path.unlink(), "there is no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, damage, message):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"config": {}, "model": {"weight": torch.ones(1000)}})
    damage(path)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_a_file_can_not_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("this ran",))

    torch.save({"config": {}, "evil": Evil()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt"):
        checkpoint.load(tmp_path / "c.pt")
    assert "this ran" not in capsys.readouterr().out


def test_differences_are_named_one_by_one():
    saved = {"lr": 0.1, "recipe": {"batch": 128, "schedule": {"at": (1, 2)}}, "amp": None}
    assert checkpoint.differences(saved, {**saved, "recipe": {"batch": 128, "schedule": {"at": [1, 2]}}}) == []
    other = {"lr": 0.1, "recipe": {"batch": 64, "schedule": {"patience": 5}}, "amp": "bf16"}
    assert checkpoint.differences(saved, other) == [
        "recipe.batch: was 128, now 64",
        "recipe.schedule.at: was (1, 2), now None",
        "amp: was None, now 'bf16'",
        "recipe.schedule.patience: was None, now 5",
    ]


def network(classes=10, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 4, classes))


def test_weights_come_from_a_state_dict_or_a_checkpoint(tmp_path):
    source = network()
    checkpoint.save(tmp_path / "checkpoint.pt", {"config": {}, "model": source.state_dict()})
    checkpoint.write(tmp_path / "model.pt", source.state_dict())
    for name in ("checkpoint.pt", "model.pt"):
        model = network()
        checkpoint.read_weights(tmp_path / name).give(model)
        assert torch.equal(model[2].weight, source[2].weight)
    torch.load(tmp_path / "model.pt", weights_only=True)  # what others read


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(classes=100), r"classes: expected weights for 10, got some for 100"),
        (network(width=5), r"0.weight: expected shape \(4, 3, 3, 3\), got \(5, 3, 3, 3\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"weights of another network: it lacks 2.bias, 2.weight and has nothing"),
    ],
)
def test_weights_of_another_network_change_nothing(tmp_path, other, message):
    checkpoint.write(tmp_path / "model.pt", other.state_dict())
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.read_weights(tmp_path / "model.pt").give(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_files_are_no_weights(tmp_path):
    with pytest.raises(ValueError, match="weights: there is no file"):
        checkpoint.read_weights(tmp_path / "model.pt")
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no state_dict"):
        checkpoint.read_weights(tmp_path / "model.pt")
