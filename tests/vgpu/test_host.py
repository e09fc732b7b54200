"""A machine that lacks something says what to install; what is built is kept, and lives as long as it is used."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedres import backend, vgpu
from fusedres.vgpu import Unavailable, host, why_unavailable
from tests.vgpu_support import needs_vgpu

ROOT = Path(__file__).parents[2]


def test_available_here_or_said_why() -> None:
    reason = why_unavailable()
    assert reason is None or len(reason) > 20


def lack_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")


LACKS = {
    "another system": (
        lambda patch: patch.setattr(sys, "platform", "darwin"),
        "executed on Linux on x86-64 only, and this is darwin on",
    ),
    "another processor": (lambda patch: patch.setattr("platform.machine", lambda: "aarch64"), "linux on aarch64"),
    "llvmlite": (lambda patch: patch.setattr(host, "llvm", None), r"llvmlite is not installed: pip install '.*vgpu\]'"),
    "compiler": (lack_compiler, r"no C compiler among \$CC, cc, gcc, clang: install one, such as Debian's package gcc"),
    "triton": (lambda patch: patch.setitem(sys.modules, "triton", None), "triton is not installed: pip install triton"),
    "older triton": (
        lambda patch: patch.setattr("triton.__version__", "3.5.1"),
        "triton 3.5.1 is not known to be read correctly: install one of 3.6 to 3.9",
    ),
    "newer triton": (lambda patch: patch.setattr("triton.__version__", "3.10.0+git1"), "install one of 3.6 to 3.9"),
}  # fmt: skip


@needs_vgpu
@pytest.mark.parametrize("lack", LACKS)
def test_what_is_missing_is_named(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take, reason = LACKS[lack]
    take(monkeypatch)
    with pytest.raises(Unavailable, match=reason):
        host.require()
    with pytest.raises(Unavailable, match=rf"backend 'vgpu:sm_90': .*{reason}"), backend("vgpu:sm_90"):
        pass


@needs_vgpu
def test_a_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.vgpu import kernels

    lack_compiler(monkeypatch)
    with pytest.raises(Unavailable, match="no C compiler"):
        vgpu.run(kernels.grid_kernel, (1,), torch.zeros(2, dtype=torch.int32))


@needs_vgpu
@pytest.mark.parametrize("version", ["3.6.0", "3.9.1+git"])
def test_known_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert why_unavailable() is None


@needs_vgpu
@pytest.mark.parametrize("target", ["sm_75", "gfx942", "cpu", ""])
def test_targets_that_are_not_executed(target: str) -> None:
    from tests.vgpu import kernels

    known = "sm_80, sm_90, gfx1100"
    with pytest.raises(ValueError, match=f"target: expected one of {known}, got '{target}'"):
        vgpu.run(kernels.grid_kernel, (1,), torch.zeros(2, dtype=torch.int32), target=target)
    with pytest.raises(ValueError, match=f"expected vgpu:<target> with one of {known}"), backend(f"vgpu:{target}"):
        pass


@needs_vgpu
def test_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its words are in the message, nothing is left of its file, and the next one is asked."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no disk left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(Unavailable, match=rf"(?s)^{compiler} -O3 .* failed:\nno disk left"):
        host.runtime.__wrapped__()
    assert list((tmp_path / "cache" / "vgpu").iterdir()) == []


@needs_vgpu
def test_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    made = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_bytes(b"whole")

    first, second = host._kept("key", ".o", make), host._kept("key", ".o", make)
    assert first == second
    assert first.read_bytes() == b"whole"
    assert len(made) == 1 and host._kept("other key", ".o", make) != first

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        host._kept("third key", ".o", fail)
    assert len(list((tmp_path / "vgpu").iterdir())) == 2


@needs_vgpu
def test_kernels_that_are_no_longer_used() -> None:
    """What a kernel's engine owned is gone with it; the next kernel is built by something of its own."""
    text = f"define void @{vgpu.host.ENTRY}(ptr %0) {{\n  ret void\n}}\n"
    for index in range(3):
        kernel = host.HostKernel(host.Module(f"; {os.getpid()} {index}\n{text}", (), ()))
        assert kernel.entry
        del kernel
        gc.collect()


@needs_vgpu
def test_tests_are_skipped_with_the_reason() -> None:
    """Where kernels can not be executed, tests that need it say so, and none of them passes."""
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    environment["PATH"] = "/nonexistent"
    files = ["tests/vgpu/test_run.py", "tests/vgpu/test_host.py"]
    command = [sys.executable, "-m", "pytest", "-rs", "-q", "-p", "no:cacheprovider", "-k", "not said_why", *files]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # A module whose imports need Triton is skipped as a whole, where it asks.
    assert re.search(r"SKIPPED \[1\] tests/vgpu_support.py:\d+: no C compiler among .*: install one", result.stdout)
    summary = result.stdout.splitlines()[-1]
    assert "skipped" in summary
    assert not any(word in summary for word in ("passed", "failed", "error"))
