"""What is installed, from a wheel and from an editable install: two top-level packages, nothing forgotten."""

import importlib.metadata
import re
import subprocess
import sys
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
