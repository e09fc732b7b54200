"""fusedres.runtime.replay: replayed, a pass does to the bit what it does, in every mode, for every kind of tensor."""

import copy
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedres
from fusedres.runtime import replay, switches
from fusedres.runtime.backends import backend
from fusedres.runtime.notes import Notes
from fusedres.runtime.replay import ReplayDiffers, replayed
from tests.comparison import relative_error
from tests.nn.twins import randomised
from tests.vgpu_support import needs_vgpu

BACKENDS = ["native", pytest.param("vgpu:sm_90", marks=needs_vgpu)]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def calls(function, times: int = 4) -> list[Tensor]:
    return [replayed(function, torch.ones(3)) for _ in range(times)]


def test_a_pass_that_can_not_be_repeated_is_found():
    count = []

    def drifting(x):
        count.append(1)
        return x + len(count)

    with pytest.raises(ReplayDiffers, match=r"drifting: the replay differs in its result"):
        calls(drifting)


def test_an_operand_that_is_written_to_otherwise_is_found():
    count = []

    def writing(x):
        count.append(1)
        x.mul_(len(count))
        return x.sum() * 0

    with pytest.raises(ReplayDiffers, match="what it wrote to its operands"):
        calls(writing)


def test_operands_are_written_to_once_where_both_run():
    x = torch.ones(3)
    for _ in range(4):
        replayed(added, x)
    assert x.tolist() == [5.0] * 3


def added(x: Tensor) -> Tensor:
    return x.add_(1)


def test_it_is_held_against_the_pass_once(monkeypatch):
    count = []

    def counting(x):
        count.append(1)
        return x + 1

    calls(counting, 6)
    assert len(count) == 3  # twice as written, once to compare
    monkeypatch.setattr(switches, "STRICT", False)

    def other(x):
        count.append(1)
        return x + 2

    calls(other, 6)
    assert len(count) == 5


def copied(x: Tensor) -> tuple[Tensor, Tensor]:
    """Composite operations whose schema is a view's, and which copy or not."""
    dense = x.contiguous(memory_format=torch.channels_last)
    return dense.reshape(-1)[1:3] + 1, x.to(torch.float64).flatten() * 2


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "a slice of wider rows": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "one image expanded": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "behind others in memory": lambda x: torch.cat([x, x]).contiguous(memory_format=torch.channels_last)[x.shape[0] :],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_composite_operations_in_inference_mode(layout):
    torch.manual_seed(0)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for seed in range(4):
            torch.manual_seed(seed)
            with mode():
                x = layout(torch.randn(2, 3, 4, 5))
                for ours, theirs in zip(replayed(copied, x), copied(x), strict=True):
                    assert torch.equal(ours, theirs)
    assert any(isinstance(notes, Notes) for notes in replay._notes.values())


def block() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = randomised(fusedres.nn.plain.BasicBlock(8, 8)).to(memory_format=torch.channels_last)
    return fusedres.fuse(copy.deepcopy(plain), schedule="prologue"), plain


@pytest.mark.parametrize("name", BACKENDS)
def test_three_evaluations_in_inference_mode(name):
    """As a validation loop makes them, of an input that is not channels_last; and training after them."""
    fused, plain = block()
    with backend(name):
        for _ in range(2):
            for model in (fused, plain):
                model.eval()
            for seed in range(4):
                torch.manual_seed(seed)
                x = torch.randn(2, 8, 6, 6)
                with torch.inference_mode():
                    assert relative_error(fused(x), plain(x)) < 1e-5
            for seed in range(4):
                torch.manual_seed(seed)
                x = torch.randn(2, 8, 6, 6)
                assert relative_error(fused.train()(x).detach(), plain.train()(x).detach()) < 1e-5


MODES = ("train", "train without gradients", "train in inference mode", "eval", "eval with gradients", "inference mode")
KINDS = ("tensor", "inference tensor", "requires a gradient", "parameter", "negated lazily")
CALL = st.tuples(
    st.sampled_from(MODES), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(KINDS), st.booleans(), st.integers(0, 1)
)


def made(layout: str, kind: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.inference_mode(kind == "inference tensor"):
        x = LAYOUTS[layout](torch.randn(2, 8, 5, 4))
    if kind == "requires a gradient":
        return x.requires_grad_()
    if kind == "parameter":
        return nn.Parameter(x, requires_grad=seed == 0)
    return torch._neg_view(x) if kind == "negated lazily" else x


def run(model: nn.Module, call: tuple[str, str, str, bool, int]) -> list[Tensor] | None:
    """Output, gradients and running statistics of a call; None: PyTorch refuses it."""
    mode, layout, kind, autocast, seed = call
    x = made(layout, kind, seed)
    model.train(mode.startswith("train"))
    model.zero_grad()
    grads = []
    with ExitStack() as stack:
        if "inference mode" in mode:
            stack.enter_context(torch.inference_mode())
        elif mode in ("train without gradients", "eval"):
            stack.enter_context(torch.no_grad())
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        try:
            z = model(x)
            if z.requires_grad:
                z.float().square().mean().backward()
                grads = [g for g in (x.grad, *(p.grad for p in model.parameters())) if g is not None]
        except RuntimeError as error:
            assert "nference tensor" in str(error) or "neg" in str(error), error
            return None
    return [z.detach().float(), *grads, *(buffer.float() for buffer in model.buffers())]


def walk(name: str, sequence: list[tuple[str, str, str, bool, int]]) -> None:
    fused, plain = block()
    with backend(name):
        for call in sequence:
            before = copy.deepcopy(plain.state_dict())
            theirs = run(plain, call)
            if theirs is None:  # PyTorch has moved its running statistics before it refused
                plain.load_state_dict(before)
                continue
            for i, (mine, other) in enumerate(zip(run(fused, call) or [], theirs, strict=True)):
                # In bf16 a ReLU within rounding of zero flips; what notes get wrong is wrong altogether.
                allowed = 0.15 if call[3] else 1e-4
                assert relative_error(mine.float(), other.float()) < allowed, (call, i)
            fused.load_state_dict(plain.state_dict())


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@given(st.lists(CALL, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=QUIET)
def test_any_order_of_modes_layouts_and_kinds(sequence):
    # Each comes often enough to be noted, checked and replayed, between the others.
    walk("native", sequence * 4)


@needs_vgpu
@pytest.mark.parametrize("kind", KINDS)
def test_one_order_on_kernels(kind):
    layouts = iter(sorted(LAYOUTS))
    orders = [("inference mode", next(layouts), kind, False, 1), ("train", next(layouts), kind, False, 0)]
    walk("vgpu:sm_90", orders * 4)


@pytest.mark.slow
@needs_vgpu
@given(st.lists(CALL, min_size=1, max_size=3))
@settings(max_examples=12, deadline=None, suppress_health_check=QUIET)
def test_many_orders_on_kernels(sequence):
    walk("vgpu:sm_90", sequence * 4)
