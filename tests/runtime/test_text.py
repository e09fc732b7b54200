"""What a pass is told, written as text and read again."""

import math

import pytest
import torch

from fusedres.activation import IDENTITY, NAMED, leaky_relu
from fusedres.autograd.shortcut import Identity, Projection, ZeroPad
from fusedres.autograd.spec import ChainSpec, LayerSpec
from fusedres.operands import Geometry, Layer, Norm, NormNumbers
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.call import Call
from fusedres.runtime.text import Untold, text_of, value_of

LAYER = LayerSpec(Geometry((2, 2), (1, 1), (1, 1), 4), NormNumbers(1e-3, -0.1, False), leaky_relu(0.2), moments=True)


@pytest.mark.parametrize(
    "value",
    [
        None, True, -3, 1e-5, "a 'name'", torch.bfloat16, (), (1,), (1, (2.5, "three")), *NAMED.values(),
        leaky_relu(0.3), leaky_relu(-1.0), Call(torch.float16, device="cuda", autocast=True), LAYER,
        ChainSpec(Call(torch.float32), SCHEDULES["moments"], (LAYER, LAYER), Projection(LAYER), IDENTITY),
        ChainSpec(Call(torch.float64), SCHEDULES["stats"], (LAYER,), ZeroPad((2, 2))),
    ],
)  # fmt: skip
def test_comes_back(value):
    tensors = []
    text = text_of(value, tensors)
    assert value_of(text) == value and type(value_of(text)) is type(value) and not tensors


def test_tensors_are_told_by_their_places():
    weight, gamma = torch.randn(4, 4, 1, 1), torch.randn(4)
    tensors = []
    text = text_of((Layer(weight, norm=Norm(gamma, gamma)), weight, Identity()), tensors)
    assert [id(tensor) for tensor in tensors] == [id(weight), id(gamma)]
    layer, again, shortcut = value_of(text, tensors)
    assert layer.weight is again is weight and layer.norm.beta is gamma and shortcut == Identity()


@pytest.mark.parametrize("value", [object(), math.inf, math.nan, {1: 2}, (1, [object()]), torch.Size((1, 2))])
def test_refuses_what_a_graph_can_not_carry(value):
    with pytest.raises(Untold, match="expected constants and tensors that a graph can carry, got"):
        text_of(value, [])


@pytest.mark.parametrize("text", ["", "(", "print(1)", "__import__('os')", "t(0)", "torch.nn", "1 + 1", "Layer"])
def test_reads_nothing_but_what_is_known(text):
    with pytest.raises(ValueError, match="spec: expected the text of a fused pass, got"):
        value_of(text)
