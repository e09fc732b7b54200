"""fusedres.replay: passes done again without going through them, and when they are not."""

import dataclasses
import functools
import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import replay, switches
from fusedres.autograd.bn_add_act import BNAddActSpec
from fusedres.autograd.dense import DenseLayerSpec, DenseSpec
from fusedres.autograd.preact import PreActSpec
from fusedres.autograd.spec import ChainSpec, LayerSpec, NormSpec, StemSpec
from fusedres.launch import launch
from fusedres.offline import ALIGNMENT
from fusedres.ops.contract import Geometry, Partials, PoolGeometry
from fusedres.plan import SCHEDULES
from fusedres.plan.tiles import listed
from fusedres.replay import Holding, Notes, lasting, replayed
from fusedres.rounded import rounded
from tests.nn.twins import plain_copy, randomised
from tests.small_kernels import copy_kernel, triton
from tests.vgpu_support import needs_vgpu


@pytest.fixture(autouse=True)
def no_check(monkeypatch):
    """What is counted here are the passes without the one that strictness adds; test_replay_strict has that."""
    monkeypatch.setattr(switches, "STRICT", False)


TIMES = 4  # the second call is noted, later ones go by the notes


def counting(function):
    """The function, and how often it was gone through."""

    @functools.wraps(function)
    def counted(*operands):
        counted.calls += 1
        return function(*operands)

    counted.calls = 0
    return counted


def noted() -> list[Notes]:
    return [notes for notes in replay._notes.values() if isinstance(notes, Notes)]


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


def operands(seed=0, size=(2, 4, 3, 5)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator).to(memory_format=torch.channels_last)
    return x, (torch.randn(2, generator=generator), torch.randn(2, generator=generator)), 3


def flat(result) -> list:
    return [one for part in result for one in flat(part)] if isinstance(result, tuple) else [result]


def assert_same(ours, theirs):
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        else:
            assert one == other


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


class Holder(Holding):
    """Holders are all equal."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def compared(self):
        return ()

    @property
    def held(self):
        return (self.tensor,)


def test_what_constants_hold_is_an_operand():
    @counting
    def added(x, holder):
        return x + holder.tensor

    for i in range(TIMES):
        holder = Holder(torch.full((3,), float(i)))
        assert torch.equal(replayed(added, torch.ones(3), holder), torch.full((3,), 1.0 + i))
    assert added.calls == 2


@pytest.fixture
def no_collector():
    """What is kept alive by a cycle stays so, as it may for long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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


LAYER = LayerSpec(Geometry(), NormSpec())
OTHER_LAYER = LayerSpec(Geometry(), NormSpec(), moments=True)
PARTIALS = Partials(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2))
SPECS = [
    ChainSpec((LAYER,), SCHEDULES["stats"], torch.float32),
    StemSpec(LAYER, PoolGeometry(), SCHEDULES["stats"], torch.float32),
    PreActSpec(NormSpec(), (LAYER,), SCHEDULES["stats"], torch.float32),
    DenseSpec((DenseLayerSpec(NormSpec(), (LAYER,)),), SCHEDULES["stats"]),
    BNAddActSpec(NormSpec()),
]
OTHERS = {
    "layers": (LAYER, LAYER), "layer": OTHER_LAYER, "schedule": SCHEDULES["moments"], "dtype": torch.bfloat16,
    "projection": LAYER, "shortcut": "zero_pad", "act": None, "zero_pad_stride": (2, 2), "hands_over": True,
    "pool": PoolGeometry((2, 2)), "norm": NormSpec(eps=1.0), "residual_norm": NormSpec(), "measured": True,
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_compared_by_everything_but_tensors(spec):
    for field in dataclasses.fields(spec):
        if field.compare:
            other = OTHERS[field.name]
            if isinstance(spec, DenseSpec) and field.name == "layers":
                other = (DenseLayerSpec(NormSpec(), (OTHER_LAYER,)),)
            changed = dataclasses.replace(spec, **{field.name: other})
            assert changed.compared != spec.compared, field.name
            hash(changed.compared)
        else:
            assert set(dataclasses.replace(spec, **{field.name: PARTIALS}).held) >= set(PARTIALS)


def test_the_rounded_weights_of_a_step_are_not_kept(monkeypatch, no_collector):
    made = []
    monkeypatch.setattr("fusedres.chain.rounded", lambda *given: [made.append(one) or one for one in rounded(*given)])
    model = block()
    for _ in range(TIMES):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 16, 5, 5)).sum().backward()
    assert len(noted()) == 2 and len(made) == 4 * TIMES
    seen = [weakref.ref(weight) for weight in made]
    made.clear()
    assert [ref() for ref in seen] == [None] * len(seen)


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


