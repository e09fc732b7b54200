"""fusedres.bench.versus: two commits in turns, and nothing left of the other one's tree."""

import subprocess
from pathlib import Path

import pytest

from fusedres.bench import versus
from fusedres.bench.rows import FAILED, new_table
from fusedres_cli.main import main
from tests.bench.tiny import row


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()

    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *author, *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    for seconds in ("0.2", "0.1"):
        (root / "seconds").write_text(seconds)
        git("add", "-A")
        git("commit", "-qm", seconds)
    monkeypatch.setattr(versus, "ROOT", root)
    return git


def test_turns_alternate_and_the_other_tree_is_gone(repository, monkeypatch, capsys):
    trees, asked = [], []

    def bench(tree, arguments):
        trees.append(tree)
        asked.append(arguments)
        seconds = float((tree / "seconds").read_text()) * (1 + 0.1 * (len(trees) > 2))
        lost = row("compile", status=FAILED, median_s=None)
        with new_table(Path(arguments[-1]), [row("eager", median_s=seconds), row("fused", median_s=seconds / 2), lost]):
            return 0, ""

    monkeypatch.setattr(versus, "_bench", bench)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["bench", "resnet50", "models.py:Net", "--train", "-b", "4", "--compare", "HEAD~1"]) == 0
    here = versus.ROOT
    assert [tree == here for tree in trees] == [True, False, False, True] and trees[1] == trees[2]
    assert asked[0][:6] == [
        "--model",
        f"resnet50,{Path('models.py').resolve()}:Net",
        "--batch",
        "4",
        "--device",
        "auto",
    ]
    assert "--train" in asked[0] and "--infer" not in asked[0]
    printed = capsys.readouterr().out
    assert "105 (100 - 110)" in printed and "210 (200 - 220)" in printed and printed.count("2.000") == 2
    assert repository("rev-parse", "--short=9", "HEAD~1") in printed
    assert repository("worktree", "list").count("\n") == 0 and not trees[1].exists()


def test_a_run_that_fails_is_told(repository, monkeypatch, capsys):
    monkeypatch.setattr(versus, "_bench", lambda *_: (2, "fusedres bench: error: no such thing\n"))
    assert main(["bench", "resnet50", "--compare", "HEAD"]) == 2
    assert "here: fusedres bench: error: no such thing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "no_such_branch"], "compare: expected a commit of "),
        (["--compare", "HEAD", "--csv", "a.csv"], "compare: expected without --csv"),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments, message, repository, capsys):
    assert main(["bench", "resnet50", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_commit_beside_itself(monkeypatch, capsys):
    if not versus._git("rev-parse", "HEAD"):
        pytest.skip("no git tree")
    monkeypatch.setenv("COLUMNS", "120")
    tiny = ["--block", "basic1", "--px", "8", "--batch", "1", "--rounds", "1", "--contenders", "fused", "--infer"]
    assert main(["bench", *tiny, "--device", "cpu", "--compare", "HEAD"]) == 0
    assert "basic1, infer, fp32, 1 x 8 px" in capsys.readouterr().out
