"""Faults planted in what the compiler made, before it is executed."""

import re
import sys
from collections.abc import Callable
from typing import Any, Protocol

import pytest

from fusedres import vgpu
from fusedres.compiler.binary import Specialisation, compile_for, scratch_bytes

# The package's function of that name hides the module.
run_module = sys.modules["fusedres.vgpu.run"]

NVIDIA = ("sm_80", "sm_90")
each_target = pytest.mark.parametrize("target", vgpu.TARGETS)
each_nvidia = pytest.mark.parametrize("target", NVIDIA)

BARRIER = r"^ .*call void @llvm\.(?:nvvm\.barrier|amdgcn\.s\.barrier)[^\n]*"

Edit = Callable[[str], str]


class Plant(Protocol):
    """Has the compiler's output edited before it is executed; the kernel may be given other shared memory, too."""

    def __call__(self, edit: Edit, *, shared_bytes: int | None = None) -> None: ...


def planter(monkeypatch: pytest.MonkeyPatch) -> Plant:
    def plant(edit: Edit, *, shared_bytes: int | None = None) -> None:
        def executable(
            kernel: Any, specialisation: Specialisation, target: str, num_warps: int, num_stages: int
        ) -> Any:
            compiled = compile_for(kernel, specialisation, target, num_warps=num_warps, num_stages=num_stages)
            before, metadata = compiled.asm["llir"], compiled.metadata
            after = edit(before)
            if after == before:
                pytest.fail("nothing was planted")
            shared = metadata.shared if shared_bytes is None else shared_bytes
            scratch = scratch_bytes(compiled)
            return run_module.executable_from(after, metadata.name, target, shared, scratch)

        monkeypatch.setattr(run_module, "_executable", executable)

    return plant


def substituted(pattern: str, replacement: str, which: int | None = None) -> Edit:
    """Replaces the match of this number (-1 is the last), or each of them."""

    def edit(llir: str) -> str:
        matches = list(re.finditer(pattern, llir, re.M))
        for match in reversed(matches if which is None else [matches[which]]):
            llir = llir[: match.start()] + match.expand(replacement) + llir[match.end() :]
        return llir

    return edit


def count_of(pattern: str, run: Callable[[], object], plant: Plant) -> int:
    """How often the pattern occurs in what the compiler made of the kernel that ``run`` runs."""
    found = []

    def look(llir: str) -> str:
        found.append(len(re.findall(pattern, llir, re.M)))
        return llir + "\n"

    plant(look)
    run()
    return found[0]
