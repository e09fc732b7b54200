"""What is installed, from a wheel and from an editable install: two top-level packages, nothing forgotten."""

import importlib.metadata
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "fusedres", ROOT / "fusedres_cli")

# Triton's minor version that each of torch's is published with, on Linux.
TRITON_OF_TORCH = {(2, 9): (3, 5), (2, 10): (3, 6), (2, 11): (3, 6)}


def numbers(version: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def oldest(package: str) -> tuple[int, int]:
    """The version that pyproject.toml asks for at least, in whichever list."""
    found = re.findall(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert len(found) == 1, f"{package} is named {len(found)} times"
    return numbers(found[0])


def test_the_oldest_torch_comes_with_a_triton_that_is_new_enough():
    torch = oldest("torch")
    assert TRITON_OF_TORCH[torch] >= oldest("triton")
    # And none older would do.
    assert TRITON_OF_TORCH[torch[0], torch[1] - 1] < oldest("triton")
    # torchvision's minor versions follow torch's: 0.25 is built for 2.10.
    assert oldest("torchvision") == (0, torch[1] + 15)


def test_what_is_installed_is_what_is_promised():
    for package in ("torch", "triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            assert package == "triton" and sys.platform != "linux"
            continue
        assert numbers(version) >= oldest(package)
    pins = [one for one in importlib.metadata.requires("torch") or () if re.match(r"triton\s*==", one)]
    assert all(numbers(one.split("==")[1]) >= oldest("triton") for one in pins)


def test_the_readme_says_which_versions():
    text = " ".join((ROOT / "README.md").read_text().split())
    for name, package in (("torch", "torch"), ("Triton", "triton")):
        major, minor = oldest(package)
        assert f"{name} {major}.{minor} or newer" in text
    pythons = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert f'requires-python = ">={pythons[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"Python {pythons[0]} to {pythons[-1]}" in text


def sources() -> set[str]:
    """Every Python file of the library, named as it is to be installed."""
    return {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in package.rglob("*.py")}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, so that no build folder appears in the checkout.
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fusedres", "fusedres_cli"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = folder.glob("fusedres-0.1.0-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_the_library_and_its_command(wheel_names):
    assert {name.split("/")[0] for name in wheel_names} == {"fusedres", "fusedres_cli", "fusedres-0.1.0.dist-info"}


def test_wheel_holds_every_source_file(wheel_names):
    installed = {name for name in wheel_names if name.endswith(".py")}
    assert installed == sources()
    assert {"fusedres/kernels/__init__.py", "fusedres/bench/__init__.py"} <= installed


def test_wheel_holds_the_page_of_the_benchmarks(wheel_names):
    assert "fusedres/bench/page.html.jinja" in wheel_names


def test_wheel_is_typed_and_licensed(wheel_names):
    assert "fusedres/py.typed" in wheel_names
    assert "fusedres-0.1.0.dist-info/licenses/LICENSE" in wheel_names


def test_every_folder_of_the_library_is_a_package():
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def run_elsewhere(code: str) -> str:
    """Output of `code` in a fresh interpreter that starts outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_installed_package_finds_kernels_and_bench():
    code = "import fusedres.kernels, fusedres.bench; print(fusedres.kernels.__file__, fusedres.bench.__file__)"
    for path in run_elsewhere(code).split():
        assert Path(path).name == "__init__.py"


def test_no_top_level_kernels_or_bench_is_installed():
    code = "from importlib.util import find_spec; print(find_spec('kernels'), find_spec('bench'))"
    assert run_elsewhere(code) == "None None"


def test_command_is_installed():
    command = Path(sys.executable).parent / "fusedres"
    done = subprocess.run([command, "--version"], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == "fusedres 0.1.0\n"


HIDDEN = """
import importlib.abc, sys

class Hider(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hider())
import torch, fusedres
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), fusedres.nn.BasicBlock(8, 8))
report = fusedres.report(fusedres.fuse(model, schedule="moments")).to_dict()
model(torch.randn(2, 3, 16, 16)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
fusedres.freeze(model.eval())(torch.randn(1, 3, 16, 16))
fusedres.unfuse(model)
print(report["norms_fused"], report["norms_counted"], sorted({hidden!r} & sys.modules.keys()))
"""
OPTIONAL = {
    "torchvision", "timm", "transformers", "matplotlib", "rich", "jinja2", "sklearn", "llvmlite", "tensorboard",
}  # fmt: skip


EXTRAS_ALONE, TRITON_ALONE = (
    pytest.param(hidden, marks=pytest.mark.slow, id=name)
    for name, hidden in (("extras", OPTIONAL), ("triton", {"triton"}))
)


@pytest.mark.parametrize("hidden", [pytest.param({"triton", *OPTIONAL}, id="all"), EXTRAS_ALONE, TRITON_ALONE])
def test_the_library_works_without_what_is_optional(hidden):
    """On a machine that has nothing but torch, as those are for which Triton publishes no wheels."""
    assert run_elsewhere(HIDDEN.format(hidden=hidden)) == "3 3 []"


def test_the_extra_all_is_every_extra_of_users():
    text = (ROOT / "pyproject.toml").read_text()
    part = text[text.index("[project.optional-dependencies]") :].split("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]$", part, re.MULTILINE | re.DOTALL))

    def brought(extra):
        own = re.findall(r"fusedres\[([\w,]+)\]", extras.get(extra, ""))
        return {extra}.union(*(brought(one) for names in own for one in names.split(",")))

    assert brought("all") == {"all", "models", "hf", "cli", "train", "vgpu"} == set(extras) - {"docs", "dev"}


def described(url):
    make = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    return make((ROOT / "README.md").read_text(), url)


def test_the_long_description_has_addresses_where_the_repository_has_one():
    text = described("https://example.org/owner/fusedres")
    assert "](https://example.org/owner/fusedres/raw/HEAD/docs/passes.svg)" in text
    assert "](https://example.org/owner/fusedres/blob/HEAD/docs/tutorial.md)" in text
    assert re.findall(r"\]\((?!https:)[^)]*\)", text) == [] and "<!--" not in text
    assert "](docs/tutorial.md)" in described("")


@pytest.mark.parametrize("url", ["", "https://example.org/owner/fusedres"])
def test_the_long_description_renders_as_on_pypi(url):
    markdown = pytest.importorskip("readme_renderer.markdown")
    html = markdown.render(described(url))
    assert html is not None
    assert html.count("<h2") == 6 and html.count("<table>") == 1 and html.count("<pre") == 3
    assert ('<img src="https://example.org' in html) == bool(url)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it, of a repository with an address."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(files):
        pytest.skip("not a checkout")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    environment = {"PATH": "/usr/bin:/bin", "FUSEDRES_URL": "https://example.org/owner/fusedres"}
    subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_what_is_built_says_where_it_is_from(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("fusedres-0.1.0.dist-info/METADATA").decode()
    assert "Project-URL: Repository, https://example.org/owner/fusedres\n" in metadata
    assert "Classifier: Environment :: GPU :: NVIDIA CUDA\n" in metadata
    assert "Description-Content-Type: text/markdown\n" in metadata and "blob/HEAD/docs/tutorial.md" in metadata
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "README.md", "CHANGELOG.md", "CITATION.cff", "docs/tutorial.md", "docs/passes.svg"} <= names
    assert {"tests/test_packaging.py", "examples/tour.ipynb", "Makefile"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["sdist", "wheel"])
def test_what_is_built_is_installed_and_runs(built, which, tmp_path):
    """In an environment of its own, with its dependencies lent from that of the tests; nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    target = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    ]
    lent = [path for path in sys.path if path.endswith("site-packages")]
    # An editable installation of the tests' own environment is hidden: .pth files of lent folders are not read.
    (target / "lent.pth").write_text("\n".join(lent) + "\n")
    subprocess.run([*command, "--no-build-isolation", str(built[which])], check=True, capture_output=True, timeout=600)
    code = HIDDEN.format(hidden=set()) + "print(fusedres.__file__, fusedres.__version__)"
    done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == f"3 3 []\n{target / 'fusedres' / '__init__.py'} 0.1.0\n"
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "fusedres", "--version"], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout == "fusedres 0.1.0\n"
