"""docs/figures.py: pages say what docs/figures.json says, and other commands' tables agree; no figure stands alone."""

import importlib.util
import json
import re

import pytest

from tests.pages import DOCS, FENCE, ROOT, prose

WRITTEN = {"predictions.md", "coverage.md", "studies.md", "training-evidence.md"}
"""Pages that other commands write whole, with their day."""

FIGURE = re.compile(r"\d[\d.,]*\s?(?:ms|MB|GB|GFLOP|images/s|× eager)(?!\w)")
"""What is counted, measured or predicted somewhere, and has to come from there."""


def load():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = load()
FOUND = json.loads(figures.FILE.read_text())
PAGES = figures.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_the_figures_say(page):
    text = page.read_text()
    assert figures.fill(text, figures.texts(FOUND)) == text, "make figures"


def alone(text):
    """Figures that stand outside of markers and of code."""
    return FIGURE.findall(figures.MARKED.sub("", prose(text)))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WRITTEN], ids=lambda page: page.name)
def test_no_figure_stands_outside_of_its_markers(page):
    assert alone(page.read_text()) == []


def test_a_figure_that_differs_is_found():
    said = figures.texts(FOUND)
    text = f"a <!--f:auto.ms-->{said['auto.ms']}<!--/f--> b"
    assert figures.fill(text, said) == text
    assert figures.fill("a <!--f:auto.ms-->1.5 ms<!--/f--> b", said) == text
    assert alone("a <!--f:auto.ms-->1.5 ms<!--/f--> or 477 MB and 5.3 ms, 20 %") == ["477 MB", "5.3 ms"]
    with pytest.raises(ValueError, match=r"no figure called 'auto\.hours'"):
        figures.fill("<!--f:auto.hours-->1<!--/f-->", said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_markers_within_a_line_begin_none(page):
    """A line that begins with a comment is HTML to the end of the line, in which Markdown is not read."""
    text = FENCE.sub("", page.read_text())
    assert re.findall(r"^[> *]*<!--f:[\w.]+-->.+$", text, re.MULTILINE) == []
    assert text.count("<!--f:") == text.count("<!--/f-->") == len(figures.MARKED.findall(text))


def test_every_figure_has_its_day_and_commit():
    for one in (FOUND["counted"], *FOUND["measured"].values()):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", one["date"]) and re.fullmatch(r"[0-9a-f]{7,}", one["commit"])
    assert all("machine" in one for one in FOUND["measured"].values())


def row(page, *cells):
    """The cells of a table's row that begins with these."""
    (line,) = re.findall(rf"^\| {re.escape(' | '.join(cells))} \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_predictions_of_the_same_step_agree():
    """docs/predictions.md is written by another command, `fusedres predict`."""
    page = (ROOT / "docs" / "predictions.md").read_text()
    training, inference = page.split("## Inference")
    for text, key in ((training, "resnet50.train"), (inference, "resnet50.infer")):
        eager, auto, faster, _, launches, kept, _ = row(text, "h100", "256")
        steps = FOUND["counted"]["steps"][key]
        assert eager.split()[0] == f"{steps['eager']['predicted_ms']:.3g}"
        assert auto.split()[0] == f"{steps['auto']['predicted_ms']:.3g}"
        assert faster == f"{steps['eager']['predicted_ms'] / steps['auto']['predicted_ms']:.2f} x"
        assert launches.split()[0] == str(steps["auto"]["launches"])
        assert kept == f"{steps['auto']['saved_bytes_per_image'] / 1e6:.1f}"


def test_coverage_says_what_its_table_says():
    page = (ROOT / "docs" / "coverage.md").read_text()
    said = figures.texts(FOUND)
    fused, norms = said["covered.norms"].replace(",", "").split(" of ")
    assert f"Of {said['covered.models']} models, {said['covered.any']} have anything fused" in page
    assert row(page, "all")[3:5] == [norms, f"{fused} ({100 * int(fused) // int(norms)} %)"]


def test_pages_are_all_of_them():
    assert {ROOT / "README.md", *DOCS} == set(PAGES)


@pytest.mark.slow
def test_counting_gives_the_same_again(monkeypatch):
    """What was counted at some commit holds today; one step of eight, to be quick."""
    key = "resnet18.train"
    monkeypatch.setattr(figures, "EXPLAINED", {key: figures.EXPLAINED[key]})
    monkeypatch.setattr(figures, "stamp", dict)
    counted = json.loads(json.dumps(figures.count()))
    assert counted == {"steps": {key: FOUND["counted"]["steps"][key]}, "saved": FOUND["counted"]["saved"]}


@pytest.mark.slow
def test_measuring_reads_what_the_commands_write(monkeypatch):
    """On networks that are small, since what matters is the form."""
    monkeypatch.setattr(figures, "HOST_TIMED", {"small": ["--model", "cifar_resnet20", "--steps", "1"]})
    monkeypatch.setattr(figures, "TIMED", {"cifar_resnet20": 2})
    monkeypatch.setattr(figures, "SEEDS", 1)
    monkeypatch.setattr(figures, "TRAINED", ["--epochs", "1", "--threads", "1"])
    host = figures.measure_host()["small"]
    assert host["launches"] > 50 and host["gone through"] > host["replayed"] > 0
    cpu = figures.measure_cpu()
    assert set(cpu) == {"cifar_resnet20.train", "cifar_resnet20.infer"}
    assert set(cpu["cifar_resnet20.infer"]) == {"eager", "fused", "frozen"}
    (accuracy,) = figures.measure_digits().values()
    assert 10 < accuracy <= 100
