"""fusedres.bench.contenders: who is chosen, and that rivals which are not installed here compute the right thing."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from fusedres.bench import cudnn, inplace_abn
from fusedres.bench.cases import ModelCase, block
from fusedres.bench.contenders import CONTENDERS, GROUPS, contenders_named
from fusedres.bench.gate import Gate
from fusedres.bench.harness import Measurement, compare
from fusedres.bench.ops import op
from fusedres.bench.rows import OK
from fusedres.bench.setting import Device, Setting, device_named
from fusedres.operands import Geometry
from fusedres.plan.gpus import GPUS
from fusedres.runtime.plans import Plan
from tests.bench.tiny import NETWORK, TRAIN

CPU = device_named("cpu")


def shallow() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


SHALLOW = ModelCase("shallow", "network", shallow, 3, 32, 2)


def test_contenders_keep_the_registrys_order_and_eager_is_always_there():
    assert [one.name for one in contenders_named(["fused", "compile"])] == ["eager", "compile", "fused"]
    rungs = ["fused-block_end", "fused-stats", "fused-prologue", "fused-moments"]
    assert [one.name for one in contenders_named(["ladder"])] == ["eager", *rungs]
    assert contenders_named(["all"]) == tuple(CONTENDERS.values())
    assert set(GROUPS["all"]) == set(CONTENDERS)


def test_a_near_name_is_offered():
    with pytest.raises(ValueError, match=r"contenders: expected one such as fused-moments.*got 'fused-moment'"):
        contenders_named(["fused-moment"])


@pytest.mark.parametrize("name", ["cudnn", "inplace_abn", "fused-graph", "eager-graph"])
def test_what_needs_a_gpu_says_so(name):
    for mode in ("train", "infer"):
        assert CONTENDERS[name].why_not(block("basic1"), Setting(mode, "fp32", 1, 8, CPU))
    assert CONTENDERS[name].why_not(op("stem_pool"), Setting("op", "fp32", 1, 8, CPU))


def test_what_is_not_installed_says_what_to_install():
    gpu = torch.device("cuda")
    with patch("importlib.util.find_spec", lambda _: None):
        assert "pip install nvidia-cudnn-frontend" in cudnn.why_unavailable(gpu)
        assert "pip install inplace-abn" in inplace_abn.why_unavailable(gpu)


def by_library(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None = None,
    geometry: Geometry = cudnn.SAME, relu: bool = True,
) -> Tensor:  # fmt: skip
    """What `cudnn.conv_scale_add_relu` promises."""
    assert scale is None
    z = F.conv2d(x, weight, shift, *geometry)
    z = z if residual is None else z + residual
    return z.relu() if relu else z


@pytest.mark.parametrize(
    "case",
    [
        replace(block("basic2_down"), px=8), replace(block("bottleneck1"), px=6),
        replace(block("bottleneck2_down"), px=6), SHALLOW,
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_networks_of_cudnns_graphs_compute_the_same(case):
    """The graphs stand in for themselves: what is looked at is what is built of them."""
    contender = replace(CONTENDERS["cudnn"], why_not=lambda *_: None)
    with patch("fusedres.bench.cudnn.conv_scale_add_relu", by_library):
        verdict = Gate(case, Setting("infer", "fp32", 2, case.px, CPU)).judge(contender)
    assert verdict.error < 1e-6  # folding a batch norm rounds once more


def test_a_network_without_blocks_has_no_graphs():
    with pytest.raises(cudnn.NotSupported, match="none of torchvision's residual blocks"):
        cudnn.infer_with_graphs(nn.Sequential(nn.Linear(1, 1)))


def test_graphs_are_built_of_the_patterns_nodes():
    pytest.importorskip("cudnn")
    built = []

    def keep(graph, inputs, outputs):
        built.append((len(graph.nodes), len(inputs), len(outputs)))
        return cudnn.Graph(graph, inputs, outputs, 0)

    def layout(*size: int) -> cudnn.Layout:
        return cudnn.Layout.of(torch.empty(size, dtype=torch.float16, device="meta"))

    x, weight, vector = layout(2, 64, 8, 8), layout(64, 64, 3, 3), layout(1, 64, 1, 1)
    assert x.stride == (4096, 1, 512, 64)
    with patch("fusedres.bench.cudnn._handle", lambda _: None), patch("fusedres.bench.cudnn._built", keep):
        cudnn.inference_graph(x, weight, vector, x, cudnn.SAME, True, torch.device("cuda", 0))
        cudnn.inference_graph(x, weight, None, None, cudnn.SAME, False, torch.device("cuda", 0))
        cudnn.training_graph(x, vector, weight, cudnn.SAME, torch.device("cuda", 0))
    assert built == [(5, 5, 1), (2, 3, 1), (5, 4, 3)]


class StandIn(nn.BatchNorm2d):
    """What InPlaceABN computes, keeping as much as batch norm does."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.leaky_relu(y, inplace_abn.SLOPE) if self.activation == "leaky_relu" else y


def stand_in(bn: nn.BatchNorm2d, activation: str) -> nn.Module:
    norm = StandIn(bn.num_features, activation)
    norm.load_state_dict(bn.state_dict())
    return norm


@pytest.mark.parametrize(
    "case",
    [
        replace(block("basic2_down"), px=8), replace(block("bottleneck1"), px=6), SHALLOW,
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_networks_of_inplace_abn_compute_a_leaky_relu(case):
    replaced = inplace_abn.with_inplace_abn
    contender = replace(CONTENDERS["inplace_abn"], why_not=lambda *_: None)
    gate = Gate(case, Setting("train", "fp32", 2, case.px, CPU))
    with patch("fusedres.bench.inplace_abn.with_inplace_abn", lambda model: replaced(model, stand_in)):
        assert gate.judge(contender).reason is None
        if case.kind == "block":
            assert gate.judge(replace(contender, plain=None)).reason is not None


def test_what_is_called_tuned_without_a_plan_says_so(monkeypatch):
    rows = compare(NETWORK, TRAIN, contenders_named(["tuned"]), Measurement(timed=False))
    tuned = next(row for row in rows if row.contender == "tuned")
    assert (tuned.status, tuned.reason) == (OK, "no plan: it runs as predicted") and tuned.ours
    gpu = replace(TRAIN, device=Device("cuda", torch.device("cuda", 0)))
    monkeypatch.setattr("fusedres.bench.contenders.device_gpu", lambda index: GPUS["h100"])
    remark = CONTENDERS["tuned"].remark
    assert remark(gpu) == "no plan of this GPU: it runs as predicted"
    h100 = GPUS["h100"]
    known = {(h100.name, h100.multiprocessors): Plan.of(h100, measured=False)}
    monkeypatch.setattr("fusedres.runtime.plans._defaults", known)
    assert remark(gpu) is None
