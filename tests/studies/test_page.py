"""fusedres.studies.page: docs/studies.md."""

import re
from datetime import date
from pathlib import Path

import pytest

pytest.importorskip("rich")

from fusedres.cache import read_json, write_json
from fusedres.studies.catalogue import STUDIES
from fusedres.studies.page import main, page
from fusedres.studies.run import run
from fusedres.studies.study import Finding, Row, Setting, Study

ROOT = Path(__file__).parents[2]

DOCS = ROOT / "docs" / "studies.md"


def coloured(figure, table):
    """Draw thin lines of ten colours, each over a band of its own."""
    axes = figure.subplots()
    for i in range(10):
        (line,) = axes.plot([0, 1], [i, 3 * i], linewidth=1, label=str(i))
        axes.fill_between([0, 1], [i - 1, 3 * i - 1], [i + 1, 3 * i + 1], color=line.get_color(), alpha=0.15)
    axes.legend()


def study(name):
    """One that trains nothing and finds how many rows there are."""
    return Study(
        name, "a paper", "it is so", networks=lambda setting: [], measure=lambda lab: [Row("a", 0, lab.seed)],
        found=lambda table: Finding(f"{len(table.rows)} rows", "agrees"),
        draw=coloured,
    )  # fmt: skip


def written(folder, name, seeds=(0,), **setting):
    said = []
    run(study(name), folder, Setting(**setting), seeds, say=said.append)
    assert said[-1] == "verdict: agrees"


def headings(text):
    return re.findall(r"^## (\w+)$", text, re.MULTILINE)


def test_a_study_has_what_was_found_and_what_made_it(tmp_path):
    written(tmp_path, "options", seeds=(0, 1))
    path = tmp_path / "options.json"
    write_json({**read_json(path), "seconds": {"0": 0.1, "1": 12.4}}, path)
    text = page(tmp_path)
    for line in ("- The paper: it is so (a paper).", "- Here: 2 rows.", "- Verdict: **agrees**."):
        assert line in text.splitlines()
    made = re.search(
        r"^`fusedres study options --seeds 2` on digits: 12 seconds; (\S+)(, commit \S+)?, torch ", text, re.M
    )
    assert made[1] == str(date.today())
    assert bool(made[2]) == (ROOT / ".git").exists()
    assert re.search(r"^\| \[`options`\]\(#options\) \| .* \| agrees \| 12 \|$", text, re.MULTILINE)


def test_the_page_in_docs_is_whole():
    text = DOCS.read_text(encoding="utf-8")
    found = headings(text)
    assert found and [name for name in STUDIES if name in found] == found
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert pictures == [f"studies/{name}.png" for name in found]
    assert {path.name for path in (ROOT / "docs" / "studies").iterdir()} == {f"{name}.png" for name in found}


def test_studies_that_are_done_come_in_the_order_of_the_papers(tmp_path):
    for name in reversed(STUDIES):
        written(tmp_path, name)
    path = tmp_path / "warmup.json"
    write_json({key: value for key, value in read_json(path).items() if key != "finding"}, path)
    assert headings(page(tmp_path)) == [name for name in STUDIES if name != "warmup"]


@pytest.mark.parametrize(
    "options, seeds, setting",
    [
        ("--seeds 1", [0], {}),
        ("--seeds 2 --seed 5", [5, 6], {}),
        ("--full --plain --seeds 1 --epochs 3 --draws 4 --amp bf16", [0],
         {"full": True, "plain": True, "epochs": 3, "draws": 4, "amp": "bf16"}),
    ],
)  # fmt: skip
def test_the_command_is_told_with_its_options(tmp_path, options, seeds, setting):
    written(tmp_path, "options", seeds, **setting)
    assert f"`fusedres study options {options}` on" in page(tmp_path)


def test_what_is_measured_keeps_the_day_on_which_it_was(tmp_path):
    written(tmp_path, "options")
    path = tmp_path / "options.json"
    held = read_json(path)
    write_json({**held, "made": {**held["made"], "date": "2001-02-03"}}, path)
    written(tmp_path, "options")
    assert "; 2001-02-03" in page(tmp_path)
    written(tmp_path, "options", seeds=(0, 1))
    assert f"; {date.today()}" in page(tmp_path)


def test_pictures_lie_beside_the_page(tmp_path):
    read_picture = pytest.importorskip("matplotlib.image").imread
    for name in ("options", "warmup"):
        written(tmp_path, name)
    (tmp_path / "warmup.png").unlink()
    assert main([str(tmp_path), str(tmp_path / "new" / "docs.md")]) == 0
    text = (tmp_path / "new" / "docs.md").read_text()
    assert re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE) == ["docs/options.png"]
    drawn, reduced = (read_picture(tmp_path / folder / "options.png") for folder in (".", "new/docs"))
    assert drawn.shape[:2] == reduced.shape[:2] and abs(drawn[..., :3] - reduced[..., :3]).max() < 0.1
    assert (tmp_path / "new" / "docs" / "options.png").stat().st_size < (tmp_path / "options.png").stat().st_size / 2


def test_nothing_is_written_without_results(tmp_path, capsys):
    (tmp_path / "page.md").write_text("as it was")
    assert main([str(tmp_path), str(tmp_path / "page.md")]) == 1
    assert f"expected results of studies, got none in {tmp_path}" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert (tmp_path / "page.md").read_text() == "as it was"
