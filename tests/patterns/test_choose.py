"""fusedres.patterns.choose: what each candidate is predicted to take, and which is run for it."""

import copy
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusedres
from fusedres.compiler.targets import TARGETS
from fusedres.explain import Question, explain
from fusedres.models.sources import Source
from fusedres.nn import BasicBlock, Bottleneck, ConvBNAct, DenseBlock, PreActBottleneck
from fusedres.patterns import choose as chooser
from fusedres.patterns.choose import CHOSEN, EAGER, check_schedule, listening
from fusedres.plan.gpus import GPUS, assume_gpu, device_gpu, gpu_named, nearest_gpu, scaled, target_gpu
from fusedres.plan.schedule import SCHEDULES
from fusedres.traffic.predict import HOST_SECONDS

H100 = GPUS["h100"]


def choices(block, size, gpu="h100", *, schedule="auto", dtype=torch.bfloat16, train=True, grad=True):
    """What is heard while a block runs on paper."""
    block = fusedres.fuse(block.to("meta", dtype), schedule=schedule).train(train)
    x = torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)
    x = x.contiguous(memory_format=torch.channels_last)
    heard = []
    with (
        listening(heard.append),
        fusedres.record(GPUS[gpu].target),
        assume_gpu(GPUS[gpu]),
        torch.set_grad_enabled(grad),
    ):
        block(x)
    return heard


def choice(*args, **options):
    (found,) = choices(*args, **options)
    return found


BLOCKS = [
    pytest.param(lambda: Bottleneck(256, 64), (256, 256, 56, 56), id="early"),
    pytest.param(lambda: Bottleneck(2048, 512), (256, 2048, 7, 7), id="late"),
    pytest.param(lambda: Bottleneck(256, 128, 2), (64, 256, 56, 56), id="projection"),
    pytest.param(lambda: BasicBlock(64, 64), (128, 64, 56, 56), id="basic"),
    pytest.param(lambda: PreActBottleneck(256, 64), (64, 256, 56, 56), id="pre-activation"),
]


@pytest.mark.parametrize(("make", "size"), BLOCKS)
@pytest.mark.parametrize("gpu", ["h100", "h200", "a100", "rtx4090", "l40s", "b200", "mi300x"])
def test_what_is_run_is_predicted_fastest_of_all_and_not_slower_than_eager(make, size, gpu):
    found = choice(make(), size, gpu)
    assert set(found.estimates) == {EAGER.name, *SCHEDULES}
    times = {name: one.seconds for name, one in found.estimates.items()}
    assert times[found.schedule.name] == min(times.values()) <= times["eager"]
    for one in found.estimates.values():
        optimistic, central, pessimistic = one.band
        assert 0 < optimistic < central < pessimistic < 4 * optimistic


@pytest.mark.parametrize("rung", ["eager", *SCHEDULES])
@pytest.mark.parametrize(("make", "size"), BLOCKS)
def test_an_estimate_is_of_what_is_launched(make, size, rung):
    """Against the account of a whole step: the same launches, bytes and times; the cast of the input left out."""
    source = Source("block", lambda: make().to(torch.bfloat16), size[1:])
    question = Question("block", batch=size[0], dtype="bf16", rungs=("auto", *SCHEDULES), images_grad=True)
    found = explain(question, model=source)
    (made,) = found.rungs["auto"].choices.values()
    one = made.estimates[rung]
    step = found.eager if rung == "eager" else found.rungs[rung]
    figures = found.figures(step)
    assert one.launches == pytest.approx(figures.launches, abs=8)
    assert one.flops == pytest.approx(figures.flops_per_image * size[0], rel=0.01)
    assert one.band[1] * 1e3 == pytest.approx(figures.predicted_ms, rel=0.06)


def test_what_is_kept_for_the_backward_pass_is_counted():
    found = choice(Bottleneck(256, 64), (64, 256, 56, 56))
    unit = 64 * 56 * 56 * 64 * 2  # bytes of a tensor of the block's width
    # The input belongs to the block before.
    assert found.saved["moments"] == pytest.approx(2.25 * unit + 4 * unit / 16, rel=0.15)
    assert found.saved["moments"] < found.saved["prologue"] < found.saved["stats"] <= found.saved["block_end"]
    assert found.saved["block_end"] < found.saved["eager"]


def test_memory_is_what_keeps_least():
    for make, size in (
        (lambda: Bottleneck(2048, 512), (64, 2048, 7, 7)),
        (lambda: BasicBlock(64, 64), (64, 64, 56, 56)),
    ):
        found = choice(make(), size, schedule="memory")
        assert found.saved[found.schedule.name] == min(found.saved.values())
        assert "MB kept" in found.reason
    assert choice(Bottleneck(2048, 512), (64, 2048, 7, 7), schedule="memory").schedule is SCHEDULES["moments"]
    assert choice(Bottleneck(2048, 512), (64, 2048, 7, 7)).schedule is not SCHEDULES["moments"]


