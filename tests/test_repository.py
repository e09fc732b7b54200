"""What a repository's host reads: workflows, templates, the citation, the changelog, pre-commit's hooks."""

import re
import shutil
import subprocess

import pytest

from tests.pages import ROOT

yaml = pytest.importorskip("yaml")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_fork_can_run_it(path):
    """No secrets, no right to write, no name of a repository; every action with its version; a limit of time."""
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert "secrets." not in text and workflow["permissions"] == {"contents": "read"}
    assert "workflow_dispatch" in workflow[True]  # YAML 1.1 reads the key `on` as true
    assert all(job["timeout-minutes"] <= 240 for job in workflow["jobs"].values())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(path) if "uses" in step)
    assert any("run" in step for step in steps(path))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_workflows_make_what_there_is():
    targets = [step["run"].split()[1] for path in WORKFLOWS for step in steps(path)
               if step.get("run", "").startswith("make ")]  # fmt: skip
    assert {"check", "docs", "test", "test-all", "gpu"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_workflows_test_the_oldest_and_the_newest_python():
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    pythons = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
    assert matrix["python"] == [pythons[0], pythons[-1]]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_templates_of_issues_are_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert asked and len({part["id"] for part in asked}) == len(asked)
    assert all(part["type"] in ("input", "textarea") and part["attributes"]["label"] for part in asked)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["authors"]
    assert f'version = "{citation["version"]}"' in text and f'license = "{citation["license"]}"' in text
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_are_the_linters_of_make_check():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert repository["repo"] == "local"
    assert entries == [".venv/bin/ruff check --fix", ".venv/bin/ruff format", ".venv/bin/mypy",
                       ".venv/bin/python docs/figures.py"]  # fmt: skip
