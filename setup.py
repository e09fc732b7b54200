"""What of a package's metadata depends on where its repository is, which FUSEDRES_URL says; the rest: pyproject.toml.

README.md has relative links, which lead somewhere in a checkout and in the sdist, and not on PyPI.
"""

import os
import re
from pathlib import Path

from setuptools import setup

PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}


def long_description(readme: str, url: str) -> str:
    """README.md for PyPI: without marks of figures, and with addresses for paths if there is a repository."""
    text = re.sub(r"<!--.*?-->", "", readme, flags=re.DOTALL)
    if not url:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{url}/raw/HEAD/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{url}/blob/HEAD/", text)


if __name__ == "__main__":
    url = os.environ.get("FUSEDRES_URL", "").rstrip("/")
    setup(
        long_description=long_description(Path(__file__).with_name("README.md").read_text(encoding="utf-8"), url),
        long_description_content_type="text/markdown",
        project_urls={"Repository": url, "Issues": f"{url}/issues"}
        | {name: f"{url}/blob/HEAD/{path}" for name, path in PAGES.items()}
        if url
        else {},
    )
