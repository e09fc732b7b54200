"""fusedres.traffic.tensors and .saved: outputs that are no tensors, and what is kept for all of them."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fusedres.traffic.saved import saved_bytes
from fusedres.traffic.tensors import first_tensor, tensors_in


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
    features: tuple[Tensor, ...] = ()


z, aux = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [[z, aux], (None, z, 3, [aux]), OrderedDict(out=z, aux=aux), {"a": {"b": (z,)}, "c": aux}, Output(None, z, (aux,))],
    ids=["a list", "a tuple with others", "a dict", "nested", "a dataclass"],
)
def test_tensors_are_found_in_their_order(output):
    found = list(tensors_in(output))
    assert len(found) == 2 and found[0] is z and found[1] is aux
    assert first_tensor(output) is z


def test_an_output_of_transformers_is_gone_through_once():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    found = outputs.ImageClassifierOutputWithNoAttention(logits=z, hidden_states=(aux,))
    assert [id(tensor) for tensor in tensors_in(found)] == [id(z), id(aux)]


def test_an_output_without_tensors_is_refused():
    with pytest.raises(ValueError, match="model: expected one that gives a tensor, or several, got a list"):
        first_tensor([None, 3])


def test_what_is_kept_for_several_outputs_is_the_sum():
    x, y = torch.rand(10, requires_grad=True), torch.rand(7, requires_grad=True)

    class Two(nn.Module):
        def forward(self):
            return x.square().exp(), y.exp()

    both = saved_bytes(Two(), lambda model: model()).total
    # x and exp(x ** 2), and exp(y).
    assert both == 4 * (10 + 10 + 7)
    assert saved_bytes(Two(), lambda model: model()[1:]).total == both
