"""The host's side of execution: the runtime built by the system's C compiler, kernels built by llvmlite."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusedres.cache import cache_folder
from fusedres.vgpu.errors import Unavailable
from fusedres.vgpu.ir import ENTRY, Module

try:
    import llvmlite.binding as llvm
except ImportError:
    llvm = None

HERE = Path(__file__).parent
SOURCES = ("runtime.c", "warp.c", "bulk.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-Wall")
COMPILERS = ("cc", "gcc", "clang")


def why_unavailable() -> str | None:
    """What this machine lacks to execute kernels, and what to install; None if nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"kernels are executed on Linux on x86-64 only, and this is {sys.platform} on {platform.machine()}"
    if llvm is None:
        return "llvmlite is not installed: pip install 'fusedres[vgpu]'"
    if _compiler() is None:
        return f"no C compiler among $CC, {', '.join(COMPILERS)}: install one, such as Debian's package gcc"
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not OLDEST_TRITON <= version <= NEWEST_TRITON:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST_TRITON, NEWEST_TRITON))
        return f"triton {triton.__version__} is not known to be read correctly: install one of {known}"
    return None


OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)


def require() -> None:
    """Raise `Unavailable` if this machine can not execute kernels."""
    reason = why_unavailable()
    if reason is not None:
        raise Unavailable(reason)


def _compiler() -> str | None:
    return next((path for name in (os.environ.get("CC"), *COMPILERS) if name and (path := shutil.which(name))), None)


def _cache() -> Path:
    return cache_folder() / "vgpu"


def _cpu() -> str:
    """What machine code for this processor depends on."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def _kept(key: str, suffix: str, make: Any) -> Path:
    """The file under this key in the cache, made first if it is not there; others never see half of it."""
    path = _cache() / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix, dir=path.parent)
        os.close(handle)
        try:
            make(Path(temporary))
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


@functools.cache
def runtime() -> ctypes.CDLL:
    """The scheduler and the operations of a warp, compiled once per machine and version.

    Raises:
        Unavailable: something is missing here, or the compiler failed.
    """
    require()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    compiler = _compiler()
    assert compiler is not None
    text = "".join((HERE / name).read_text() for name in (*SOURCES, "runtime.h"))

    def build(path: Path) -> None:
        command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-lm", "-o", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Unavailable(f"{' '.join(command)} failed:\n{result.stderr}")

    path = _kept(f"{text} {compiler} {FLAGS} {_cpu()}", ".so", build)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    llvm.load_library_permanently(str(path))
    return library


def _machine() -> Any:
    # The conversion to bf16 that some processors have takes denormal numbers for zero.
    features = [f for f in llvm.get_host_cpu_features().flatten().split(",") if "bf16" not in f and "avx10" not in f]
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=",".join([*features, "-avx512bf16"]), opt=2, reloc="pic", jit=True
    )


class HostKernel:
    """A kernel as machine code of this processor."""

    def __init__(self, module: Module) -> None:
        runtime()
        path = _kept(f"{module.text} {llvm.llvm_version_info} {_cpu()}", ".o", lambda path: _build(module.text, path))
        empty = llvm.parse_assembly("")
        empty.triple = llvm.get_default_triple()
        # The engine owns the machine that it is given, so each needs one of its own.
        self._engine = llvm.create_mcjit_compiler(empty, _machine())
        self._engine.add_object_file(llvm.ObjectFileRef.from_path(str(path)))
        self._engine.finalize_object()
        self.entry = self._engine.get_function_address(ENTRY)
        self.module = module


def _build(text: str, path: Path) -> None:
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_default_triple()
    module.verify()
    machine = _machine()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)
    path.write_bytes(machine.emit_object(module))
