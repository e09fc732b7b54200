"""fusedres.explain: figures against counts made elsewhere, and what is refused."""

import json
import math

import pytest
import torch

import fusedres
from fusedres.explain import Question, explain
from fusedres.models import cifar_resnet, create, preact_resnet
from fusedres.models.sources import Source, source
from fusedres.plan.gpus import GPUS
from fusedres.plan.schedule import SCHEDULES
from fusedres.traffic.saved import saved_bytes

resnet = pytest.importorskip("torchvision.models.resnet")


@pytest.fixture(scope="module")
def resnet50():
    return explain(Question("resnet50"))


# Counted from the real aten graph, a convolution's output gradient once: MB per image and launches at batch 128.
COUNTED = [("resnet18", 105.5, 284), ("resnet50", 461.0, 727), ("cifar_resnet56", 22.7, 787)]


@pytest.mark.parametrize(("model", "megabytes", "launches"), COUNTED, ids=[case[0] for case in COUNTED])
def test_eager_agrees_with_the_count_of_its_aten_graph(model, megabytes, launches):
    found = explain(Question(model, batch=128, rungs=("block_end",)))
    eager = found.figures(found.eager)
    assert eager.bytes_per_image / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert eager.launches == pytest.approx(launches, rel=0.01)


def test_a_bottleneck_in_the_middle_of_a_network():
    block = Source("bottleneck", lambda: resnet.Bottleneck(256, 64), (256, 56, 56))
    found = explain(Question("bottleneck", batch=128, rungs=("block_end",), images_grad=True), model=block)
    eager = found.figures(found.eager)
    assert eager.bytes_per_image / 1e6 == pytest.approx(53.0, rel=0.001)
    assert eager.launches == 41
    # conv, batch norm, ReLU, addition forward: 54 passes over a tensor of 64 channels; backward 78.
    unit = 64 * 56 * 56 * 2
    backward = sum(entry.bytes for entry in found.eager.entries if entry.backward) / 128
    assert (eager.bytes_per_image - backward) / unit == pytest.approx(54, rel=0.001)
    assert backward / unit == pytest.approx(78, rel=0.001)


def test_eager_with_output_gradients_read_by_each_of_their_kernels(resnet50):
    eager = resnet50.figures(resnet50.eager)
    assert (eager.bytes_per_image + resnet50.reread_per_image()) / 1e6 == pytest.approx(477, rel=0.01)
    assert eager.flops_per_image / 1e9 == pytest.approx(24.3, rel=0.01)
    assert eager.saved_bytes_per_image / 1e6 == pytest.approx(43.8, rel=0.01)


def test_inference():
    found = explain(Question("resnet50", infer=True, rungs=("prologue",)))
    passes = {torch.nn.Conv2d: (1, 1), torch.nn.BatchNorm2d: (1, 1), torch.nn.ReLU: (1, 1), torch.nn.MaxPool2d: (1, 5)}
    elements = 0
    with torch.device("meta"):
        model, image = resnet.resnet50().eval(), torch.empty(1, 3, 224, 224)

    def count(module, inputs, out):
        nonlocal elements
        reads, writes = passes.get(type(module), (0, 0))
        elements += reads * inputs[0].numel() + writes * out.numel()
        elements += 3 * out.numel() * isinstance(module, resnet.Bottleneck)  # out += identity

    for module in model.modules():
        module.register_forward_hook(count)
    model(image)
    weights = sum(parameter.numel() for parameter in model.parameters())
    expected = 2 * elements + 6 * image.numel() + (6 + 2) * weights / 256
    eager = found.figures(found.eager)
    assert eager.bytes_per_image == pytest.approx(expected, rel=0.005)
    fused = found.figures(found.rungs["prologue"])
    assert fused.bytes_per_image < 0.32 * eager.bytes_per_image
    # Weights are rounded in every pass, with all others: 6 bytes each, and two launches for so many.
    assert fused.launches == 57
    cast = explain(Question("resnet50", infer=True, rungs=("prologue",), cast=True)).rungs["prologue"]
    served = found.figures(cast)
    assert served.launches == 52
    assert fused.bytes_per_image - served.bytes_per_image == pytest.approx(
        6 * (weights / 256 + image.numel()), rel=0.01
    )
    assert fused.saved_bytes_per_image == eager.saved_bytes_per_image == 0


