"""fusedres.runtime.replay: passes done again without going through them, and when they are not."""

import dataclasses
import functools
import weakref

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.activation import IDENTITY
from fusedres.autograd.dense import DenseLayerSpec, DenseSpec
from fusedres.autograd.ends import AddActSpec, BNAddActSpec, BNPReLUSpec
from fusedres.autograd.preact import PreActSpec
from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, Shortcut, ZeroPad
from fusedres.autograd.spec import ChainSpec, LayerSpec, StemSpec
from fusedres.compiler.binary import ALIGNMENT
from fusedres.operands import Geometry, NormNumbers, Partials, PoolGeometry
from fusedres.plan.schedule import SCHEDULES
from fusedres.plan.tiles import listed
from fusedres.runtime import replay
from fusedres.runtime.call import Call
from fusedres.runtime.holding import HELD, Holding
from fusedres.runtime.replay import replayed
from fusedres.runtime.weights import rounded
from tests.runtime.replays import TIMES, assert_same, block, counting, noted

pytestmark = pytest.mark.usefixtures("no_check")


def many_kinds_of_calls(x, pair, factor):
    """Out of place, in place, of lists, of keywords, giving lists, tuples and views, operands among what is given."""
    a, b = pair
    sums = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    first, second = sums
    torch.sum(x, (0, 2, 3), out=first)
    second.copy_(x.amax((0, 2, 3))).mul_(factor)
    both = torch.cat([a, b, first])
    largest, where = both.max(0, keepdim=True)
    halves = both.split([2, both.numel() - 2])
    torch._foreach_add_([a, b], [second[:2], second[2:4]])
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return {"x": x}["x"], (torch.addmm(first[:3], rows[:, :2], torch.ones(2, 3)), largest, where), halves[1], factor


def test_operands_of_the_last_replay_are_freed_behind_their_last_use(monkeypatch):
    held, left, made = [], [], torch.empty_strided

    def watching(*args, **kwargs):
        left.append([tensor() is not None for tensor in held])
        return made(*args, **kwargs)

    def function(x, unused, y):
        doubled = x * 2
        return torch.empty(3).copy_(doubled), y + doubled

    monkeypatch.setattr(torch, "empty_strided", watching)
    for _ in range(TIMES):
        given = [torch.full((3,), float(i)) for i in range(3)]
        held[:] = map(weakref.ref, given)
        result = replay.replayed_at_last(function, given, lambda: None)
        assert_same(result, (torch.zeros(3), torch.full((3,), 2.0)))
    assert left == [[False, False, True]] * (TIMES - 2) and given == []


def operands(seed=0, size=(2, 4, 3, 5)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator).to(memory_format=torch.channels_last)
    return x, (torch.randn(2, generator=generator), torch.randn(2, generator=generator)), 3


def test_later_calls_do_the_same_without_the_function():
    function = counting(many_kinds_of_calls)
    for seed in range(TIMES):
        ours, theirs = operands(seed), operands(seed)
        result, expected = replayed(function, *ours), many_kinds_of_calls(*theirs)
        assert_same(result, expected)
        assert_same(ours[1], theirs[1])  # written to
        assert result[0] is ours[0]
    assert function.calls == 2


