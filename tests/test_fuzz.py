"""Any block in any mode, dtype and layout, on any schedule, held against fp64: as accurate as eager PyTorch is."""

import copy
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedres
from fusedres.nn import plain
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import relative_error
from tests.nn.twins import randomised

LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "a slice of wider rows": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack([x, x], 3).flatten(2, 3).to(memory_format=torch.channels_last)[:, :, ::2],
    "one image expanded": lambda x: x[:1].expand(x.shape),
    "behind others in memory": lambda x: torch.cat([x, x]).to(memory_format=torch.channels_last)[x.shape[0] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}  # fmt: skip

BLOCKS = {
    "BasicBlock": plain.BasicBlock,
    "Bottleneck": plain.Bottleneck,
    "PreActBasicBlock": plain.PreActBasicBlock,
    "PreActBottleneck": plain.PreActBottleneck,
}
MODES = ("train", "frozen statistics", "eval with gradients", "eval", "inference mode")
DTYPES = {"fp32": None, "bf16 by autocast": torch.bfloat16, "fp64": None}


class Case(NamedTuple):
    """A call; everything else is drawn by ``seed``."""

    block: str
    width: int
    channels: int
    stride: int
    shortcut: str
    schedule: str
    mode: str
    dtype: str
    layout: str
    dz_layout: str
    size: tuple[int, int, int]
    needs_x: bool
    seed: int

    def built(self) -> nn.Module:
        torch.manual_seed(self.seed)
        block: Any = BLOCKS[self.block]
        return randomised(block(self.width, self.channels, self.stride, shortcut=self.shortcut), self.seed)

    def images(self) -> tuple[int, int, int, int]:
        n, h, w = self.size
        return n, self.width, h, w


CASES = st.builds(
    Case, st.just(""), st.sampled_from([2, 4, 8]), st.sampled_from([8, 12]), st.integers(1, 2),
    st.sampled_from(["projection", "zero_pad", "projection_always"]), st.sampled_from([*SCHEDULES, "auto", "memory"]),
    st.sampled_from(MODES), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)), st.tuples(st.integers(2, 4), st.integers(3, 7), st.integers(3, 7)),
    st.booleans(), st.integers(0, 2**16),
)  # fmt: skip


def run(model: nn.Module, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a step."""
    torch.manual_seed(case.seed + 1)
    x = LAYOUTS[case.layout](torch.randn(case.images(), dtype=torch.float64).to(dtype))
    model.train(case.mode == "train")
    # In training, batch norms alone may be frozen.
    if case.mode == "frozen statistics":
        model.train()
        for part in model.modules():
            part.training &= not isinstance(part, nn.BatchNorm2d)
    graph = case.mode in ("train", "frozen statistics", "eval with gradients")
    x.requires_grad_(graph and case.needs_x)
    model.zero_grad()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(case.mode == "inference mode"))
        stack.enter_context(torch.set_grad_enabled(graph))
        low = DTYPES[case.dtype]
        if low is not None and dtype != torch.float64:
            stack.enter_context(torch.autocast("cpu", low))
        z = model(x)
    found = {"z": z.detach()}
    if graph:
        dz = torch.randn(z.shape, dtype=torch.float64).to(z.dtype)
        z.backward(LAYOUTS[case.dz_layout](dz))
        if case.needs_x:
            found["dx"] = x.grad
        found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def check(case: Case) -> None:
    exact_model = case.built().double()
    eager = copy.deepcopy(exact_model).float()
    # How much a case makes of rounding is seen in fp32, fp64 being the exact one.
    dtype, units = (torch.float64, 2**-29) if case.dtype == "fp64" else (torch.float32, 1.0)
    fused = fusedres.fuse(copy.deepcopy(exact_model).to(dtype), schedule=case.schedule)
    assert all(row.fused for row in fusedres.report(fused))
    for _ in range(1 if case.seed % 4 else 4):  # as it is written, and of some also noted, checked and by its notes
        exact = run(exact_model, case, torch.float64)
        theirs, ours = run(eager, case, torch.float32), run(fused, case, dtype)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == (theirs[name].dtype if dtype == torch.float32 else dtype), name
            scale = float(exact[name].norm())
            allowed = max(FACTOR * units * relative_error(theirs[name], exact[name], scale), FLOORS[case.dtype])
            assert relative_error(value, exact[name], scale) <= allowed, name


# A sum of up to 10^3 terms in another order, and for bf16 a few units in the last place of what is stored between.
FACTOR = 4
FLOORS = {"fp32": 64 * 2**-24, "fp64": 64 * 2**-53, "bf16 by autocast": 4 * 2**-9}
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def many(cases: int) -> Any:
    """Decorates a test of a block's cases."""
    return settings(max_examples=cases // len(BLOCKS), deadline=None, suppress_health_check=QUIET)


@pytest.mark.parametrize("block", BLOCKS)
@given(case=CASES)
@settings(many(300), derandomize=True)
def test_any_call_is_as_accurate_as_eager(block, case):
    check(case._replace(block=block))


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@given(case=CASES)
@many(10_000)
def test_many_calls_are_as_accurate_as_eager(block, case):
    check(case._replace(block=block))
