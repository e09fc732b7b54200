"""fusedres.commands.coverage: what is fused of other libraries' models does not shrink, and the page says what is."""

import argparse
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from fusedres.commands import coverage
from fusedres.commands.coverage import Covered, as_csv, from_csv, measure, page
from fusedres_cli.main import main

pytest.importorskip("torchvision")
pytest.importorskip("timm")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "coverage.md"

# Small ones of as many families as forty seconds of a busy core allow.
NAMES = """
    torchvision.densenet121 torchvision.fcn_resnet50 torchvision.googlenet torchvision.inception_v3
    torchvision.mnasnet0_5 torchvision.raft_large torchvision.resnet18 torchvision.shufflenet_v2_x0_5
    torchvision.vgg11_bn timm.coatnet_0_224 timm.convmixer_1024_20_ks9_p14 timm.darknet17 timm.cspresnet50
    timm.dla34 timm.ecaresnet26t timm.efficientformer_l1 timm.efficientvit_b0 timm.ese_vovnet19b_slim timm.gernet_s
    timm.ghostnet_050 timm.hgnet_tiny timm.hrnet_w18_small timm.inception_next_atto timm.lcnet_035
    timm.legacy_xception timm.levit_384_s8 timm.mobilenetv3_small_050 timm.mobilevit_xxs timm.regnetx_002
    timm.regnety_002 timm.repvgg_a0 timm.resnest14d timm.resnetv2_18 timm.selecsls42b timm.seresnet18
    timm.skresnet18 timm.tinynet_e timm.visformer_tiny timm.xcit_nano_12_p16_224
"""
SAMPLE = NAMES.split()


def reference() -> dict[str, Covered]:
    """The figures of the page, by model; those of other versions of the libraries are no measure."""
    text = PAGE.read_text()
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
        if f"{package} {version(package)}" not in text:
            pytest.skip(f"{PAGE.name} was made with another version of {package}")
    return {row.model: row for row in from_csv(PAGE.with_suffix(".csv").read_text())}


def shrunk(rows: list[Covered], known: dict[str, Covered]) -> list[str]:
    """What is less than it was."""
    return [
        f"{row.model}: {row.fused} of {row.norms}, was {known[row.model].fused} of {known[row.model].norms}: {row.why}"
        for row in rows
        if row.norms != known[row.model].norms or row.fused < known[row.model].fused
    ]


def test_a_sample_is_fused_as_far_as_the_page_says():
    known = reference()
    assert shrunk([measure(name) for name in SAMPLE], known) == []
    assert len(SAMPLE) >= 39 and len({known[name].family for name in SAMPLE}) >= 30


@pytest.mark.slow
def test_all_is_fused_as_far_as_the_page_says(tmp_path):
    known = reference()
    out = tmp_path / "coverage.md"
    assert main(["coverage", "--out", str(out)]) == 0
    rows = from_csv(out.with_suffix(".csv").read_text())
    assert {row.model for row in rows} == set(known) and shrunk(rows, known) == []


def test_the_page_holds_what_was_promised():
    rows = [row for row in reference().values() if row.norms and not row.model.startswith("hf.")]
    assert len(rows) >= 800
    assert sum(row.fused > 0 for row in rows) >= 700
    assert sum(row.mostly for row in rows) >= 480


def test_the_page_is_that_of_its_figures():
    rows = list(reference().values())
    assert PAGE.read_text() == page(rows) and rows == sorted(rows, key=lambda row: row.model)


ROWS = [
    Covered("timm.a", "resnet", 10, 10),
    Covered("timm.b", "resnet", 10, 8, "x | y"),
    Covered("timm.c", "resnet", 10, 0, "x | y"),
    Covered("timm.d", "vit", 0, 0),
    Covered("timm.e", "", 0, 0, "model: timm.e failed"),
    Covered("torchvision.a", "resnet", 3, 2, "z"),
]


def test_families_are_summed_up_with_their_worst_model():
    lines = page(ROWS).splitlines()
    assert "| torchvision | 1 | 1 | 0 | 3 | 2 (66 %) |" in lines
    assert "| timm | 3 | 2 | 1 | 30 | 18 (60 %) |" in lines
    assert "| all | 4 | 3 | 1 | 33 | 20 (60 %) |" in lines
    assert "| timm resnet | 3 | 2 | 1 | 18 of 30 (60 %) | c 0 of 10 | x \\| y |" in lines
    assert lines[-1] == "- model: timm.e failed" and not any("vit" in line for line in lines)


def test_figures_are_read_as_they_are_written():
    assert from_csv(as_csv(ROWS)) == ROWS
    assert from_csv(as_csv(ROWS[:2]) + as_csv(ROWS[2:], titled=False)) == ROWS


@pytest.fixture
def stubbed(monkeypatch):
    """Figures without models, in this process."""
    asked: list[str] = []

    def measured(models):
        asked.extend(models)
        return [Covered(model, "f", 4, 3, "w") for model in models]

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, models):
            return argparse.Namespace(
                result=lambda: asked.extend(models) or [Covered(m, "f", 4, 3, "w") for m in models]
            )

    monkeypatch.setattr(coverage, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(coverage, "as_completed", list)
    monkeypatch.setattr(coverage, "names", lambda library: [f"{library}.{i}" for i in range(30)])
    return asked


def test_what_was_cut_short_is_taken_up_again(stubbed, tmp_path, capsys):
    out, part = tmp_path / "c.md", tmp_path / "c.part"
    part.write_text(as_csv([Covered(f"timm.{i}", "f", 4, 4) for i in range(25)]))
    assert main(["coverage", "--library", "timm", "--out", str(out)]) == 0
    assert stubbed == [f"timm.{i}" for i in range(25, 30)] and not part.exists()
    rows = from_csv(out.with_suffix(".csv").read_text())
    assert [row.fused for row in rows].count(4) == 25 and len(rows) == 30
    assert out.read_text() == page(rows)
    said = capsys.readouterr()
    assert said.out.endswith("Of 30 models, 30 have anything fused, and 25 have 90 % of their batch norms fused.\n")
    assert re.fullmatch(r"1 of 1 parts after \d+ s: timm.29\n", said.err)


def test_without_a_file_the_page_is_printed(stubbed, capsys):
    assert main(["coverage", "--library", "timm", "--library", "torchvision"]) == 0
    assert "| all | 60 | 60 | 0 | 240 | 180 (75 %) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "coverage.txt"], "out must name a .md file"),
        (["--model", "timm.resnet19"], "model: expected a name such as timm.resnet1"),
    ],
)
def test_what_is_asked_wrongly_is_refused_first(arguments, message, capsys, stubbed):
    assert main(["coverage", *arguments]) == 2
    assert message in capsys.readouterr().err and not stubbed


def test_a_model_that_can_not_be_built_is_told(monkeypatch):
    def fails(name):
        raise ValueError(f"model: {name} failed: RuntimeError: no")

    monkeypatch.setattr(coverage, "source", fails)
    assert measure("timm.x") == Covered("timm.x", "", 0, 0, "model: timm.x failed: RuntimeError: no")