def aligned(tensor: Tensor, by: int) -> Tensor:
    """A copy that begins ``by`` elements behind an aligned address."""
    memory = torch.empty(tensor.numel() + 64)
    begin = -(memory.data_ptr() // 4) % ALIGNMENT + by
    copied = memory.as_strided(tensor.shape, tensor.stride(), begin)
    return copied.copy_(tensor)


X = torch.randn(2, 4, 3, 5)
KINDS = {
    "another shape": (X[:, :, :2].clone(), 2),
    "another layout": (X.to(memory_format=torch.channels_last), 2),
    "another dtype": (X.double(), 2),
    "another address within a sector": (aligned(X, 1), 2),
    "another constant": (aligned(X, 0), 3),
    "a constant of another type": (aligned(X, 0), 2.0),
    "a tensor for a constant": (aligned(X, 0), torch.tensor(2.0)),
    "nothing": (aligned(X, 0), None),
}


@pytest.mark.parametrize(("x", "factor"), KINDS.values(), ids=KINDS)
def test_operands_of_another_kind_are_gone_through(x, factor):
    @counting
    def scaled(x, factor):
        return x.clone() if factor is None else x * factor

    for _ in range(TIMES):
        replayed(scaled, aligned(X, 0), 2)
    assert scaled.calls == 2
    assert_same(replayed(scaled, x, factor), x.clone() if factor is None else x * factor)
    assert scaled.calls == 3


def test_a_tensor_given_twice_is_another_kind_than_two():
    @counting
    def difference(a, b):
        return a - b

    a, b = torch.randn(3), torch.randn(3)
    for _ in range(TIMES):
        assert torch.equal(replayed(difference, a, a), torch.zeros(3))
        assert torch.equal(replayed(difference, a, b), a - b)
        assert torch.equal(replayed(difference, b, a), b - a)
    assert difference.calls == 4


@dataclasses.dataclass(frozen=True)
class Holder(Holding):
    """Holders are all equal."""

    tensor: Tensor = dataclasses.field(compare=False, metadata=HELD)


def test_what_constants_hold_is_an_operand():
    @counting
    def added(x, holder):
        return x + holder.tensor

    for i in range(TIMES):
        holder = Holder(torch.full((3,), float(i)))
        assert torch.equal(replayed(added, torch.ones(3), holder), torch.full((3,), 1.0 + i))
    assert added.calls == 2


def test_no_tensor_outlives_its_call(no_collector):
    seen = []

    def watched(tensor):
        seen.append(weakref.ref(tensor))
        return tensor

    def function(x, holder):
        y = watched(x + holder.tensor)
        return torch.cat([y, watched(y * 2)])

    for _ in range(TIMES):
        result = replayed(function, watched(torch.ones(3)), Holder(watched(torch.ones(3))))
        watched(result)
        del result
    assert len(seen) == 3 * TIMES + 2 * 2
    assert [ref() for ref in seen] == [None] * len(seen)


CALL, OTHER_CALL = Call(torch.float32), Call(torch.bfloat16)
LAYER = LayerSpec(Geometry(), NormNumbers())
OTHER_LAYER = LayerSpec(Geometry(), NormNumbers(), moments=True)
PARTIALS = Partials(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2))
STATS = SCHEDULES["stats"]
SPECS = [
    LAYER,
    ChainSpec(CALL, STATS, (LAYER,), Projection(LAYER)),
    StemSpec(CALL, STATS, LAYER, PoolGeometry()),
    PreActSpec(CALL, STATS, (LAYER,), Identity(), NormNumbers()),
    DenseSpec(CALL, STATS, (DenseLayerSpec(NormNumbers(), (LAYER,)),)),
    BNAddActSpec(CALL, NormNumbers()),
    BNPReLUSpec(CALL, NormNumbers()),
    AddActSpec(CALL),
    Shortcut(),
]
OTHERS = {
    "call": [OTHER_CALL], "schedule": [SCHEDULES["moments"]], "geometry": [Geometry((2, 2))],
    "layers": [(LAYER, LAYER), (OTHER_LAYER,), (DenseLayerSpec(NormNumbers(), (OTHER_LAYER,)),)],
    "layer": [OTHER_LAYER], "norm": [NormNumbers(eps=1.0)], "residual_norm": [NormNumbers()], "act": [IDENTITY],
    "shortcut": [NO_SHORTCUT, Identity(), ZeroPad((2, 2)), ZeroPad((1, 2)), Residual(), Projection(OTHER_LAYER)],
    "moments": [True], "hands_over": [True], "pool": [PoolGeometry((2, 2))], "images_grad": [True], "measured": [True],
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_compared_by_everything_but_tensors(spec):
    for field in dataclasses.fields(spec):
        if field.compare:
            others = [dataclasses.replace(spec, **{field.name: other}) for other in OTHERS[field.name]]
            found = {spec.compared, *(other.compared for other in others)}
            assert len(found) == 1 + len(others) - (getattr(spec, field.name) in OTHERS[field.name]), field.name
        else:
            assert set(dataclasses.replace(spec, **{field.name: PARTIALS}).held) >= set(PARTIALS)


def test_what_the_layers_of_a_spec_hold_is_held_by_it():
    tensors = [torch.ones(1), torch.zeros(1)]
    layers = [dataclasses.replace(LAYER, rounded=tensor) for tensor in tensors]
    spec = ChainSpec(CALL, STATS, (LAYER, layers[0]), Projection(layers[1]))
    assert [tensor for tensor in spec.held if tensor is not None] == tensors
    assert spec.compared == ChainSpec(CALL, STATS, (LAYER, LAYER), Projection(LAYER)).compared
    dense = DenseSpec(CALL, STATS, (DenseLayerSpec(NormNumbers(), tuple(layers)),))
    assert [tensor for tensor in dense.held if tensor is not None] == tensors


def test_the_rounded_weights_of_a_step_are_not_kept(monkeypatch, no_collector):
    made = []
    monkeypatch.setattr(
        "fusedres.patterns.door.rounded", lambda *given: [made.append(one) or one for one in rounded(*given)]
    )
    model = block()
    for _ in range(TIMES):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 16, 5, 5)).sum().backward()
    assert len(noted()) == 2 and len(made) == 4 * TIMES
    seen = [weakref.ref(weight) for weight in made]
    made.clear()
    assert [ref() for ref in seen] == [None] * len(seen)


