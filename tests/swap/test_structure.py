"""Networks that others might have written are fused fully, by what their forwards compute, and stay what they are."""

import pickle

import pytest
import torch
from torch import nn

import fusedres
from fusedres.patterns.choose import AUTO
from tests.nn.twins import assert_unchanged, plain_copy, randomised, snapshot, tensor
from tests.swap.accounts import assert_same_numbers, norms_called, norms_left, passed
from tests.zoo.networks import NETWORKS, Network

each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def made(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return randomised(network.make()).double()


@each_network
def test_every_batch_norm_is_in_a_fused_pass(network):
    model = fusedres.fuse(made(network))
    x = tensor(*network.shape)
    for mode in (True, False):
        model.train(mode)
        left = norms_left(model)
        assert len(left) == network.left, left
        # With gradients, "auto" is fused in evaluation, too.
        assert norms_called(model, x) == set(left)


@pytest.mark.parametrize(
    ("schedule", "layout"), [(AUTO, torch.contiguous_format), ("moments", torch.channels_last)], ids=[AUTO, "moments"]
)
@each_network
def test_passes_are_those_of_the_plain_network(network, schedule, layout):
    fused = fusedres.fuse(made(network), schedule=schedule)
    layout = torch.contiguous_format if network.views else layout
    assert_same_numbers(fused, plain_copy(fused), tensor(*network.shape).contiguous(memory_format=layout))


@each_network
def test_only_classes_change_and_they_change_back(network):
    model = made(network)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    state, before, drawn = list(model.state_dict()), snapshot(model), torch.get_rng_state()
    fusedres.fuse(model)
    assert torch.equal(torch.get_rng_state(), drawn), "fuse has drawn random numbers"
    assert_unchanged(model, before)
    assert list(model.state_dict()) == state
    assert any(type(module) is not classes[name] for name, module in model.named_modules())
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    fusedres.unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: list(vars(module)) for name, module in model.named_modules()} == attributes
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "network",
    [network for network in NETWORKS.values() if network.pickles],
    ids=[name for name, network in NETWORKS.items() if network.pickles],
)
def test_a_pickled_network_is_fused_where_it_is_read(network):
    fused = fusedres.fuse(made(network))
    again = pickle.loads(pickle.dumps(fused))
    assert {name: type(module) for name, module in again.named_modules()} == {
        name: type(module) for name, module in fused.named_modules()
    }
    assert len(norms_left(again)) == network.left
    x = tensor(*network.shape)
    ours, theirs = passed(again, x), passed(fused, x)
    assert torch.equal(ours.z, theirs.z) and torch.equal(ours.dx, theirs.dx)
