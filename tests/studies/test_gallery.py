"""fusedres.studies.gallery: every result of a folder on one page, as a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from fusedres.studies import gallery

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def result(folder, name, words="all <well> & more", verdict="agrees", picture=True):
    held = {
        "source": "He 2015", "paper": "deeper is worse", "setting": {"data": "digits"}, "rows": {"0": [], "1": []},
        "made": {"date": "2020-01-02", "torch": "2.9", "fusedres": "0.1"},
        "finding": {"words": words, "verdict": verdict},
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(held))
    if picture:
        figure = Figure(figsize=(10, 4))
        figure.subplots().plot([0, 1])
        figure.savefig(folder / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    """Three results in another order than the papers', one without a picture; one unfinished, two that are none."""
    for name in ("paths", "degradation"):
        result(tmp_path, name)
    result(tmp_path, "lesion", verdict="disagrees", picture=False)
    (tmp_path / "permute.json").write_text('{"rows": {}}')
    (tmp_path / "shattered.json").write_text("{")
    (tmp_path / "identity.json").write_text('{"finding": {}}')
    (tmp_path / "other.json").write_text('{"finding": {}}')
    return tmp_path


def test_the_page_holds_the_results_in_the_order_of_the_papers(folder):
    page = gallery.write(folder)
    source = page.read_text(encoding="utf-8")
    assert page == folder / "studies.html"
    assert re.findall(r'<section id="(\w+)">', source) == ["degradation", "lesion", "paths"]
    assert source.count("all &lt;well&gt; &amp; more") == 3 + 2  # findings, and pictures in words
    assert source.count('class="disagrees"') == 1
    assert re.findall(r"(\w+).json is no result of a study", source) == ["identity", "shattered"]
    assert "2 seeds, 2020-01-02, torch 2.9" in source
    assert not list(folder.glob("*.partial"))


def test_the_page_needs_nothing_but_its_tables(folder):
    source = gallery.write(folder).read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]{1,30})""", source)
    assert addresses
    assert all(address.startswith(("data:", "#")) or address.endswith(".csv") for address in addresses)
    assert "<script" not in source and "@import" not in source and "http" not in source


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    assert "No study has been run in this folder." in gallery.write(tmp_path).read_text(encoding="utf-8")


LOOK = """
<script>
window.addEventListener('error', event => document.title += ' ERROR ' + event.message, true);
window.addEventListener('load', () => {
  const images = [...document.images];
  const shown = one => one.complete && one.naturalWidth > 600 && one.getBoundingClientRect().height > 100;
  const links = [...document.querySelectorAll('nav a')];
  const lead = links.filter(one => document.querySelector(one.getAttribute('href'))).length;
  document.title = `${images.length} images, ${images.filter(shown).length} visible, `
    + `${links.length} links, ${lead} lead`
    + (document.documentElement.scrollWidth > window.innerWidth ? ', too wide' : '');
});
</script></head>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_without_errors(folder, width):
    """The page itself has no script; this one only looks."""
    path = gallery.write(folder)
    path.write_text(path.read_text(encoding="utf-8").replace("</head>", LOOK), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=5000",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>2 images, 2 visible, 3 links, 3 lead</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
