"""fusedres.nn.blocks: the project's blocks compute what their plain twins compute."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import (
    assert_same_pass,
    assert_twins,
    assert_unchanged,
    plain_copy,
    randomised,
    run,
    snapshot,
    tensor,
)

EVERY_SCHEDULE = [AUTO, *SCHEDULES]


class Case(NamedTuple):
    block: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    size: tuple[int, int, int, int]

    def make(self, schedule: str = AUTO, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(fusedres.nn, self.block)(*self.arguments, **self.keywords).to(dtype)
        return fusedres.fuse(randomised(block), schedule=schedule)

    def x(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        return tensor(*self.size, seed=seed, dtype=dtype)


CASES = {
    "plain 3x3": Case("ConvBNAct", (6, 10), {}, (3, 6, 5, 7)),
    "no activation": Case("ConvBNAct", (6, 10, 1), {"act": None}, (3, 6, 5, 7)),
    "1x1 with room for moments": Case("ConvBNAct", (4, 16, 1), {}, (3, 4, 5, 7)),
    "strided 1x1 reads every other pixel": Case("ConvBNAct", (4, 16, 1, 2), {}, (3, 4, 5, 8)),
    "1x1 whose padding is normalised too": Case("ConvBNAct", (4, 16, 1), {"padding": 1}, (2, 4, 3, 5)),
    "a bias before the batch norm": Case("ConvBNAct", (6, 10), {"bias": True}, (3, 6, 5, 7)),
    "bias in the moments form": Case("ConvBNAct", (4, 16, 1), {"bias": True}, (3, 4, 5, 7)),
    "groups, stride and dilation together": Case(
        "ConvBNAct", (6, 9, 3, 2), {"groups": 3, "dilation": 2}, (2, 6, 9, 11)
    ),
    "depthwise": Case("ConvBNAct", (6, 6, 3), {"groups": 6}, (2, 6, 5, 7)),
    "one channel in, 7x7, stride 2": Case("ConvBNAct", (1, 5, 7, 2), {}, (2, 1, 13, 11)),
    "basic, identity": Case("BasicBlock", (6, 6), {}, (3, 6, 5, 7)),
    "basic, projection at an odd size": Case("BasicBlock", (6, 10, 2), {}, (3, 6, 7, 5)),
    "basic, projection at stride 1": Case("BasicBlock", (6, 10), {}, (3, 6, 4, 5)),
    "basic, zero-pad by an odd number": Case("BasicBlock", (6, 11, 2), {"shortcut": "zero_pad"}, (3, 6, 7, 5)),
    "bottleneck, identity": Case("Bottleneck", (16, 4), {}, (3, 16, 5, 7)),
    "bottleneck, projection": Case("Bottleneck", (4, 4), {}, (3, 4, 5, 7)),
    "bottleneck, projection too wide for moments": Case("Bottleneck", (24, 4), {}, (3, 24, 5, 7)),
    "bottleneck, strided at an odd size": Case("Bottleneck", (6, 4, 2), {}, (3, 6, 7, 5)),
    "bottleneck, zero-pad": Case("Bottleneck", (6, 4, 2), {"shortcut": "zero_pad"}, (3, 6, 7, 5)),
    "bottleneck, groups": Case("Bottleneck", (8, 4), {"groups": 3, "base_width": 32}, (3, 8, 5, 4)),
    "bottleneck, wide": Case("Bottleneck", (16, 4), {"base_width": 128}, (3, 16, 5, 4)),
    "bottleneck, dilated": Case("Bottleneck", (16, 4), {"dilation": 2}, (2, 16, 6, 5)),
    "bottleneck, batch 1": Case("Bottleneck", (4, 4, 2), {}, (1, 4, 6, 5)),
    "bottleneck, one pixel": Case("Bottleneck", (4, 4), {}, (5, 4, 1, 1)),
}
FEW = ("bias in the moments form", "basic, identity", "basic, projection at an odd size",
       "bottleneck, identity", "bottleneck, projection", "bottleneck, zero-pad")  # fmt: skip


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [CASES[name] for name in names or CASES], ids=names or list(CASES))


schedules = pytest.mark.parametrize("schedule", EVERY_SCHEDULE)


@cases()
@schedules
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_twins_in_fp64(case, schedule, training):
    fused = case.make(schedule).train(training)
    plain = plain_copy(fused)
    assert fusedres.report(fused)[0].fused
    assert type(plain) is getattr(fusedres.nn.plain, case.block)
    assert_twins(fused, plain, case.x())


@cases(*FEW)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_statistics_under_every_grad_mode(case, mode, training):
    fused = case.make().train(training)
    plain = plain_copy(fused)
    with mode():
        ours, theirs = fused(case.x()), plain(case.x())
    assert relative_error(ours, theirs) <= 1e-10
    assert ours.requires_grad == theirs.requires_grad
    assert ours.is_inference() == theirs.is_inference()
    for name, buffer in plain.named_buffers():
        ours = dict(fused.named_buffers())[name]
        assert relative_error(ours, buffer) <= 1e-10, name


def norms(block: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def convs(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def every_norm(**attributes: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for bn in norms(block):
            for name, value in attributes.items():
                setattr(bn, name, value)

    return change


def made_anew(**keywords: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.BatchNorm2d(child.num_features, **keywords).double())

    return change


def biased(block: nn.Module) -> None:
    for conv in convs(block):
        conv.bias = nn.Parameter(tensor(conv.out_channels, seed=3))


def frozen(choose: Callable[[nn.Module], list[nn.Module]]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for module in choose(block):
            module.requires_grad_(False)

    return change


def in_eval(choose: Callable[[nn.Module], list[nn.Module]]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for module in choose(block):
            module.eval()

    return change


def beta_dropped(block: nn.Module) -> None:
    for bn in norms(block):
        bn.register_parameter("bias", None)


def uncounted(block: nn.Module) -> None:
    for bn in norms(block):
        bn.num_batches_tracked = None


VARIANTS = {
    "cumulative average": every_norm(momentum=None),
    "momentum 0.3": every_norm(momentum=0.3),
    "momentum 0 keeps the statistics": every_norm(momentum=0.0),
    "momentum 1 forgets the past": every_norm(momentum=1.0),
    "a large eps": every_norm(eps=0.5),
    "no running statistics": made_anew(track_running_stats=False),
    "no running statistics, cumulative": made_anew(track_running_stats=False, momentum=None),
    "tracking switched off later": every_norm(track_running_stats=False),
    "no affine parameters": made_anew(affine=False),
    "gamma without beta": beta_dropped,
    "no counter": uncounted,
    "biased convolutions": biased,
    "biased convolutions, cumulative": lambda block: (biased(block), every_norm(momentum=None)(block)),
    "frozen batch norm": in_eval(norms),
    "frozen batch norm, biased": lambda block: (biased(block), in_eval(norms)(block)),
    "first batch norm frozen": in_eval(lambda block: norms(block)[:1]),
    "last batch norm frozen": in_eval(lambda block: norms(block)[-1:]),
    "all but the first batch norm frozen": in_eval(lambda block: norms(block)[1:]),
    "convolutions take no gradient": frozen(convs),
    "batch norms take no gradient": frozen(norms),
    "first convolution takes no gradient": frozen(lambda block: convs(block)[:1]),
    "last convolution takes no gradient": frozen(lambda block: convs(block)[-1:]),
    "only the first batch norm takes a gradient": frozen(lambda block: convs(block) + norms(block)[1:]),
    "no parameter takes a gradient": frozen(lambda block: [block]),
}


@cases(*FEW)
@pytest.mark.parametrize("schedule", [AUTO, "stats", "moments"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_kinds_of_batch_norm(case, schedule, variant):
    """Three batches in training and one in eval, each compared in full."""
    fused = case.make(schedule)
    variant(fused)
    plain = plain_copy(fused)
    assert fusedres.report(fused)[0].fused
    assert_twins(fused, plain, *(case.x(seed=seed) for seed in (1, 2, 3)))
    assert_twins(fused.eval(), plain.eval(), case.x(seed=4))


@cases(*FEW)
def test_an_image_without_gradient_costs_none(case):
    fused = case.make()
    plain = plain_copy(fused)
    for module in (fused, plain):
        module.zero_grad()
        module(case.x()).sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        scale = max(float(theirs.grad.norm()), 1e-3)
        assert relative_error(ours.grad, theirs.grad, scale) <= 1e-10, name


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other row of a larger image": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one image expanded over the batch": lambda x: x[:1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}  # fmt: skip


@cases(*FEW)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layouts(case, layout, training):
    fused = case.make().train(training)
    plain = plain_copy(fused)
    x = layout(case.x())
    copies = x.clone()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            z = fused(x)
            assert z.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(z, plain(x)) <= 1e-10
    assert torch.equal(x, copies), "the input was written to"
    assert_same_pass(run(fused, x), run(plain, x))


@cases(*FEW)
def test_a_gradient_of_any_layout(case):
    """What arrives from behind may be expanded (of a sum) or NCHW."""
    fused = case.make()
    plain = plain_copy(fused)
    for dz in (tensor(1, seed=9).expand(fused(case.x()).shape), tensor(*fused(case.x()).shape, seed=9)):
        plain.load_state_dict(fused.state_dict())
        assert_same_pass(run(fused, case.x(), dz), run(plain, case.x(), dz))


@cases(*FEW)
@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 input", "bf16 input"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_autocast_bf16(case, schedule, dtype, mode):
    """Dtypes are eager's (an fp32 identity promotes the sum) and the values as close to fp64's."""
    fused = case.make(schedule, torch.float32).train(mode == "train")
    plain = plain_copy(fused)
    exact = plain_copy(fused).double()
    x = case.x(dtype)
    results = {}
    with torch.set_grad_enabled(mode != "no_grad"):
        for name, module in (("fused", fused), ("plain", plain)):
            with torch.autocast("cpu", torch.bfloat16):
                results[name] = run(module, x)
        truth = run(exact, x.double())
    ours, theirs = results["fused"], results["plain"]
    assert_as_accurate_as_eager(ours.z, theirs.z, truth.z, floor=2**-8, name="output")
    for name, buffer in truth.buffers.items():
        if buffer.is_floating_point():
            assert_as_accurate_as_eager(ours.buffers[name], theirs.buffers[name], buffer, floor=1e-3, name=name)
        else:
            assert torch.equal(ours.buffers[name], theirs.buffers[name]), name
    if mode != "no_grad":
        assert ours.dx.dtype == theirs.dx.dtype == dtype
        for name, grad in theirs.grads.items():
            assert ours.grads[name].dtype == grad.dtype == torch.float32, name

        def whole(result):
            return torch.cat([g.flatten().double() for g in result.grads.values()])

        # Norms over all gradients together: in 16 bits single ones turn on which ReLUs flip.
        assert relative_error(whole(ours), whole(truth)) <= 1.5 * relative_error(whole(theirs), whole(truth))
        assert relative_error(ours.dx, truth.dx) <= 1.5 * relative_error(theirs.dx, truth.dx)


@cases(*FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_in_16_bits(case, dtype, training):
    fused = case.make("moments", dtype).train(training)
    plain = plain_copy(fused)
    exact = plain_copy(fused).double()
    x = case.x(dtype)
    ours, theirs, truth = run(fused, x), run(plain, x), run(exact, x.double())
    assert_as_accurate_as_eager(ours.z, theirs.z, truth.z, floor=torch.finfo(dtype).eps, name="output")
    assert {n: g.dtype for n, g in ours.grads.items()} == {n: g.dtype for n, g in theirs.grads.items()}
    for name, buffer in truth.buffers.items():
        if buffer.is_floating_point():
            floor = torch.finfo(dtype).eps
            assert_as_accurate_as_eager(ours.buffers[name], theirs.buffers[name], buffer, floor=floor, name=name)


@cases("basic, identity", "bottleneck, projection", "1x1 with room for moments")
def test_float16_autocast_is_eagers_too(case):
    fused = case.make("moments", torch.float32)
    plain, exact = plain_copy(fused), plain_copy(fused).double()
    x = case.x(torch.float32)
    with torch.autocast("cpu", torch.float16):
        ours, theirs = run(fused, x), run(plain, x)
    assert_as_accurate_as_eager(ours.z, theirs.z, run(exact, x.double()).z, floor=2**-10, name="output")


def test_autocast_leaves_fp64_alone():
    case = CASES["bottleneck, projection"]
    fused = case.make("moments")
    plain = plain_copy(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_pass(run(fused, case.x()), run(plain, case.x()))


class Bad(NamedTuple):
    """An input that must be refused: by which error, naming what."""

    case: str
    x: Tensor
    error: type[Exception]
    names: str
    change: Callable[[nn.Module], Any] = lambda block: None


def drop_shortcut(block: nn.Module) -> None:
    block.downsample = None


def widen_second(block: nn.Module) -> None:
    block.conv2 = nn.Conv2d(7, 4, 3, padding=1, bias=False).double()


BAD = {
    "too few channels": Bad("bottleneck, projection", tensor(2, 3, 5, 5), ValueError, r"x: .*4 channels.*3"),
    "too many channels": Bad("basic, identity", tensor(2, 8, 5, 5), ValueError, r"x: .*6 channels.*8"),
    "channels of a grouped convolution": Bad(
        "groups, stride and dilation together", tensor(2, 2, 9, 9), ValueError, r"x: .*6 channels.*2"
    ),
    "3-D": Bad("bottleneck, identity", tensor(16, 5, 5), ValueError, r"x: .*4-D.*\(16, 5, 5\)"),
    "5-D": Bad("basic, identity", tensor(1, 6, 5, 5, 5), ValueError, r"x: .*4-D"),
    "integers": Bad(
        "basic, identity", torch.ones(2, 6, 5, 5, dtype=torch.int64), TypeError, r"x: .*floating.*int64"
    ),
    "bytes": Bad("plain 3x3", torch.ones(2, 6, 5, 5, dtype=torch.uint8), TypeError, r"x: .*floating.*uint8"),
    "complex": Bad("plain 3x3", torch.ones(2, 6, 5, 5, dtype=torch.complex64), TypeError, r"x: .*floating"),
    "fp32 image, fp64 weights": Bad(
        "bottleneck, projection", tensor(2, 4, 5, 5).float(), TypeError, r"weight.*float32.*float64"
    ),
    "fp32 image, bf16 weights": Bad(
        "basic, identity",
        tensor(2, 6, 5, 5, dtype=torch.float32),
        TypeError,
        r"weight.*float32.*bfloat16",
        lambda block: block.bfloat16(),
    ),
    "one convolution in another dtype": Bad(
        "bottleneck, identity",
        tensor(2, 16, 5, 5),
        TypeError,
        r"weight of layer 3.*float64.*float32",
        lambda block: block.conv3.float(),
    ),
    "one value per channel": Bad("basic, identity", tensor(1, 6, 1, 1), ValueError, r"x: .*more than 1 "),
    "one value per channel behind the stride": Bad(
        "bottleneck, strided at an odd size", tensor(1, 6, 2, 2), ValueError, r"layer 2: .*more than 1 value"
    ),
    "image smaller than the kernel": Bad(
        "one channel in, 7x7, stride 2",
        tensor(2, 1, 3, 3),
        ValueError,
        r"x: .*3 x 3.*7 x 7",
        lambda block: setattr(block.conv, "padding", (0, 0)),
    ),
    "shortcut does not fit": Bad(
        "bottleneck, projection",
        tensor(2, 4, 5, 5),
        ValueError,
        r"x: .*\(2, 16, 5, 5\).*\(2, 4, 5, 5\)",
        drop_shortcut,
    ),
    "layers do not fit each other": Bad(
        "bottleneck, projection", tensor(2, 4, 5, 5), ValueError, r"layer 2: .*7 channels.*4", widen_second
    ),
}  # fmt: skip


@schedules
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_changed(bad, schedule):
    fused = CASES[bad.case].make(schedule)
    bad.change(fused)
    plain = plain_copy(fused)
    before = snapshot(fused)
    with pytest.raises(Exception):  # noqa: B017 - eager's own words, which only have to be an error
        plain(bad.x)
    with pytest.raises(bad.error, match=bad.names):
        fused(bad.x)
    assert_unchanged(fused, before)
    assert fusedres.report(fused)[0].fused


NOT_FOR_TRAINING_ONLY = [name for name in BAD if "one value" not in name]


@pytest.mark.parametrize("bad", [BAD[name] for name in NOT_FOR_TRAINING_ONLY], ids=NOT_FOR_TRAINING_ONLY)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_bad_input_is_refused_in_eval(bad, mode):
    fused = CASES[bad.case].make().eval()
    bad.change(fused)
    before = snapshot(fused)
    with mode(), pytest.raises(bad.error, match=bad.names):
        fused(bad.x)
    assert_unchanged(fused, before)


def test_one_value_per_channel_is_enough_in_eval():
    for case in (CASES["basic, identity"], CASES["bottleneck, strided at an odd size"]):
        fused = case.make().eval()
        assert_twins(fused, plain_copy(fused), tensor(1, 6, 1, 1))


@cases(*FEW)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_empty_batch_in_eval(case, mode):
    fused = case.make().eval()
    with mode():
        z = fused(case.x()[:0])
        assert z.shape == plain_copy(fused)(case.x()[:0]).shape


@cases(*FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("schedule", [AUTO, "moments"])
def test_nan_and_infinity_pass_through_as_in_eager(case, dtype, value, training, schedule):
    """A fault in the data must show behind a fused block where it shows behind a plain one."""
    fused = case.make(schedule, dtype).train(training)
    plain = plain_copy(fused)
    x = case.x(dtype)
    x[0, 0, 0, 0] = value
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            ours, theirs = fused(x), plain(x)
        assert torch.equal(ours.isnan(), theirs.isnan()), mode.__name__


@cases(*FEW)
def test_the_pass_can_be_repeated_to_the_bit(case):
    fused = case.make(dtype=torch.float32)
    again = copy.deepcopy(fused)
    first, second = run(fused, case.x(torch.float32)), run(again, case.x(torch.float32))
    assert torch.equal(first.z, second.z) and torch.equal(first.dx, second.dx)
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in first.grads)


@pytest.mark.parametrize(
    ("training", "frozen", "runs"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_on_a_cpu_auto_takes_what_gains(training, frozen, runs, plain_where_small, monkeypatch):
    from fusedres.nn.fused import Fused

    block = fusedres.nn.BasicBlock(32, 32).train(training)
    block = fusedres.freeze(block) if frozen else block
    seen = []
    attempt = Fused.attempt
    monkeypatch.setattr(Fused, "attempt", lambda self, *args: (seen.append(self), attempt(self, *args))[1])
    with torch.set_grad_enabled(training):
        block(torch.randn(1, 32, 6, 6))
        assert not seen, "too small"
        monkeypatch.setattr("fusedres.nn.size_rule.LEAST_WORK_PER_THREAD", 2**10)
        block(torch.randn(1, 32, 6, 6))
    assert bool(seen) == runs
