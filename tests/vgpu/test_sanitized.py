"""The C runtime under the sanitizers of addresses and of undefined behaviour: kernels run in it, faulty ones too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres.vgpu import host
from tests.vgpu_support import needs_vgpu

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-fno-omit-frame-pointer")
# The interpreter's own leaks are its own; kernels run on stacks that the runtime switches between.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}

RUN = """
import sys
import pytest
from fusedres.vgpu import host
host.FLAGS = (*host.FLAGS, *{flags!r})
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""
TESTS = ("tests/vgpu/test_bulk.py",)


def library(name: str) -> str | None:
    """A sanitizer's shared library, which has to be loaded before the interpreter; None: the compiler has none."""
    compiler = host._compiler()
    if compiler is None:
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.mark.slow
@needs_vgpu
def test_the_runtime_of_kernels_is_clean(tmp_path):
    preloaded = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    if None in preloaded:
        pytest.skip(f"{host._compiler()} has no sanitizers")
    environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(map(str, preloaded)), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RUN.format(flags=SANITIZERS), *TESTS]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
