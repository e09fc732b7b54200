"""fusedres.nn: the papers' other shortcuts, orders, gates and random depth compute what their plain twins compute."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn import blocks, plain
from fusedres.patterns.choose import AUTO
from tests.comparison import relative_error
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor


class Case(NamedTuple):
    block: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    size: tuple[int, int, int, int]

    def make(self, schedule: str = AUTO) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(blocks, self.block)(*self.arguments, **self.keywords).double()
        return fusedres.fuse(randomised(block), schedule=schedule)


SIZE = (3, 6, 5, 7)
IDENTITY, ZERO_PAD, PROJECTION = (6, 6), (6, 9, 2), (6, 8, 2)


def each_shortcut(name: str, block: str, **keywords: Any) -> dict[str, Case]:
    return {
        f"{name}, identity": Case(block, IDENTITY, keywords, SIZE),
        f"{name}, zero-pad": Case(block, ZERO_PAD, {"shortcut": "zero_pad", **keywords}, SIZE),
        f"{name}, projection": Case(block, PROJECTION, keywords, SIZE),
    }


CASES = {
    **each_shortcut("constant scaling", "ScaledBlock"),
    "the shortcut scaled alone": Case("ScaledBlock", IDENTITY, {"residual_scale": 1.0, "shortcut_scale": 0.25}, SIZE),
    **each_shortcut("exclusive gating", "GatedBlock", gate_bias=-1.0),
    **each_shortcut("shortcut-only gating", "GatedBlock", exclusive=False, gate_bias=-1.0),
    **each_shortcut("BN after addition", "ActivationBasicBlock", order="bn_after_add"),
    **each_shortcut("ReLU before addition", "ActivationBasicBlock", order="relu_before_add"),
    **each_shortcut("ReLU-only", "ActivationBasicBlock", order="relu_only"),
    **{
        f"bottleneck, {order}": Case("ActivationBottleneck", (16, 4), {"order": order}, (3, 16, 5, 7))
        for order in ("bn_after_add", "relu_before_add", "relu_only")
    },
    "conv shortcut": Case("BasicBlock", IDENTITY, {"shortcut": "projection_always"}, SIZE),
    "no shortcut": Case("BasicBlock", PROJECTION, {"shortcut": "none"}, SIZE),
    "bottleneck, stride in the first 1x1": Case("Bottleneck", (6, 4, 2), {"stride_in_first": True}, SIZE),
    "always there": Case("StochasticBlock", PROJECTION, {"survival": 1.0}, SIZE),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("schedule", [AUTO, "prologue", "moments"])
def test_training_and_evaluation(case, schedule):
    fused = case.make(schedule)
    twin = plain_copy(fused)
    assert type(twin) is getattr(plain, case.block)
    assert fusedres.report(fused)[0].fused and not fusedres.report(twin)[0].fused
    assert_twins(fused, twin, tensor(*case.size), tensor(*case.size, seed=2))
    assert_twins(fused.eval(), twin.eval(), tensor(*case.size, seed=3))
    with torch.no_grad():
        assert relative_error(fused(tensor(*case.size)), twin(tensor(*case.size))) <= 1e-12


@pytest.mark.parametrize("kind", [IDENTITY, PROJECTION], ids=["identity", "projection"])
def test_stochastic_depth_draws_what_its_twin_draws(kind):
    block = randomised(blocks.StochasticBlock(*kind, survival=0.5).double())
    twin = plain_copy(block)
    left_out = 0
    for seed in range(8):
        passes = []
        for module in (block, twin):
            torch.manual_seed(seed)
            passes.append(run(module, tensor(*SIZE, seed=seed)))
        assert_same_pass(*passes)
        left_out += passes[1].grads["conv1.weight"] is None
    assert 1 <= left_out <= 7
    assert int(block.bn1.num_batches_tracked) == 8 - left_out
    assert_twins(block.eval(), twin.eval(), tensor(*SIZE))


def test_evaluation_multiplies_the_residual_by_its_probability():
    block = randomised(blocks.StochasticBlock(6, 6, survival=0.25).double()).eval()
    whole = blocks.BasicBlock(6, 6).double().eval()
    whole.load_state_dict(block.state_dict())
    x = tensor(*SIZE)
    for modules in ((block, whole), (plain_copy(block), plain_copy(whole))):
        half, full = modules
        torch.testing.assert_close(half(x), (0.25 * full.residual(x) + x).relu())


def test_a_gain_is_not_mixed_up_with_another_in_the_cache_of_folded_weights():
    block = randomised(blocks.StochasticBlock(6, 6, survival=0.25).double()).eval()
    twin = plain_copy(block)
    with torch.no_grad():
        for survival in (0.25, 0.75, 1.0):
            block.survival = twin.survival = survival
            assert relative_error(block(tensor(*SIZE)), twin(tensor(*SIZE))) <= 1e-12


def test_dropout_on_the_shortcut_draws_what_its_twin_draws():
    block = randomised(blocks.DropoutShortcutBlock(6, 6).double())
    twin = plain_copy(block)
    passes = []
    for module in (block, twin):
        torch.manual_seed(3)
        passes.append(run(module, tensor(*SIZE)))
    assert_same_pass(*passes)
    assert_twins(block.eval(), twin.eval(), tensor(*SIZE))


def test_the_sum_before_a_batch_norm_is_measured_as_it_is_written(monkeypatch):
    from fusedres.autograd import ends

    def refuse(y: torch.Tensor) -> None:
        raise AssertionError("a pass of its own measured the sum")

    monkeypatch.setattr(ends, "bn_statistics", refuse)
    CASES["BN after addition, identity"].make("prologue")(tensor(*SIZE)).sum().backward()


def test_a_highway_block_is_reported_with_the_reason_why_nothing_is_fused():
    model = fusedres.fuse(nn.Sequential(plain.HighwayBlock(4), blocks.BasicBlock(4, 4)))
    rows = list(fusedres.report(model))
    assert [(row.kind, row.fused) for row in rows] == [("HighwayBlock", False), ("BasicBlock", True)]
    assert "no batch norm" in rows[0].reason


def test_a_highway_block_begins_near_the_identity():
    block = plain.HighwayBlock(4, gate_bias=-50.0).double()
    x = tensor(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: plain.StochasticBlock(4, 4, survival=0.0), "survival: .*got 0"),
        (lambda: plain.ActivationBasicBlock(4, 4, order="post"), "order: .*'bn_after_add'.*got 'post'"),
        (lambda: plain.PreActBasicBlock(4, 4, dropout=1.0), "dropout: .*got 1.0"),
        (lambda: plain.PreActBasicBlock(4, 4, shortcut="none"), "shortcut: .*'none'"),
        (lambda: plain.DenseLayer(4, 4, dropout=-0.1), "dropout: .*got -0.1"),
    ],
)
def test_what_can_not_be_built_is_refused(make, names):
    with pytest.raises(ValueError, match=names):
        make()
