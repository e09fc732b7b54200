"""What a fused model is held to: the account of its batch norms, what really runs, the numbers of its plain twin."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.nn.fused import Fused
from fusedres.nn.parts import NotFusable
from fusedres.nn.structured import taken_apart
from tests.nn.twins import Pass, assert_same_pass, run


def norms_left(model: nn.Module) -> dict[str, str]:
    """Batch norm -> why it is in no fused pass."""
    fused = {
        id(norm)
        for module in model.modules()
        if isinstance(module, Fused) and type(module).why_plain(module) is None
        for norm in type(module).parts_of(module).norms
    }
    return {
        name: _reason(model, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and id(module) not in fused
    }


def _reason(model: nn.Module, norm: str) -> str:
    """Why the innermost module that holds a batch norm has no fused pass of it."""
    for path in (norm[:end] for end in range(len(norm) - 1, -1, -1) if norm[end] == "." or end == 0):
        try:
            structure, modules = taken_apart(model.get_submodule(path), None)
        except NotFusable as why:
            return str(why)
        for step in structure.found.fused:
            if any(one is model.get_submodule(norm) for one in step.norms(modules)):
                return step.why_not(modules) or ""
    return ""


def norms_called(model: nn.Module, x: Tensor) -> set[str]:
    """The two-dimensional batch norms of which a call of the model runs the plain forward; nothing is patched."""
    names = {id(part): name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    called = set()

    def watch(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is _BatchNorm.forward.__code__:
            called.add(names.get(id(frame.f_locals["self"]), ""))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        model(x)
    finally:
        sys.setprofile(before)
    return called - {""}


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of what a model gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for one in output:
            yield from tensors(one)


class Joined(nn.Module):
    """All that a model gives, as one tensor; the same random numbers are drawn at every call."""

    def __init__(self, model: nn.Module, seed: int = 1) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(self.seed)
        return torch.cat([one.flatten() for one in tensors(self.model(x))])


def passed(model: nn.Module, x: Tensor, seed: int = 1) -> Pass:
    """One forward and backward pass of a model of any number of outputs."""
    return run(Joined(model, seed).train(model.training), x)


def assert_same_numbers(fused: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Outputs, gradients and buffers agree in training, twice, and in evaluation, with and without gradients."""
    # By the second seed `torch.rand(1)` is close to 0, by the others above a half.
    for mode, seed in ((True, 1), (True, 3), (False, 2)):
        fused.train(mode), plain.train(mode)
        assert_same_pass(passed(fused, x, seed), passed(plain, x, seed), tolerance)
    with torch.no_grad():
        torch.testing.assert_close(Joined(fused).eval()(x), Joined(plain).eval()(x), rtol=0, atol=1e-9)
    fused.train(), plain.train()
