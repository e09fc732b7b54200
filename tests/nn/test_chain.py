"""fusedres.nn.chain: blocks are taken apart by what their parts are."""

import pytest
import torch
from torch import nn

import fusedres
from fusedres.activation import IDENTITY, NAMED, RELU
from fusedres.nn.chain import block_parts, residual_parts
from fusedres.nn.parts import NotFusable, part, parts_in_order
from tests.nn.twins import assert_twins, plain_copy, randomised, tensor


@pytest.mark.parametrize("act", [None, *NAMED])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_with_any_activation_computes_what_its_twin_does(act, training):
    layer = randomised(fusedres.nn.ConvBNAct(5, 6, act=act).double()).train(training)
    plain = plain_copy(layer)
    assert [row.fused for row in fusedres.report(layer)] == [True]
    assert_twins(layer, plain, tensor(2, 5, 6, 7), tensor(2, 5, 6, 7, seed=2))
    y = plain.bn(plain.conv(tensor(2, 5, 6, 7)))
    torch.testing.assert_close(plain(tensor(2, 5, 6, 7)), y if act is None else NAMED[act].value(y))


def test_a_layer_is_scripted_with_its_activation():
    layer = fusedres.nn.ConvBNAct(3, 4, act="relu").eval()
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(torch.ones(1, 3, 4, 4)), layer(torch.ones(1, 3, 4, 4)))


def test_the_activation_of_a_live_layer_may_be_another_one():
    layer = fusedres.nn.ConvBNAct(5, 6).double()
    layer.act = nn.Identity()
    assert [row.fused for row in fusedres.report(layer)] == [True]
    assert_twins(layer, plain_copy(layer), tensor(2, 5, 6, 7))
    layer.act = nn.CELU()
    assert [row.reason for row in fusedres.report(layer)] == ["act is a CELU, which no fused pass computes"]
    assert_twins(layer, plain_copy(layer), tensor(2, 5, 6, 7))


def block(**acts: nn.Module) -> nn.Module:
    """Three layers, and an activation of its own behind each."""
    module = fusedres.nn.plain.Bottleneck(8, 2)
    for name in ("act1", "act2", "act3"):
        module.add_module(name, acts.get(name, nn.ReLU()))
    return module


ACTS = ("act1", "act2", "act3")


def test_the_activation_behind_the_sum_may_differ_from_those_between_layers():
    parts = residual_parts(block(act3=nn.Identity()), 3, ACTS)
    assert (parts.inner, parts.act) == (RELU, IDENTITY)
    parts = residual_parts(block(), 3, ("act1",))
    assert (parts.inner, parts.act) == (RELU, RELU)


@pytest.mark.parametrize(
    ("acts", "reason"),
    [
        ({"act2": nn.Identity()}, "act2 is another activation than act1"),
        ({"act1": nn.CELU()}, "act1 is a CELU, which no fused pass computes"),
        ({"act3": nn.CELU()}, "act3 is a CELU, which no fused pass computes"),
    ],
)
def test_activations_between_layers_are_the_same_one(acts, reason):
    with pytest.raises(NotFusable, match=reason):
        residual_parts(block(**acts), 3, ACTS)


def test_a_single_layer_has_no_activation_between_layers():
    layer = nn.ModuleDict({"0": nn.Conv2d(3, 4, 1), "1": nn.BatchNorm2d(4), "2": nn.Identity()})
    assert block_parts(layer, [("0", "1")], ["2"], shortcut="none").act == IDENTITY


def test_parts_are_found_by_their_full_names():
    holder = nn.ModuleDict({"f": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())})
    assert part(holder, "f.0") is holder["f"][0]
    assert parts_in_order(holder, "f", "0", "1", "2") == ["f.0", "f.1", "f.2"]
    parts = block_parts(holder, [("f.0", "f.1")], ["f.2"], shortcut="none", others=["f"])
    assert parts.convs == (holder["f"][0],) and [name for name, _ in parts.others] == ["f.2", "f"]
    for name, reason in (("f.3", "f.3 is missing"), ("g.0", "g.0 is missing")):
        with pytest.raises(NotFusable, match=reason):
            part(holder, name)
    with pytest.raises(NotFusable, match="expected f to hold 0, 1, found 0, 1, 2"):
        parts_in_order(holder, "f", "0", "1")
    with pytest.raises(NotFusable, match=r"f\.0 is a Conv2d, not a plain sequence"):
        parts_in_order(holder, "f.0")
