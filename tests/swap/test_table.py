"""fusedres.swap.table: what is printed, as data and as HTML."""

import io
import json

import torch
from rich.console import Console
from torch import nn

import fusedres
from fusedres.swap import Norm, Report, Row

HOOKS = "conv1 has hooks, which a fused pass would not call"


def hooked(resnet: nn.Module) -> nn.Module:
    resnet.layer2[0].conv1.register_forward_hook(lambda *_: None)
    return resnet


def test_printed_as_a_table(resnet):
    lines = str(fusedres.report(fusedres.fuse(hooked(resnet), schedule="moments"))).splitlines()
    assert [line.split()[:6] for line in lines[:3]] == [
        ["name", "kind", "fused", "schedule", "norms", "reason"],
        ["(model)", "ResNet", "stem", "yes", "moments", "1"],
        ["layer1.0", "Bottleneck", "yes", "moments", "4"],
    ]
    assert lines[3].startswith("layer2.0") and lines[3].endswith(f"0      {HOOKS}")
    assert lines[4:] == [
        f"in no pass: layer2.0.bn1, layer2.0.bn2, layer2.0.bn3 and 1 more: {HOOKS}",
        "2 of 3 candidates fused",
        "5 of 9 batch norms fused",
    ]
    assert repr(fusedres.report(resnet)) == str(fusedres.report(resnet))
    columns = [line.index(word) for line, word in zip(lines[:4], ["fused", "yes", "yes", "no "], strict=True)]
    assert len(set(columns)) == 1, "columns are not aligned"
    assert not any(line != line.rstrip() for line in lines)


def test_columns_without_anything_in_them_are_left_out(resnet):
    lines = str(fusedres.report(fusedres.fuse(resnet))).splitlines()
    assert lines[0].split() == ["name", "kind", "fused", "schedule", "norms"]
    assert max(map(len, lines[:-2])) < 80


def test_what_auto_does_on_a_cpu_is_said_once(resnet):
    assert str(fusedres.report(fusedres.fuse(resnet))).splitlines()[-2:] == [
        "3 of 3 candidates fused; on a CPU, auto leaves small inputs and evaluation to the plain modules",
        "9 of 9 batch norms fused",
    ]


def test_as_data_and_as_html(resnet):
    report = fusedres.report(fusedres.fuse(hooked(resnet), schedule="stats"))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["fused"], data["candidates"], len(data["rows"])) == (2, 3, 3)
    assert (data["norms_fused"], data["norms_counted"], len(data["norms"])) == (5, 9, 9)
    assert data["rows"][2]["reason"] == report[2].reason and data["rows"][1]["schedule"] == "stats"
    assert data["norms"][0] == {"name": "bn1", "where": "", "reason": "", "counted": True}
    page = report._repr_html_()
    assert page.count("<tr>") == 4 and page.count(HOOKS) == 2 and "5 of 9 batch norms fused" in page


def test_html_has_no_tags_of_names():
    page = Report([Row("<b>", "K", False, None, "<i>")], [Norm("<u>", None, "<s>")])._repr_html_()
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<s>")) and "&lt;s&gt;" in page


def test_an_empty_report_can_be_printed():
    empty = fusedres.report(nn.Linear(1, 1))
    assert str(empty).splitlines() == ["0 of 0 candidates fused", "0 of 0 batch norms fused"]
    assert "<table><tr></tr></table>" in empty._repr_html_()


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    report = fusedres.report(fusedres.fuse(model))
    assert report.norms_fused == (1, 1)
    assert report.norms[1] == Norm("3", None, "it is a BatchNorm1d, and no pass is made for those", counted=False)
    assert torch.is_tensor(model[1].weight)


def test_printed_by_rich_as_wide_as_the_terminal(resnet):
    file = io.StringIO()
    report = fusedres.report(fusedres.fuse(hooked(resnet), schedule="moments"))
    Console(file=file, width=80).print(report)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    folded = [" ".join(row[-1] for row in rows if row[-1])]
    assert folded == [HOOKS]
    assert " ".join(file.getvalue().split()).endswith("2 of 3 candidates fused 5 of 9 batch norms fused")