def test_memory_without_a_gpu_is_the_moments_form():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 6)
    block = Bottleneck(32, 8)
    results = []
    for schedule in ("memory", "moments"):
        twin = fusedres.fuse(copy.deepcopy(block), schedule=schedule)
        results.append(twin(x))
    assert torch.equal(*results)


def test_early_bottlenecks_take_the_moments_form_and_late_ones_do_not():
    assert choice(Bottleneck(256, 64), (256, 256, 56, 56)).schedule is SCHEDULES["moments"]
    assert choice(Bottleneck(2048, 512), (256, 2048, 7, 7)).schedule is not SCHEDULES["moments"]


def test_where_a_block_is_small_the_host_decides():
    found = choice(BasicBlock(16, 16), (1, 16, 8, 8))
    best = found.estimates[found.schedule.name]
    assert best.started
    assert best.launches == min(one.launches for one in found.estimates.values())
    assert best.seconds == pytest.approx(best.launches * HOST_SECONDS)
    assert "as long as the host takes" in found.reason


def test_evaluation_is_weighed_too():
    found = choice(Bottleneck(256, 64).eval(), (64, 256, 56, 56), train=False, grad=False)
    assert set(found.estimates) == {"eager", "block_end"}
    assert found.estimates["block_end"].launches < found.estimates["eager"].launches
    assert found.schedule is SCHEDULES["block_end"]


def test_a_choice_is_made_once_for_a_shape_and_heard_of_at_every_call():
    block = fusedres.fuse(BasicBlock(8, 8).to("meta"))
    x = torch.empty(2, 8, 6, 6, device="meta")
    heard = []
    with listening(heard.append), fusedres.record(), assume_gpu(GPUS["l4"]):
        for _ in range(3):
            block(x)
    assert len(heard) == 3
    assert heard[0] is heard[1] is heard[2]
    assert " on l4" in heard[0].reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        heard[0].reason = ""


def test_a_rung_that_was_asked_for_is_not_weighed():
    block = fusedres.fuse(BasicBlock(8, 8).to("meta"), schedule="stats")
    heard = []
    with listening(heard.append), fusedres.record():
        block(torch.empty(2, 8, 6, 6, device="meta"))
    fusedres.fuse(block, schedule="auto").to_empty(device="cpu")(torch.randn(2, 8, 6, 6))
    assert heard == []


def test_who_asks_for_kernels_is_not_given_eager():
    with fusedres.backend("triton"):
        assert set(choice(BasicBlock(64, 64), (64, 64, 28, 28)).estimates) == set(SCHEDULES)


