"""examples/: each runs and learns by fused passes, says what is fused, and without its one line is the plain script."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
RANKS = {"ddp_amp": 2, "fsdp2": 2}
"""Those that torchrun starts."""

NEEDED = {"timm_train": "timm", "lightning_callback": "lightning", "accelerate_loop": "accelerate"}
PLAIN_PARTS = {"accelerate_loop": 1}
"""How many candidates, of one batch norm each, are left, of which the report says why."""

HEAVY = {*RANKS, "inference_server", "detection"}
LINE = re.compile(r"^( *)(?:\w+ = )?fusedres\.(?:fuse|freeze)\(.*$", re.MULTILINE)
LONGEST = 60


class Run(NamedTuple):
    """Losses by step, or what was answered; how many passes were fused; what was printed."""

    numbers: list[float]
    passes: int
    printed: str


def variant(name: str, *, exact: bool, plain: bool) -> str:
    """A script, without its one line if it is to be plain, in fp64 if it is to be exact."""
    text = (FOLDER / f"{name}.py").read_text()
    if plain:
        text = LINE.sub(r"\1pass", text)
    if exact:
        text = re.sub(r"torch\.(bfloat16|float32)\b", "torch.float64", text)
    return text


def run_here(name: str, *, exact: bool = False, plain: bool = False) -> Run:
    from fusedres.nn.fused import Fused

    passes, attempt, printed, default = [0], Fused.attempt, io.StringIO(), torch.get_default_dtype()

    def counting(self, *args):
        z = attempt(self, *args)
        passes[0] += z is not None
        return z

    found = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(Fused, "attempt", counting)
        torch.set_default_dtype(torch.float64 if exact else default)
        try:
            exec(compile(variant(name, exact=exact, plain=plain), f"{name}.py", "exec"), found)
        finally:
            torch.set_default_dtype(default)
    numbers = found["losses"] if "losses" in found else found["logits"].flatten().tolist()
    return Run(numbers, passes[0], printed.getvalue())


def run_script(name: str, folder: Path, **how: bool) -> Run:
    """The run of the first rank; the others have to end well, too."""
    if name not in RANKS:
        return run_here(name, **how)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS[name]}", __file__,
        name, str(folder), json.dumps(how),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    runs = [Run(*json.loads((folder / f"{rank}.json").read_text())) for rank in range(RANKS[name])]
    assert all(run.numbers == runs[0].numbers for run in runs)
    return runs[0]


@pytest.fixture(params=[pytest.param(s, marks=pytest.mark.slow) if s in HEAVY else s for s in SCRIPTS])
def name(request):
    script = request.param
    if script in NEEDED:
        pytest.importorskip(NEEDED[script])
    if script in RANKS and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    if script == "inference_server" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    return script


def test_runs_and_learns_and_says_what_is_fused(name, tmp_path):
    run = run_script(name, tmp_path)
    assert all(map(math.isfinite, run.numbers))
    if name != "inference_server":
        assert run.passes > 0
    if name not in ("inference_server", "moco"):
        assert run.numbers[-1] < run.numbers[0]
    left = PLAIN_PARTS.get(name, 0)
    candidates, norms = (
        tuple(map(int, re.search(rf"(\d+) of (\d+) {what} fused", run.printed).groups()))
        for what in ("candidates", "batch norms")
    )
    assert 0 < candidates[0] == candidates[1] - left
    assert norms == (0, 0) if name == "inference_server" else 0 < norms[0] == norms[1] - left


@pytest.mark.slow
def test_without_the_one_line_it_is_the_plain_script(name, tmp_path):
    fused, plain = (run_script(name, tmp_path, exact=True, plain=plain) for plain in (False, True))
    assert plain.passes == 0 and re.search(r"^0 of \d+ candidates fused", plain.printed, re.MULTILINE)
    torch.testing.assert_close(torch.tensor(fused.numbers), torch.tensor(plain.numbers), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_short_and_one_line_longer_than_plain(script):
    text = (FOLDER / f"{script}.py").read_text()
    assert len(text.splitlines()) <= LONGEST
    assert len(LINE.findall(text)) == 1 and "# the one line" in LINE.search(text)[0]
    assert "print(fusedres.report(" in text


def test_every_script_is_in_the_table():
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == SCRIPTS


if __name__ == "__main__":
    import os

    from fusedres.nn import size_rule

    size_rule.LEAST_WORK_PER_THREAD = 0
    torch.set_num_threads(1)
    _, script, folder, how = sys.argv
    result = run_here(script, **json.loads(how))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
