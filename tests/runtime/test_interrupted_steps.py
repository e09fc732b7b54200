"""A step that is ended at any moment leaves what eager's may leave, and nothing behind that the next step goes by."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.context import here
from fusedres.runtime import fallback, replay, switches
from fusedres.runtime.torch_private import dispatch_modes
from tests.comparison import relative_error
from tests.interruptions import KINDS, Injection, moments
from tests.nn.twins import randomised

TOLERANCE = 1e-4
STAGES = {"as it is written": 0, "noted": 1, "replayed": 2}
"""How often a pass was gone through before."""

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


class Twins:
    """A fused model, its plain twin, and what a whole step of the plain one gives."""

    def __init__(self, schedule: str) -> None:
        torch.manual_seed(0)
        blocks = [fusedres.nn.plain.BasicBlock(4, 4), fusedres.nn.plain.BasicBlock(4, 4)]
        self.plain = randomised(nn.Sequential(*blocks)).to(memory_format=torch.channels_last)
        self.before = copy.deepcopy(self.plain.state_dict())
        self.fused = fusedres.fuse(copy.deepcopy(self.plain), schedule=schedule)
        step(self.plain)
        self.after = copy.deepcopy(self.plain.state_dict())
        self.grads = [p.grad.clone() for p in self.plain.parameters()]
        with fusedres.backend("native"):
            self.fresh(len(STAGES))  # what is found out once is no part of the steps that are ended

    def fresh(self, calls: int) -> nn.Module:
        """The fused model as it was, when its passes were gone through so often."""
        replay._notes.clear()
        replay._seen.clear()
        for _ in range(calls):
            step(self.fused)
        self.fused.load_state_dict(self.before)
        self.fused.zero_grad()
        return self.fused

    def check(self) -> None:
        """That the fused model is as a step of eager's that was ended may leave it, and takes the next step rightly."""
        assert fallback.current() is None and not dispatch_modes() and torch.is_grad_enabled()
        for parameter, grad in zip(self.fused.parameters(), self.grads, strict=True):
            assert parameter.grad is None or relative_error(parameter.grad, grad) < TOLERANCE
        left = copy.deepcopy(self.fused.state_dict())
        for name, parameter in self.fused.named_parameters():
            assert torch.equal(parameter, self.before[name])
        for norm in (name for name, part in self.fused.named_modules() if isinstance(part, nn.BatchNorm2d)):
            mean, var, counted = (f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))
            moved = not torch.equal(left[mean], self.before[mean])
            state = self.after if moved else self.before
            assert relative_error(left[mean], state[mean]) < TOLERANCE
            assert relative_error(left[var], state[var]) < TOLERANCE
            assert left[counted] - self.before[counted] in ((1,) if moved else (0, 1))
        self.plain.load_state_dict(left)
        for ours, theirs in zip(step(self.fused), step(self.plain), strict=True):
            assert relative_error(ours, theirs) < TOLERANCE


def step(model: nn.Module) -> list[Tensor]:
    """Output, gradients and running statistics."""
    x = X.clone().requires_grad_()
    model.zero_grad()
    z = model(x)
    z.square().mean().backward()
    return [z.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone().float() for b in model.buffers())]


def end_at(twins: Twins, kind: type[BaseException], stage: str, some: int | None) -> None:
    """End a step at ``some`` of its moments, or at each of them."""
    model = twins.fused
    with fusedres.backend("native"):
        chosen = here()
        twins.fresh(STAGES[stage])
        count = moments(kind, lambda: step(model))
        every = range(1, count + 1)
        for at in every if some is None else random.Random(0).sample(every, some):
            twins.fresh(STAGES[stage])
            injection = Injection(kind, at)
            with pytest.raises(kind, match="injected"), injection:
                step(model)
            assert here() is chosen, injection.where
            try:
                twins.check()
            except AssertionError as error:
                raise AssertionError(f"{kind.__name__} at {injection.where}") from error


@pytest.fixture(autouse=True)
def no_check(monkeypatch):
    monkeypatch.setattr(switches, "STRICT", False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_ended_at_some_moments(stage, kind):
    end_at(Twins("prologue"), kind, stage, 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["block_end", "prologue", "moments"])
def test_a_replayed_step_ended_at_any_moment(schedule, kind):
    end_at(Twins(schedule), kind, "replayed", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["as it is written", "noted"])
def test_a_step_ended_at_many_moments(stage, kind):
    end_at(Twins("moments"), kind, stage, 300)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retained", [True, False])
def test_a_backward_pass_that_was_ended_and_is_asked_for_again(retained, kind):
    """It gives the right gradients, or it is refused, as autograd refuses what it has let go."""
    twins = Twins("prologue")

    def forward() -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        return x, twins.fused(x).square().mean()

    model = twins.fresh(STAGES["replayed"])
    forward()[1].backward()
    _, loss = forward()
    count = moments(kind, lambda: loss.backward(retain_graph=retained))
    for at in random.Random(0).sample(range(1, count + 1), 12):
        model.zero_grad()
        x, loss = forward()
        with pytest.raises(kind, match="injected"), Injection(kind, at):
            loss.backward(retain_graph=retained)
        model.zero_grad()
        x.grad = None
        try:
            loss.backward()
        except RuntimeError as error:
            assert not retained and "second time" in str(error), error
            continue
        for parameter, grad in zip(model.parameters(), twins.grads, strict=True):
            assert relative_error(parameter.grad, grad) < TOLERANCE
