"""docs/: every path and name of ours in it exists, and the house is drawn as it stands."""

import importlib
import re
from pathlib import Path

import pytest

import fusedres
from tests.test_layers import FLOORS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PATH = re.compile(r"`((?:fusedres|tests|docs)/[\w./-]*)`")
NAME = re.compile(r"\bfusedres(?:\.\w+)+")


def missing_paths(text):
    return [path for path in PATH.findall(text) if not (ROOT / path).exists()]


def missing_names(text):
    return [name for name in NAME.findall(text) if not exists(name)]


def exists(name):
    """Whether a dotted name is a module of ours, or something in one."""
    package, _, last = name.rpartition(".")
    for module, inside in ((name, None), (package, last)):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        return inside is None or hasattr(found, inside)
    return False


def test_there_are_a_design_and_a_style():
    assert {"design.md", "style.md"} <= {path.name for path in DOCS}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_what_is_named_exists(path):
    text = path.read_text()
    assert PATH.search(text) and (missing_paths(text), missing_names(text)) == ([], [])


def test_a_planted_name_is_missed():
    assert missing_paths("`fusedres/launch.py`, `fusedres/runtime/launch.py`") == ["fusedres/launch.py"]
    assert missing_names("fusedres.nothing() and fusedres.fuse() of fusedres.runtime.nowhere") == [
        "fusedres.nothing", "fusedres.runtime.nowhere",
    ]  # fmt: skip


def floors(text):
    """The rooms in each row of the table of floors, from the top down."""
    table = text[text.index("| floor |") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table]


def test_the_house_is_drawn_as_it_stands():
    drawn = floors((ROOT / "docs" / "design.md").read_text())
    assert [set(rooms) for rooms in drawn] == [set(rooms) for rooms in reversed(FLOORS)]


def test_the_public_interface_is_whole():
    text = (ROOT / "docs" / "design.md").read_text()
    assert {name for name in fusedres.__all__ if not name.startswith("_")} <= set(re.findall(r"fusedres\.(\w+)", text))