def test_figures_are_sums_over_launches(resnet50):
    assert list(resnet50.rungs) == [*SCHEDULES, "auto"]
    for step in resnet50.steps.values():
        figures = resnet50.figures(step)
        assert figures.launches == len(step.entries)
        moved = sum(entry.read + entry.written for entry in step.entries)
        assert figures.bytes_per_image == pytest.approx(moved / 256)
        assert figures.bytes_per_image == pytest.approx(figures.read_per_image + figures.written_per_image)
        roofline = sum(max(entry.bytes / (0.9 * 3.35e12), entry.flops / (0.81 * 989.4e12)) for entry in step.entries)
        assert figures.roofline_images_per_s == pytest.approx(256 / roofline)
        by_layer = list(resnet50.layers().values())
        name = next(name for name, other in resnet50.steps.items() if other is step)
        assert sum(by_step[name].launches for by_step in by_layer) == figures.launches
        assert sum(by_step[name].bytes_per_image for by_step in by_layer) == pytest.approx(figures.bytes_per_image)
        assert sum(moved for _, _, moved, _ in resnet50.operations(step)) == pytest.approx(figures.bytes_per_image)


def test_launches_of_both_passes_are_put_under_their_block(resnet50):
    for step in resnet50.steps.values():
        for backward in (False, True):
            layers = list(dict.fromkeys(entry.layer for entry in step.entries if entry.backward is backward))
            expected = ["stem", *(f"layer{i}.{j}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth))]
            expected += ["head", "fc"]
            assert layers == (expected[::-1] if backward else expected)


def test_rungs_run_our_kernels_and_count_what_the_library_does_beside_them(resnet50):
    for name, step in resnet50.rungs.items():
        ours = [entry for entry in step.entries if entry.ours]
        assert len(ours) > 100, name
        # The classifier, at least, is the library's, and so is what its layers do backward.
        assert {"addmm", "mm"} <= {entry.name for entry in step.entries if not entry.ours}
    assert not any(entry.ours for entry in resnet50.eager.entries)


def test_json_holds_the_schema(resnet50):
    answer = json.loads(json.dumps(resnet50.as_json()))
    assert {"model": "resnet50", "batch": 256, "dtype": "bf16"}.items() <= answer.items()
    wanted = {"bytes_per_image", "saved_bytes_per_image", "launches", "flops_per_image", "roofline_images_per_s"}
    for figures in (answer["eager"], *answer["rungs"].values()):
        assert wanted <= figures.keys()
        assert sum(figures["bytes_per_image_by_kind"].values()) == pytest.approx(figures["bytes_per_image"])
    assert list(answer["rungs"]) == [*SCHEDULES, "auto"]
    blocks = {layer["name"]: layer for layer in answer["layers"]}
    assert blocks["layer1.0"]["choice"] in SCHEDULES
    assert "on h100" in blocks["layer1.0"]["reason"]
    assert blocks["layer1.0"]["rungs"]["moments"]["launches"] > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("rung", ["block_end", "prologue", "moments"])
def test_saved_bytes_are_those_of_a_real_run_on_a_cpu(dtype, rung):
    batch, side = 4, 32
    found = explain(Question("resnet18", batch=batch, dtype=dtype, rungs=(rung,), size=(3, side, side)))
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    model = fusedres.fuse(resnet.resnet18().to(memory_format=torch.channels_last), schedule=rung)

    def forward(module):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return module(images)

    measured = saved_bytes(model, forward).total
    # Kernels keep the images packed: a third more than as they come, which counts at so few pixels.
    packed = images.nbytes // (2 if dtype == "bf16" else 1) / 3
    assert found.rungs[rung].saved == pytest.approx(measured + packed / 2, abs=0.02 * measured + packed / 2)


def test_a_function_in_a_file_is_a_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torchvision\ndef tiny():\n    return torchvision.models.ResNet("
        "torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])\n"
    )
    found = explain(Question(f"{file}:tiny", batch=2, rungs=("stats",), size=(3, 64, 64)))
    assert found.figures(found.rungs["stats"]).launches > 0


def test_a_model_that_is_fused_already_is_explained_like_its_plain_twin():
    found = [
        explain(
            Question("cifar", batch=4, rungs=("prologue",)),
            model=Source("cifar", lambda fused=fused: create("cifar_resnet20", fused=fused), (3, 32, 32)),
        ).as_json()
        for fused in (True, False)
    ]
    assert found[0] == found[1]


def test_near_names_are_listed_once():
    with pytest.raises(ValueError) as refusal:
        source("resnet55")
    names = str(refusal.value).removeprefix("model: expected a name such as ").split(", ")
    assert len(set(names)) == len(names) > 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f():\n    raise RuntimeError('two\\nlines')", "mods.py:f failed: RuntimeError: two lines"),
        ("def f(depth):\n    pass", r"mods.py:f failed: TypeError: f\(\) missing 1 required .*'depth'"),
        ("def f(:", "mods.py:f failed: SyntaxError: .*line 1"),
        ("import nonsense", "mods.py:f failed: ModuleNotFoundError: No module named 'nonsense'"),
    ],
)
def test_a_file_that_fails_is_refused_in_one_line(tmp_path, code, message):
    file = tmp_path / "mods.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=message) as refusal:
        source(f"{file}:f").on_meta()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "resnet55"}, r"model: expected a name such as .*resnet50.*, or path.py:function, got 'resnet55'"),
        ({"gpu": "h10"}, r"gpu: expected a name such as .*h100.*, got 'h10'"),
        ({"dtype": "fp8"}, r"dtype: expected one of bf16, fp16, fp32, got 'fp8'"),
        ({"rungs": ("moment",)}, r"rung: expected all or one of block_end, .*auto, memory, got 'moment'"),
        ({"batch": 0}, r"batch: expected at least 1, got 0"),
        ({"size": (1, 32, 32)}, r"images, here of 1 x 32 x 32, .* its forward fails: RuntimeError: "),
        ({"model": "vgg11"}, r"model: nothing to fuse in it \(no residual block that the library knows\)"),
        ({"batch": 200_000}, r"layer stem: .*expected a number of 32 bits, got 2508800000"),
        ({"model": "cifar_resnet20", "batch": 2_100_000}, r"layer stem: .*expected a number of 32 bits"),
    ],
)  # fmt: skip
def test_what_can_not_be_explained_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        explain(Question(**{"model": "resnet18", "rungs": ("prologue",), **changed}))


