"""The pages that people read: README.md, docs/, examples/; their blocks of code and their links."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *(path for path in [*ROOT.glob("*.md"), ROOT / "examples" / "README.md"]
                                      if path.name != "README.md" or path.parent != ROOT)]  # fmt: skip
WRITTEN_BY_RUNS = {"docs/studies.md", "docs/training-evidence.md"}
"""Pages that stand for runs of `fusedres study` and of trainings, and are there once these were made."""

FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page that it begins on."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    return [
        Block(found[2].strip(), found[3], page.count("\n", 0, found.start(3)) + 1) for found in FENCE.finditer(page)
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page)


def anchors(page: str) -> set[str]:
    """What a link may name behind #: headings, as GitHub and MyST write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    return LINK.findall(prose(page))


def dead(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        name = target.relative_to(ROOT).as_posix()
        if not target.exists():
            found += [link] if name not in WRITTEN_BY_RUNS else []
        elif anchor and anchor not in anchors(target.read_text()):
            found.append(link)
    return found
