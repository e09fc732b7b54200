"""Makefile: what `make compat` would do, and that other targets stay in their own environment. Nothing is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALL = r"(\S+)/bin/python -m pip install \S+ -e '\.\[dev\]'(.*)"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def would_run(*arguments: str) -> str:
    """The commands of a make that finds every environment out of date."""
    command = ["make", "--no-print-directory", "-n", "-W", "pyproject.toml", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_compat_installs_and_tests_two_environments_of_its_own():
    commands = would_run("compat", "PYTHON312=python-of-choice")
    installed = [(folder, pins.split()) for folder, pins in re.findall(INSTALL, commands)]
    assert installed == [
        (".compat/torch-2.11", ["torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0"]), (".compat/newest", []),
    ]  # fmt: skip
    for folder, _ in installed:
        assert f"python-of-choice -m venv {folder};" in commands
        assert f'{folder}/bin/pytest -n 2 -m "not slow"' in commands
    assert ".venv" not in commands
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".compat/" in ignored


@pytest.mark.parametrize("target", ["test", "demo", "coverage", "gpu", "check"])
def test_other_targets_set_up_the_usual_environment_alone(target):
    commands = would_run(target, "PYTHON=python-of-choice")
    assert [(folder, pins.split()) for folder, pins in re.findall(INSTALL, commands)] == [(".venv", [])]
    assert "python-of-choice -m venv .venv;" in commands
    assert ".compat" not in commands


def test_a_missing_interpreter_is_named_with_the_variable_that_chooses_it():
    for target, variable in (("compat-newest", "PYTHON312"), ("test", "PYTHON")):
        command = ["make", "-W", "pyproject.toml", target, f"{variable}=no-such-python"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        message = f"fusedres needs Python 3.10 or newer as no-such-python; choose another with: make {variable}=..."
        assert message in done.stderr