def test_going_through_on_paper_leaves_no_trace():
    """No launch in an account, no call under the asker's modes and hooks, no number drawn."""
    packed, asked = [], []
    meta = fusedres.fuse(BasicBlock(24, 24).to("meta"))
    state, threads = torch.get_rng_state(), threading.active_count()
    real = chooser.choose

    def keep(*pattern, **training):
        asked.append((pattern, training))
        return real(*pattern, **training)

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with (
        pytest.MonkeyPatch.context() as patch,
        fusedres.record() as trace,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        patch.setattr("fusedres.patterns.door.choose", keep)
        meta(torch.empty(2, 24, 7, 7, device="meta"))
        (pattern, training), launches, kept = asked[0], len(trace.launches), len(packed)
        assert launches > 0 < kept
        chooser._choices.clear()
        real(*pattern, **training)
        assert (len(trace.launches), len(packed)) == (launches, kept)
    assert threading.active_count() == threads
    assert torch.equal(torch.get_rng_state(), state)


class Slow:
    """Every rung takes a second, so that eager is run."""

    @staticmethod
    def seconds(one, gpu, given):
        from fusedres.traffic import predict

        return 1.0 if isinstance(one, predict.Launch) else 1e-9


def eager_everywhere(monkeypatch, gpu=H100):
    """Run eager where ``"auto"`` has a choice, on tensors of the CPU."""
    real = chooser.Call.on

    def on_gpu(x, tensors):
        return dataclasses.replace(real(x, tensors), gpu=gpu)

    monkeypatch.setattr("fusedres.patterns.door.Call", SimpleNamespace(on=on_gpu))
    monkeypatch.setattr("fusedres.traffic.predict._seconds", Slow.seconds)
    chooser._choices.clear()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: BasicBlock(8, 8), lambda: BasicBlock(8, 16, 2), lambda: BasicBlock(8, 16, 2, shortcut="zero_pad"),
        lambda: Bottleneck(16, 8, 2), lambda: ConvBNAct(8, 16, 3), lambda: PreActBottleneck(16, 8, 2),
        lambda: DenseBlock(8, 3, 4), lambda: fusedres.models.resnet18(num_classes=3),
    ],
    ids=["identity", "projection", "zero-pad", "bottleneck", "layer", "pre-activation", "dense", "with a stem"],
)  # fmt: skip
def test_eager_is_what_the_plain_modules_compute(make, train, monkeypatch):
    torch.manual_seed(1)
    plain = make().train(train)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
    plain = fusedres.unfuse(plain)
    fused = fusedres.fuse(copy.deepcopy(plain))
    heard = []
    channels = next(conv.in_channels for conv in plain.modules() if isinstance(conv, nn.Conv2d))
    outputs = []
    eager_everywhere(monkeypatch)
    with listening(heard.append):
        for model in (plain, fused):
            x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
            z = model(x)
            (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum().backward()
            outputs.append([z, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert heard
    assert all(one.schedule is EAGER for one in heard)
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_names_of_schedules():
    for name in (*CHOSEN, *SCHEDULES):
        check_schedule(name)
    with pytest.raises(ValueError, match=r"schedule: expected one of \['auto', 'memory', 'block_end', .*got 'eager'"):
        check_schedule("eager")


def test_gpus_are_found_by_name_title_and_target():
    assert gpu_named("H100") is H100
    with pytest.raises(ValueError, match=r"gpu: expected a name such as a100.*, got 'a10000'"):
        gpu_named("a10000")
    assert nearest_gpu("NVIDIA H100 80GB HBM3", "sm_90") is H100
    assert nearest_gpu("NVIDIA H100 PCIe", "sm_90") is GPUS["h100_pcie"]
    assert nearest_gpu("NVIDIA A100-SXM4-80GB", "sm_80") is GPUS["a100"]
    assert nearest_gpu("NVIDIA GeForce RTX 3090", "sm_86") is GPUS["rtx3090"]
    assert nearest_gpu("NVIDIA L40S", "sm_89") is GPUS["l40s"]
    assert nearest_gpu("AMD Instinct MI300X", "gfx942") is GPUS["mi300x"]
    assert nearest_gpu("NVIDIA GeForce RTX 3050", "sm_86").target == "sm_86"
    assert nearest_gpu("something new", "sm_999") is GPUS["a100"]
    for name, target in TARGETS.items():
        assert TARGETS[target_gpu(target).target] == target, name
        assert target_gpu(target._replace(multiprocessors=7, shared_bytes=1)) is target_gpu(target), name
    assert {gpu.target for gpu in GPUS.values()} == set(TARGETS)


def test_an_unknown_gpu_is_its_nearest_one_scaled(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA L20", major=8, minor=9, multi_processor_count=92, clock_rate=2_520_000,
        memory_clock_rate=9_001_000, memory_bus_width=384,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device_gpu.cache_clear()
    try:
        found = gpu_named("here")
    finally:
        device_gpu.cache_clear()
    like = GPUS["l4"]  # the slowest of its architecture
    assert (found.name, found.alike, found.multiprocessors, found.ghz) == ("NVIDIA L20", "l4", 92, 2.52)
    assert found.tb_per_s == pytest.approx(0.864, rel=1e-3)
    assert found.matrix_tflops == pytest.approx(like.matrix_tflops * 92 * 2.52 / (like.multiprocessors * like.ghz))
    assert found.multiply_adds == pytest.approx(like.multiply_adds)
    found = scaled(like, SimpleNamespace(name="silent", multi_processor_count=58))
    assert (found.tb_per_s, found.matrix_tflops) == (like.tb_per_s, like.matrix_tflops)


def test_a_machine_without_a_gpu_has_none_to_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpu: expected a machine with a GPU for 'here', and PyTorch sees none"):
        gpu_named("here")


@pytest.mark.parametrize(("make", "size"), BLOCKS)
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_call_launches_is_compiled_before_it_once(make, size, grad, monkeypatch):
    compiled = []
    monkeypatch.setattr(chooser, "is_wanted", lambda device: True)
    monkeypatch.setattr(chooser, "target_name", lambda index: "sm_90")
    monkeypatch.setattr(chooser, "compile_missing", lambda binaries, target: compiled.append((set(binaries), target)))
    chooser.forget_choices()
    block = fusedres.fuse(make().to("meta", torch.bfloat16)).train(grad)
    x = torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=grad)
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        with fusedres.record("sm_90") as trace, assume_gpu(H100), torch.set_grad_enabled(grad):
            z = block(x)
            if grad:
                z.backward(torch.empty_like(z))
    assert compiled == [({launch.binary for launch in trace.launches}, "sm_90")]
    chooser.forget_choices()


def test_what_was_chosen_on_paper_is_chosen_on_the_gpu(monkeypatch):
    found, choose = [], chooser.choose

    def noted(*given, **how):
        found.append((given, how))
        return choose(*given, **how)

    monkeypatch.setattr("fusedres.patterns.door.choose", noted)
    choice(Bottleneck(256, 64), (256, 256, 56, 56))
    (((pattern, call, gpu), how),) = found
    chosen = choose(pattern, call, gpu, **how)
    monkeypatch.setattr(chooser, "_weighed", lambda *_: pytest.fail("weighed again"))
    monkeypatch.setattr(chooser, "is_wanted", lambda device: False)
    assert choose(pattern, dataclasses.replace(call, device="cuda"), gpu, **how) is chosen
