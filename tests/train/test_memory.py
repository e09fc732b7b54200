"""fusedres.train.memory: what a batch needs, in words."""

import re

import pytest
import torch
from torch import nn

from fusedres.train import memory

CPU = torch.device("cpu")


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def test_the_estimate_counts_what_is_saved_per_image(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10_000_000)
    text = memory.explanation(build, (3, 4, 4), 1000, CPU, amp=None)
    # Saved: the images (48), the ReLU's output (128, the linear layer's input too), log softmax (10); labels (int64).
    each = 4 * (48 + 128 + 10) + 8
    fixed = 3 * 4 * (8 * 27 + 1280 + 10)
    assert "a batch of 1000 images does not fit into the memory of cpu" in text
    figures = [float(figure) for figure in re.findall(r"([\d.]+) MB", text)]
    assert figures[0] == pytest.approx(each * 1000 / 1e6, abs=0.02)
    assert figures[2] == pytest.approx(fixed / 1e6, abs=0.01)
    assert f"well below {int((10_000_000 - fixed) / each)}" in text
    assert "fusedres explain" in text


def test_mixed_precision_halves_activations():
    small = memory.explanation(build, (3, 4, 4), 10_000, CPU, amp=None)
    half = memory.explanation(build, (3, 4, 4), 10_000, CPU, amp=torch.bfloat16)
    whole, halved = (float(re.search(r"estimated ([\d.]+) MB", text).group(1)) for text in (small, half))
    assert halved == pytest.approx(whole / 2, rel=0.02)


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**46)
    assert memory.is_out_of_memory(raised.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes can not be multiplied"))
    assert not memory.is_out_of_memory(ValueError("can't allocate memory"))


def test_peak_and_available_memory_are_those_of_this_machine():
    assert 10_000_000 < memory.peak(CPU) < memory.available(CPU)