def test_every_gpu_names_a_source_and_explains():
    for gpu in GPUS.values():
        assert gpu.source
        assert math.isfinite(gpu.bandwidth) and gpu.rate(torch.bfloat16) > gpu.rate(torch.float32) > 0
    network = create("cifar_resnet20", fused=False)
    tiny = Source("tiny", lambda: network, (3, 32, 32))
    seen = {}
    for name in ("a100", "mi300x", "rx7900xtx"):
        found = explain(Question("tiny", batch=128, gpu=name, rungs=("auto",)), model=tiny)
        seen[name] = found.figures(found.rungs["auto"]).roofline_images_per_s
    assert seen["mi300x"] > seen["a100"] > seen["rx7900xtx"]


def library_calls(model: str, make) -> set[str]:
    """Names of the launches of a step that are not of our kernels."""
    found = explain(Question(model, batch=4, rungs=("auto",)), model=Source(model, make, (3, 32, 32)))
    return {entry.name for entry in found.rungs["auto"].entries if not entry.ours}


def test_batches_are_counted_where_running_statistics_move():
    assert "_foreach_add_" not in library_calls("cifar", lambda: cifar_resnet(8))


def test_the_parameter_free_shortcut_is_part_of_other_launches():
    found = library_calls("cifar", lambda: cifar_resnet(8))
    assert found.isdisjoint({"zeros", "clone", "copy_", "constant_pad_nd", "fill_"})


def test_nothing_absent_is_made_of_zeros_or_ones():
    assert library_calls("preact", lambda: preact_resnet(11)).isdisjoint({"zeros", "ones", "fill_", "zeros_like"})
