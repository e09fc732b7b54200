"""A process that compiles what it is sent, run by `compiler.ahead` as a script: it imports Triton and kernels alone.

Each message is its length and a pickle, in which kernels stand by their names. The first is where modules are found.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import pickle
import signal
import struct
import sys
import time
import types
from typing import Any, BinaryIO

LENGTH = struct.Struct(">Q")
PACKAGE = "fusedres"
# What a program that hung is given beyond its limit before it ends itself, should nobody be there to end it.
GRACE = 5


def main() -> None:
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no reply
    paths, folder = pickle.loads(_received(requests))
    sys.path[:] = paths
    # The package without what its own __init__ imports, PyTorch above all: kernels need none of it.
    package = types.ModuleType(PACKAGE)
    package.__path__ = [folder]
    sys.modules[PACKAGE] = package

    _send(replies, None)
    while message := _received(requests):
        start = time.perf_counter()
        error = None
        try:
            limit_s, recipe = _Unpickler(io.BytesIO(message)).load()
            if hasattr(signal, "alarm"):
                signal.alarm(math.ceil(limit_s) + GRACE)
            _compile(*recipe)
        except Exception as failure:  # of the compiler's many kinds
            error = f"does not compile: {type(failure).__name__}: {failure}"
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        _send(replies, (error, time.perf_counter() - start))


def _compile(kernel: Any, signature: Any, constants: Any, promises: Any, gpu: Any, options: Any) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature, constants, promises)
    compiled = triton.compile(source, target=GPUTarget(*gpu), options=options)
    if gpu[0] == "cuda":
        with contextlib.suppress(Exception):
            _write_launcher(source, compiled.metadata)


def _write_launcher(source: Any, metadata: Any) -> None:
    """Compile what starts a kernel, where that is C: Triton 3.6 writes some for each kind of arguments.

    It is linked to the driver, and without one it is left to the launch.
    """
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(source, metadata)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: tuple[str, str]) -> Any:
        module, qualified = name
        bare = sys.modules.get(PACKAGE)
        if not module.startswith(f"{PACKAGE}.") and not hasattr(bare, "__file__"):
            sys.modules.pop(PACKAGE, None)  # a module of somebody else's may import the whole
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
        return found


def _received(stream: BinaryIO) -> bytes:
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _send(stream: BinaryIO, reply: object) -> None:
    message = pickle.dumps(reply)
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


if __name__ == "__main__":
    main()
