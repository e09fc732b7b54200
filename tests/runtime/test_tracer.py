"""fusedres.runtime.tracer: what of a pass is noted, what can not be, and what is kept while it is replayed."""

import pytest
import torch

from fusedres.compiler.binary import ALIGNMENT
from fusedres.runtime.replay import replayed
from fusedres.runtime.tracer import lasting
from tests.runtime.replays import TIMES, assert_same, counting, noted

pytestmark = pytest.mark.usefixtures("no_check")

X = torch.randn(2, 4, 3, 5)
FOREIGN = torch.tensor([2.0])
LASTING = lasting(torch.tensor([2.0]))
UNNOTABLE = {
    "looks at a value": lambda x: x * float(x.sum()),
    "uses a tensor that is no operand": lambda x: x * FOREIGN,
    "gives a tensor that is no operand": lambda x: (x + 1, FOREIGN),
    "counts from where memory begins": lambda x: x.as_strided((2,), (1,), x.storage_offset() + 1) * 2,
}


@pytest.mark.parametrize("function", UNNOTABLE.values(), ids=UNNOTABLE)
def test_what_can_not_be_noted_is_gone_through_each_time(function):
    counted = counting(function)
    for i in range(TIMES):
        x = torch.full((3,), float(i))
        assert_same(replayed(counted, x), function(x))
    assert counted.calls == TIMES and not noted()


def test_a_tensor_kept_for_good_need_not_be_an_operand():
    counted = counting(lambda x: x * LASTING)
    for i in range(TIMES):
        assert torch.equal(replayed(counted, torch.full((3,), float(i))), torch.full((3,), 2.0 * i))
    assert counted.calls == 2


def test_a_tensor_is_let_go_after_its_last_use():
    def chain(x):
        y = x + 1
        for _ in range(5):
            y = y * y
        return y, y[:1]

    for _ in range(2):
        replayed(chain, torch.ones(3))
    (notes,) = noted()
    alive, most = set(), 0
    for step in notes.steps:
        assert all(place == 0 or place in alive for place in step.inputs)
        alive.update(step.outputs)
        most = max(most, len(alive))
        alive.difference_update(step.dead)
    assert most == 2 and len(alive) == 2  # what is given


def views(x):
    """Of an operand and of what is new; behind its beginning and not; of several at once; written to; given."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    behind = x[:, 1:]
    y = torch.zeros(2, 6)
    first, second = y
    left, _, right = second.split([1, 2, 3])
    left.add_(1)
    right.view(3, 1).unsqueeze(0).copy_(rows[:3, :1])
    first.copy_(behind.flatten()[:6])
    return rows.t(), behind, y.view(3, 4)[1], first[:0], y.expand(2, 2, 6)


def test_views_are_those_of_the_operands_at_hand():
    counted = counting(views)
    for i in range(TIMES):
        images = torch.randn(TIMES, 4, 3, 5).to(memory_format=torch.channels_last)
        x = images[i : i + 1]
        assert x.storage_offset() == 60 * i and x.data_ptr() % ALIGNMENT == 0
        assert_same(replayed(counted, x), views(x))
    assert counted.calls == 2


def test_views_that_nothing_uses_are_not_made():
    def function(x):
        return torch.zeros(x.shape).view(-1).unsqueeze(0)[0].view(x.shape).unbind()

    for _ in range(TIMES):
        assert_same(replayed(function, X), function(X))
    (notes,) = noted()
    assert [step.call for step in notes.steps] == [torch.ops.aten.zeros.default, torch.as_strided, torch.unbind]


def test_what_a_call_does_not_give_is_not_kept():
    def function(x):
        y = x * 2
        dx, dw, _ = torch.ops.aten.convolution_backward(
            y, y, y.new_ones(4, 4, 1, 1), [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        assert dx is None
        return dw

    for _ in range(TIMES):
        assert_same(replayed(function, X), function(X))
    assert len(noted()) == 1
