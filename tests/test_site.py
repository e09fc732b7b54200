"""The site that `make docs` builds: no warning, nothing missing, no network, and no error in a browser."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.pages import DOCS, ROOT, WRITTEN_BY_RUNS

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_built(site):
    assert {f"{page.stem}.html" for page in DOCS} <= {path.name for path in site.glob("*.html")}


def test_the_reference_has_every_public_name(site):
    import fusedres

    text = (site / "reference.html").read_text()
    functions = [name for name in fusedres.__all__ if callable(getattr(fusedres, name))]
    assert len(functions) >= 10
    assert [name for name in functions if f'id="fusedres.{name}"' not in text] == []
    assert 'id="fusedres.nn.Bottleneck"' in text and 'id="fusedres.functional.conv_bn_act"' in text


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r"""<(?:script|img|link|iframe)[^>]*?(?:src|href)=["'](\w+:[^"']+)""", page.read_text())
        assert loaded == [], page.name


def test_links_between_pages_lead_somewhere(site):
    for page in site.glob("*.html"):
        for path, anchor in re.findall(r'<a[^>]*?href="([\w./-]*\.html)?(?:#([^"]*))?"', page.read_text()):
            target = site / path if path else page
            if f"docs/{target.stem}.md" in WRITTEN_BY_RUNS and not target.exists():
                continue
            assert target.exists(), (page.name, path)
            assert not anchor or f'id="{anchor}"' in target.read_text(), (page.name, path, anchor)


LOOK = """<!doctype html><title>?</title><body></body><script>
const pages = PAGES, said = [];
window.addEventListener('error', event => said.push('ERROR ' + event.message), true);
async function look(name) {
  const frame = document.createElement('iframe');
  frame.width = 1200, frame.height = 900;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = name;
  document.body.append(frame);
  await loaded;
  const page = frame.contentDocument;
  const pictures = [...page.images].filter(one => one.loading != 'lazy');
  const broken = pictures.filter(one => !(one.complete && one.naturalWidth > 0)).length;
  const wide = page.documentElement.scrollWidth > 1200 ? ' too wide' : '';
  said.push(`${name}: ${page.querySelectorAll('h1').length} heading, ${broken} broken${wide}`);
  frame.remove();
}
(async () => { for (const name of pages) await look(name); document.title = said.join('; '); })();
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_every_page_without_errors(site, tmp_path):
    names = sorted(f"{page.stem}.html" for page in DOCS)
    looking = site / "looking.html"
    looking.write_text(LOOK.replace("PAGES", repr(names)))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1000",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom",
        looking.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    looking.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert title == "; ".join(f"{name}: 1 heading, 0 broken" for name in names)
    assert "CONSOLE" not in done.stderr