# --- fused blocks ---


def block(**changes) -> nn.Module:
    torch.manual_seed(0)
    return randomised(fusedres.nn.Bottleneck(16, 8, **changes))


def three_steps(model: nn.Module, size=(2, 16, 5, 5)) -> list[Tensor]:
    """Outputs, gradients and running statistics of each."""
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(size).to(memory_format=torch.channels_last).requires_grad_()
        model.zero_grad(set_to_none=True)
        z = model(x)
        z.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        seen += [z, x.grad, *grads, *(buffer.clone() for buffer in model.buffers())]
    return seen


def frozen(model: nn.Module) -> None:
    model.conv2.weight.requires_grad_(False)


def cumulative(model: nn.Module) -> None:
    model.bn1.momentum = None  # another number at each step


CHANGES = {
    "trained": (lambda model: None, 2),
    "with a frozen weight": (frozen, 2),
    "with frozen statistics": (lambda model: model.bn2.eval(), 2),
    "with a cumulative average": (cumulative, 0),
}


@pytest.mark.parametrize("name", ["native", "reference", pytest.param("vgpu:sm_90", marks=needs_vgpu)])
@pytest.mark.parametrize(("change", "passes"), CHANGES.values(), ids=CHANGES)
def test_steps_of_a_block_are_the_same_bits(change, passes, name):
    ours, theirs = block(), block()
    change(ours)
    change(theirs)
    with fusedres.backend(name):
        steps = three_steps(ours)
        assert len(noted()) == passes
        with replay.off():
            assert_same(tuple(steps), tuple(three_steps(theirs)))


@needs_vgpu
def test_launches_are_done_again(monkeypatch):
    started = []
    execute = fusedres.launch._execute
    monkeypatch.setattr(
        fusedres.launch, "_execute", lambda *given: (started.append(given[0].__name__), execute(*given))
    )
    steps = []
    model = block()
    with fusedres.backend("vgpu:sm_90"):
        for _ in range(TIMES):
            started.clear()
            model(torch.randn(2, 16, 5, 5)).sum().backward()
            steps.append(list(started))
    assert steps[0] and all(step == steps[0] for step in steps)


@pytest.mark.parametrize("name", ["native", pytest.param("vgpu:sm_90", marks=needs_vgpu)])
def test_inference_sees_new_parameters(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = block().eval()
    plain = plain_copy(model)
    with fusedres.backend(name), torch.no_grad():
        for i in range(TIMES):
            for one in (model, plain):
                one.bn2.running_mean.fill_(0.1 * i)
                one.conv1.weight.mul_(1.5)
            x = torch.randn(2, 16, 5, 5)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


# --- on a GPU ---


class Launcher:
    """Stands for what hands a binary and its arguments to the driver."""

    started: ClassVar[list[tuple]] = []

    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        Launcher.started.append((self.name, (x, y, z), stream, arguments))


@pytest.fixture
def gpu(monkeypatch):
    """Tensors and Triton as on a GPU of which nothing is there but the compiler."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    properties = {"max_shared_mem": 232448}
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 7, launcher_cls=Launcher,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties, unload_module=lambda module: None,
            load_binary=lambda name, binary, shared, device: (1, 2, 32, 0, 1024),
        ),
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr("fusedres.launch._device_target", lambda index: fusedres.offline.TARGETS["sm_90"])
    Launcher.started.clear()
    yield
    # While the driver is there that its binaries are told to be unloaded by.
    copy_kernel.device_caches.clear()
    replay._notes.clear()
    gc.collect()


@needs_vgpu
def test_a_launch_on_a_gpu_is_done_again_with_the_same_arguments(gpu):
    def copied(x, block):
        y = torch.empty_like(x)
        arguments = {"x_ptr": x, "y_ptr": y, "rows": x.shape[0], "C": x.shape[1], "BLOCK_ROWS": block, "BLOCK_C": 32}
        launch(copy_kernel, (triton.cdiv(x.shape[0], block),), arguments, reads=["x_ptr"], writes=["y_ptr"])
        return y

    given = []
    for _ in range(TIMES):
        x = torch.randn(10, 24)
        given.append((x, replayed(copied, x, 4)))
    assert len(noted()) == 1 and len(Launcher.started) == TIMES
    for (x, y), (name, grid, stream, arguments) in zip(given, Launcher.started, strict=True):
        assert (name, grid, stream) == ("copy_kernel", (3, 1, 1), 7)
        named = dict(zip(copy_kernel.arg_names, arguments, strict=True))
        assert named.pop("x_ptr") is x and named.pop("y_ptr") is y
        assert named == {"rows": 10, "C": 24, "BLOCK_ROWS": 4, "BLOCK_C": 32}
