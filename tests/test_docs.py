"""README.md and docs/: code runs, commands parse, links lead somewhere, names exist; the house is as it stands."""

import importlib
import logging
import re
import shlex
import shutil
import subprocess

import pytest
import torch

import fusedres
from fusedres_cli.main import parser
from tests.pages import DOCS, PAGES, ROOT, blocks, dead, links, prose
from tests.test_layers import FLOORS
from tests.vgpu_support import REASON

LANGUAGES = {"python", "bash", "text", "{toctree}", "{eval-rst}"}
EMULATED = {"emulator.md", "adding-a-kernel.md"}
PATH = re.compile(r"`((?:fusedres|tests|docs)/[\w./-]*)`")
NAME = re.compile(r"\bfusedres(?:\.\w+)+")


def missing_paths(text):
    return [path for path in PATH.findall(text) if "NAME" not in path and not (ROOT / path).exists()]


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
    assert (missing_paths(text), missing_names(text)) == ([], [])


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


def test_pages_are_read():
    found = [block for page in PAGES for block in blocks(page.read_text())]
    assert {block.language for block in found} <= LANGUAGES
    counts = {language: sum(block.language == language for block in found) for language in ("python", "bash")}
    assert counts["python"] >= 25 and counts["bash"] >= 12
    assert sum(len(links(page.read_text())) for page in PAGES) >= 80


def with_code(language):
    return [page for page in PAGES if any(block.language == language for block in blocks(page.read_text()))]


def named(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def level_kept():
    """Of the log, which a page sets."""
    logger = logging.getLogger("fusedres")
    before = logger.level
    yield
    logger.setLevel(before)


def marked(page):
    """A ResNet-50 at 224 px takes its time on a CPU."""
    return pytest.param(page, marks=pytest.mark.slow) if page.name == "README.md" else page


@pytest.mark.parametrize("page", [*map(marked, with_code("python"))], ids=named)
def test_code_runs(page, tmp_path, monkeypatch, level_kept):
    """The blocks of a page, one after the other, as they build on each other."""
    if page.name in EMULATED and REASON is not None:
        pytest.skip(REASON)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    for block in blocks(page.read_text()):
        if block.language == "python":  # the same lines as in the page
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    # Triton reads the source of a kernel from its file.
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text("\n".join(lines) + "\n")
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "page"})


def commands(text):
    """The command lines of a block, continued lines joined, remarks left out."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def refused(words):
    """Why a command line is not one, or None."""
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
    words = [word for word in words if word not in variables] if words[0] in variables else words
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "python" and words[1:2] == ["-m"]:
        words = words[2:]
    if words[0] == "fusedres":
        try:
            parser().parse_args(words[1:])
        except SystemExit as end:
            return None if not end.code else f"fusedres refuses {words[1:]}"
        return None
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr or None
    if words[0] == "python" or words[0].startswith("fusedres."):
        path = words[1] if words[0] == "python" else words[0].replace(".", "/") + ".py"
        return None if (ROOT / path).is_file() else f"there is no {path}"
    if words[:2] == ["pip", "install"]:
        extras = set(",".join(re.findall(r"\[(.*?)\]", " ".join(words))).split(",")) - {""}
        text = (ROOT / "pyproject.toml").read_text()
        unknown = [extra for extra in extras if not re.search(rf"^{extra} = \[", text, re.MULTILINE)]
        return f"there are no extras {unknown}" if unknown else None
    return None if words[0] in ("git", "cd") else f"{words[0]} is not known here"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("page", with_code("bash"), ids=named)
def test_commands_parse(page, capsys):
    lines = [words for block in blocks(page.read_text()) if block.language == "bash" for words in commands(block.text)]
    assert lines
    assert [why for words in lines if (why := refused(words))] == [], capsys.readouterr().err


@pytest.mark.parametrize("page", [*PAGES], ids=named)
def test_commands_within_text_parse(page, capsys):
    """Those in tables and sentences, where a word stands for a value, too: `fusedres explain MODEL`; or a bare name."""
    inline = [shlex.split(line) for line in re.findall(r"`(fusedres [a-z][^`]*)`", prose(page.read_text()))]
    lines = [words if len(words) > 2 else [*words, "--help"] for words in inline]
    assert [why for words in lines if (why := refused(words))] == [], capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["fusedres explan resnet50", "fusedres bench --modle x", "make nothing", "pip install '.[everything]'",
             "python docs/nowhere.py", "python -m fusedres.bench.nowhere", "curl x"],
)  # fmt: skip
def test_a_wrong_command_is_refused(line):
    assert refused(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    assert dead(page, page.read_text()) == []


def test_a_dead_link_is_found():
    text = "[a](nowhere.md) [b](design.md#nothing) [c](design.md#the-design) [d](#here)\n# Here\n"
    assert dead(ROOT / "docs" / "limits.md", text) == ["nowhere.md", "design.md#nothing", "#here"]


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {line for block in blocks(index) if block.language == "{toctree}" for line in block.text.split()}
    assert {page.stem for page in DOCS} - {"index", "studies", "training-evidence"} <= listed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
