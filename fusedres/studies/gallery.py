"""All studies of a folder on one page."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from fusedres.cache import read_json
from fusedres.studies.catalogue import STUDIES

__all__ = ["write"]

SHOWN = ("source", "paper", "setting", "rows", "made", "finding")
"""What a page shows of ``NAME.json``."""


def write(folder: Path) -> Path:
    """Write ``studies.html``: picture and verdict of each study that the folder holds; needs no other file.

    A result that can not be read is named there.

    Returns:
        the page.
    """
    from jinja2 import Environment, PackageLoader

    studies, broken = [], []
    for name, entry in STUDIES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            held = read_json(path)
            if "finding" not in held:
                continue
            shown = {key: held[key] for key in SHOWN}
        except (ValueError, KeyError, TypeError):
            broken.append(path.name)
            continue
        picture = folder / f"{name}.png"
        image = base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None
        studies.append({"name": name, "line": entry.line, "image": image, **shown})
    environment = Environment(loader=PackageLoader("fusedres.studies", "."), autoescape=True, trim_blocks=True)
    text = environment.get_template("gallery.html.jinja").render(studies=studies, broken=broken)
    page = folder / "studies.html"
    temporary = page.with_name("studies.html.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, page)
    return page
