"""fusedres.bench.gate: who is wrong is refused, who rounds otherwise is not, and nobody's model is changed."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fusedres.bench.cases import network
from fusedres.bench.contenders import CONTENDERS, operands_of
from fusedres.bench.gate import Gate
from fusedres.measure.accuracy import Observed, allowance, errors, relative_error
from tests.bench.tiny import (
    INFER,
    NETWORK,
    TRAIN,
    contender,
    hook_output,
    no_gradient,
    not_finite,
    wrong_gradient,
    wrong_output,
)  # fmt: skip

BOTH = pytest.mark.parametrize("setting", [TRAIN, INFER], ids=["train", "infer"])


@BOTH
def test_the_same_network_passes(setting):
    gate = Gate(NETWORK, setting)
    assert gate.whole
    for name in ("eager-nchw", "fused"):
        verdict = gate.judge(CONTENDERS[name])
        assert verdict.reason is None
        assert verdict.error <= verdict.bound


@BOTH
def test_another_output_is_refused(setting):
    assert "output differs from fp64" in Gate(NETWORK, setting).judge(contender("wrong", wrong_output)).reason


def test_a_planted_wrong_gradient_is_refused():
    verdict = Gate(NETWORK, TRAIN).judge(contender("wrong", wrong_gradient))
    assert "differs from fp64" in verdict.reason
    assert Gate(NETWORK, INFER).judge(contender("right in inference", wrong_gradient)).reason is None


def test_one_wrong_parameter_among_many_is_beyond_its_bound():
    """Its share of the whole gradient is small, so that only a look at each finds it."""
    exact = Observed({}, {"large": torch.full((100,), 10.0), "small": torch.ones(1)})
    found = errors(Observed({}, {"large": torch.full((100,), 10.0), "small": -torch.ones(1)}), exact)
    assert found["all gradients"] <= allowance("all gradients", 0.0, TRAIN.storage, "network")
    assert found["gradient of small"] > allowance("gradient of small", 0.0, TRAIN.storage, "network")


def test_a_gradient_that_is_missing_is_refused():
    reason = Gate(NETWORK, TRAIN).judge(contender("wrong", no_gradient)).reason
    assert "(missing)" in reason


@BOTH
def test_what_is_not_finite_is_refused(setting):
    assert "differs from fp64 by nan" in Gate(NETWORK, setting).judge(contender("wrong", not_finite)).reason


def test_an_eager_result_that_is_not_finite_is_refused():
    full = Observed({"output": torch.tensor([math.inf])}, {})
    assert Gate(NETWORK, INFER).judge(CONTENDERS["eager"], full).reason == "the result is not finite"


def test_rounding_to_bf16_is_too_much_for_fp32_and_not_for_bf16():
    rounding = contender("rounds", lambda model: hook_output(model[0], lambda y: y.bfloat16().to(y.dtype)))
    assert Gate(NETWORK, INFER).judge(rounding).reason is not None
    assert Gate(NETWORK, replace(INFER, dtype="bf16")).judge(rounding).reason is None


def test_at_full_size_the_contender_is_held_against_eager():
    """A contender compiled for one size is looked at there alone; a large network's small size is another one."""
    setting = replace(TRAIN, batch=9)
    gate = Gate(NETWORK, setting)
    assert not gate.whole
    eager = CONTENDERS["eager"].prepare(NETWORK, setting, operands_of(NETWORK, setting, 0)).observe()
    for change, right in ((lambda _: None, True), (wrong_gradient, False), (wrong_output, False)):
        fixed = contender("fixed", change, fixed_shapes=True)
        full = fixed.prepare(NETWORK, setting, operands_of(NETWORK, setting, 0)).observe()
        verdict = gate.judge(fixed, full, eager)
        assert (verdict.reason is None) == right, verdict
        assert right or "eager at full size" in verdict.reason
    assert gate.judge(fixed, full, None).reason == "eager has no result to hold it against at this size"
    # One that was held against fp64 may be timed where eager has no memory.
    assert gate.judge(CONTENDERS["fused"], full, None).reason is None


def test_a_contender_that_computes_something_else_is_held_against_that():
    def leaky(model: nn.Module) -> nn.Module:
        model[2] = nn.LeakyReLU(0.01)
        return model

    assert Gate(NETWORK, TRAIN).judge(contender("leaky", leaky, plain=leaky)).reason is None
    assert Gate(NETWORK, TRAIN).judge(contender("leaky", leaky)).reason is not None


def test_errors_are_relative_in_norm():
    exact = Observed({"output": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([10.0]), "b": torch.tensor([0.0])})
    observed = Observed({"output": torch.tensor([3.0, 4.5])}, {"a": torch.tensor([11.0]), "b": torch.tensor([1e-3])})
    found = errors(observed, exact)
    assert found["output"] == pytest.approx(0.1)
    assert found["gradient of a"] == pytest.approx(0.1)
    assert found["gradient of b"] == pytest.approx(0.1)  # over a thousandth of the whole gradient
    assert found["all gradients"] == pytest.approx(0.1, rel=1e-3)
    assert relative_error(torch.zeros(2), torch.zeros(3)) == math.inf


def test_bounds_follow_eagers_error():
    assert allowance("output", 1e-3, TRAIN.storage, "network") == 1.5e-3
    assert allowance("output", 0.0, torch.bfloat16, "network") == 2**-8
    assert allowance("all gradients", 0.2, TRAIN.storage, "network") == pytest.approx(0.3)
    assert allowance("all gradients", 0.0, TRAIN.storage, "network") == 0.03


def test_branches_are_damped_so_that_16_bits_tell_something():
    """Without it the bf16 gradient of a ResNet-50 of random weights is 1.3 away from fp64."""
    model = network("cifar_resnet20").model()
    gammas = {
        name: float(p.detach().mean())
        for name, p in model.named_parameters()
        if name.endswith(("bn1.weight", "bn2.weight"))
    }
    assert {round(gamma, 6) for name, gamma in gammas.items() if "bn2" in name} == {0.2}
    assert {gamma for name, gamma in gammas.items() if "bn1" in name} == {1.0}
