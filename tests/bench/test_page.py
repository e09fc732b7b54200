"""fusedres.bench.page and pictures: a page that needs no network, as a browser shows it."""

import re
import shutil
import struct
import subprocess
from dataclasses import replace

import pytest

from fusedres.bench import page, pictures
from fusedres.bench.rows import REFUSED
from tests.bench.tiny import row

ROWS = [
    row("eager", speedup=1.0, images_per_s=2500.0),
    row("compile", speedup=1.2, images_per_s=3000.0),
    row(),
    row("fused-moments", status=REFUSED, reason="output <differs> & more", speedup=None, median_s=None),
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_the_page_needs_nothing_from_elsewhere():
    source = page.render(ROWS)
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]{1,12})""", source)
    assert len(addresses) == 4
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in source and "@import" not in source and "http" not in source


def test_the_page_says_what_rows_say():
    source = page.render(ROWS)
    assert source.count("<tr") == 1 + 4 + 1 + 1  # two heads, four rows, the published figure of an H100
    assert "refused by the gate: output &lt;differs&gt; &amp; more" in source
    assert "7,162" in source and "0.70" in source
    assert 'class="caveat"' not in source
    with pytest.raises(ValueError, match="expected at least one"):
        page.render([])


@pytest.mark.parametrize(
    ("device", "words"), [("AMD EPYC", "say nothing of the kernels"), ("vgpu:sm_90, emulated", "times mean nothing")]
)
def test_the_page_says_that_no_gpu_was_used(device, words):
    rows = [replace(one, device=device, driver="", cudnn="") for one in ROWS]
    source = page.render(rows)
    assert "No GPU was used." in source and words in source
    assert "7,162" not in source


NOTHING = [replace(ROWS[0], gb_per_s=None, peak_bytes=None, saved_bytes_per_image=None)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(ROWS, ["speed-ups", "roofline", "memory"]), (ROWS[:1], ["roofline", "memory"]), (NOTHING, [])],
)
def test_pictures_are_drawn_of_what_there_is_and_none_is_empty(rows, expected, tmp_path):
    assert pictures.worth(rows) == expected
    for picture in expected:
        data = pictures.png(picture, rows)
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 600 and height > 150
    path = tmp_path / "all.png"
    assert pictures.write(path, rows) is path.exists() is bool(expected)
    source = page.render(rows)
    assert [name for name in pictures.PICTURES if f'<img id="{name}"' in source] == expected


def bars(rows):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    pictures.PICTURES["speed-ups"](axes, rows)
    return [bar.get_width() for bar in axes.patches]


def test_bars_are_as_long_as_the_speed_ups():
    assert bars(ROWS) == [1.2, 2.0]
    assert bars(ROWS[:1]) == []


def test_pictures_of_many_rows_show_networks_and_say_what_is_left_out():
    ops = [row(kind="op", case=f"op{i}") for i in range(pictures.MOST_ROWS)]
    assert pictures._pictured([*ops, *ROWS]) == ROWS
    assert len(pictures._pictured([*ops, *ops])) == pictures.MOST_ROWS
    assert pictures._pictured(ROWS) == ROWS


def test_a_colour_for_every_contender():
    assert len(set(pictures.COLORS.values())) == len(pictures.CONTENDERS)


LOOK = """
<script>
window.addEventListener('error', event => document.title += ' ERROR ' + event.message, true);
window.addEventListener('load', () => {
  const images = [...document.images];
  const shown = one => one.complete && one.naturalWidth > 600 && one.getBoundingClientRect().height > 100;
  const rows = document.querySelectorAll('tbody tr').length;
  document.title = `${images.length} images, ${images.filter(shown).length} visible, ${rows} rows`
    + (document.documentElement.scrollWidth > window.innerWidth ? ', too wide' : '');
});
</script></head>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_it_without_errors(tmp_path):
    """The page itself has no script; this one only looks."""
    path = tmp_path / "page.html"
    path.write_text(page.render(ROWS).replace("</head>", LOOK))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>3 images, 3 visible, 5 rows</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
