"""fusedres.bench.published: which figure belongs beside which machine."""

import pytest

from fusedres.bench.published import PUBLISHED, beside
from tests.bench.tiny import row


@pytest.mark.parametrize(
    ("device", "figures"),
    [
        ("NVIDIA H100 80GB HBM3", [7162]),
        ("NVIDIA H200", [7950]),
        ("NVIDIA A100-SXM4-80GB", [3398, 2470, 2035, 2050]),
        ("NVIDIA A100-SXM4-40GB", [2035, 2050]),
        ("NVIDIA GeForce RTX 3090", [1218, 826]),
        ("NVIDIA GeForce RTX 4090", []),
    ],
)
def test_figures_of_the_same_gpu(device, figures):
    assert [figure.images_per_s for figure, _ in beside([row(device=device)])] == figures


def test_rows_of_the_same_work_the_fastest_first():
    rows = [
        row("eager", images_per_s=2000.0), row(images_per_s=6000.0), row(dtype="bf16", images_per_s=7000.0),
        row(dtype="fp32", images_per_s=9000.0), row(mode="infer", images_per_s=20000.0),
        row(px=128, images_per_s=20000.0), row(case="resnet18", images_per_s=20000.0),
        row(status="refused by the gate", images_per_s=None),
    ]  # fmt: skip
    ((figure, ours),) = beside(rows)
    assert figure.images_per_s == 7162
    assert [one.images_per_s for one in ours] == [7000.0, 6000.0, 2000.0]


def test_every_figure_has_a_source():
    assert all(figure.what and figure.source and figure.images_per_s > 0 for figure in PUBLISHED)
