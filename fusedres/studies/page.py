"""``docs/studies.md``: what papers found beside what was found here, from the results of a folder.

``python -m fusedres.studies.page FOLDER docs/studies.md``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedres.cache import read_json
from fusedres.studies.catalogue import STUDIES
from fusedres.studies.study import Setting

__all__ = ["main", "page"]

HEAD = """# Studies

Experiments of the papers, run by `fusedres study`: with `--full` in the paper's own setting, without it for minutes on
scikit-learn's digits (8x8 pixels, 1,437 training images, 360 for testing), some with fewer layers than the paper's. So
small a setting can fail to show what a paper saw, and a verdict is about the setting that was run. "Not decided" says
that the seeds differ by more than the networks, or the networks by less than a margin. The networks and the rule for
the verdict are `networks` and `found` of a study, in its module in `fusedres/studies/`.
The settings of `responses` and `reuse` (a weight decay of 0.01) and of `ensemble` (depths, epochs, the rule) were
chosen after first ones had not shown the effect: their verdicts say that some setting shows it, no more.

± is one deviation over seeds, and so are bands and error bars; seconds are those that a CPU computed for the slowest
seed, on all threads together, without networks that another study had left in the folder.

This page was written by `python -m fusedres.studies.page FOLDER docs/studies.md` (`fusedres/studies/page.py`) from what
the commands below left in `FOLDER`, which each was given as `--out FOLDER`.
"""


def page(folder: Path, picture: Callable[[str], str | None] = lambda name: None) -> str:
    """The page, of those studies that the folder holds.

    Args:
        folder: of the results.
        picture: where the page has a study's picture, by the study's name; None is none.

    Raises:
        ValueError: the folder holds no results.
    """
    held = {name: read_json(folder / f"{name}.json") for name in STUDIES if (folder / f"{name}.json").exists()}
    done = {name: one for name, one in held.items() if "finding" in one}
    if not done:
        raise ValueError(f"folder: expected results of studies, got none in {folder}")
    rows = [
        f"| [`{name}`](#{name}) | {STUDIES[name].line} | {one['finding']['verdict']} | {_seconds(one)} |"
        for name, one in done.items()
    ]
    table = ["| study | what is compared | does the run agree? | seconds |", "|---|---|---|---|", *rows, ""]
    return "\n".join([HEAD, *table, *(_section(name, one, picture(name)) for name, one in done.items())])


def _section(name: str, held: dict[str, Any], picture: str | None) -> str:
    finding, made = held["finding"], held["made"]
    commit = f", commit {made['commit']}" if made.get("commit") else ""
    return f"""## {name}

- The paper: {held["paper"]} ({held["source"]}).
- Here: {finding["words"]}.
- Verdict: **{finding["verdict"]}**.

`{_command(name, held)}` on {held["setting"]["data"]}: {_seconds(held)} seconds; {made["date"]}{commit}, \
torch {made["torch"]}.
{f"{chr(10)}![{STUDIES[name].line}]({picture}){chr(10)}" if picture else ""}"""


def _seconds(held: dict[str, Any]) -> str:
    return f"{max(held['seconds'].values()):.0f}"


def _command(name: str, held: dict[str, Any]) -> str:
    """What made the rows, its options of the defaults left out."""
    seeds, setting = sorted(map(int, held["rows"])), held["setting"]
    options = {
        "--seeds": len(seeds), "--seed": seeds[0] or None, "--epochs": setting["epochs"],
        "--draws": setting["draws"] if setting["draws"] != Setting().draws else None, "--amp": setting["amp"],
    }  # fmt: skip
    given = [f"{option} {value}" for option, value in options.items() if value is not None]
    flags = [f"--{flag}" for flag in ("full", "plain") if setting[flag]]
    return " ".join(["fusedres study", name, *flags, *given])


def main(arguments: list[str]) -> int:
    """Write the page of a folder to a file, and pictures into a folder beside it: the two arguments."""
    if len(arguments) != 2:
        print("usage: python -m fusedres.studies.page FOLDER PAGE", file=sys.stderr)
        return 2
    folder, out = map(Path, arguments)
    pictures = out.with_suffix("")

    def reduced(name: str) -> str | None:
        source = folder / f"{name}.png"
        if not source.exists():
            return None
        # Comes with matplotlib, which drew the picture.
        from PIL import Image

        pictures.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:
            # A third of the bytes. This method bounds the error of a colour; others give thin lines one another's.
            few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(pictures / source.name, optimize=True)
        return f"{pictures.name}/{source.name}"

    try:
        text = page(folder, reduced)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    temporary = out.with_name(f"{out.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