class Named(Tensor):
    """A tensor of a class of its own, as sharded ones are."""


@pytest.mark.parametrize(
    "x", [torch.randn(3).as_subclass(Named), torch.randn(3, device="meta")], ids=["of a subclass", "without memory"]
)
def test_tensors_that_are_not_plain_are_not_noted(x):
    counted = counting(lambda x: x + 1)
    for _ in range(TIMES):
        assert type(replayed(counted, x)) is type(x)
    assert counted.calls == TIMES and not replay._notes and not replay._seen


def test_parameters_are_plain_tensors():
    counted = counting(lambda x: x + 1)
    for _ in range(TIMES):
        with torch.no_grad():
            replayed(counted, nn.Parameter(torch.ones(3)))
    assert counted.calls == 2


def test_nothing_is_noted_of_a_pass_that_fails():
    def fails(x):
        raise ValueError("no")

    for _ in range(TIMES):
        with pytest.raises(ValueError, match="no"):
            replayed(fails, torch.ones(3))
    assert not noted()
    test_parameters_are_plain_tensors()


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


OBSERVERS = {
    "launches are recorded": fusedres.record,
    "tiles are chosen by hand": functools.partial(listed, 1),
    "calls are followed": Watching,
    "it is off": replay.off,
}


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_passes_are_gone_through_while(observer):
    counted = counting(lambda x: x + 1)
    for _ in range(TIMES):
        replayed(counted, torch.ones(3))
    with observer():
        replayed(counted, torch.ones(3))
    assert counted.calls == 3


def test_notes_are_of_one_backend():
    counted = counting(lambda x: x + 1)
    for name in ("native", "reference"):
        with fusedres.backend(name):
            for _ in range(TIMES):
                replayed(counted, torch.ones(3))
    assert counted.calls == 4


def test_notes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(replay, "MOST_NOTES", 3)
    counted = counting(torch.neg)
    for _ in range(2):
        replayed(counted, torch.ones(20))
    for i in range(10):
        replayed(counted, torch.ones(i + 1))
    assert len(replay._seen) == 3
    calls = counted.calls
    replayed(counted, torch.ones(20))
    assert counted.calls == calls, "what came once drove out what came twice"
    for i in range(10):
        for _ in range(2):
            replayed(counted, torch.ones(30 + i))
    assert len(replay._notes) == 3
