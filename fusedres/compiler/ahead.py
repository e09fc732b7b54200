"""Binaries compiled before they are launched, in processes of their own.

These are started as programs, so that they share nothing with this one: neither its CUDA context nor its ``__main__``.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.compiler.binary import Binary
from fusedres.compiler.known import recipe_of
from fusedres.compiler.targets import require_triton, target_named, triton
from fusedres.compiler.worker import LENGTH

# To import Triton takes a third of a second, and on a machine that is busy with this very thing many times as long.
START_LIMIT_S = 120.0


class Made(NamedTuple):
    """What became of a binary: why it could not be compiled, or None, and how many seconds it took."""

    error: str | None
    seconds: float


_log = logging.getLogger(__name__)


def compile_ahead(
    binaries: Iterable[Binary],
    target: str,
    *,
    folder: Path | None = None,
    jobs: int | None = None,
    limit_s: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Binary, Made]:
    """Compile binaries in parallel into Triton's cache, where a launch on that GPU finds them.

    One that does not compile, whose compiler crashes or takes longer than ``limit_s`` has its error, and costs no
    other. What the cache holds starts no process. No process is left when this returns or raises.

    Args:
        binaries: what to compile; equal ones are one.
        target: of `compiler.TARGETS`.
        folder: in place of Triton's cache; made where it is missing.
        jobs: processes at most; as many as there are cores if not given.
        limit_s: seconds that one binary may take.
        progress: told after each binary how many are done, of how many.

    Raises:
        ValueError: an unknown target, or a number of jobs or seconds that is not positive.
        Unavailable: Triton is not installed.
    """
    require_triton()
    target_named(target)
    for name, value in {"jobs": jobs, "limit_s": limit_s}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    every = list(dict.fromkeys(binaries))
    made: dict[Binary, Made] = {}
    missing: deque[tuple[Binary, bytes]] = deque()

    def done(binary: Binary, error: str | None, seconds: float) -> None:
        made[binary] = Made(error, seconds)
        if progress is not None:
            progress(len(made), len(every))

    with cached_in(folder):
        for binary in every:
            start = time.perf_counter()
            told = recipe_of(binary, target)
            if told.is_made():
                done(binary, None, time.perf_counter() - start)
                continue
            try:
                missing.append((binary, _packed((limit_s, tuple(told)))))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                done(binary, str(error), 0.0)
        if missing:
            _log.info("%d binaries of %d for %s are compiled", len(missing), len(every), target)
        _compile_in_processes(missing, min(jobs or cores(), len(missing)), limit_s, done)
    return {binary: made[binary] for binary in every}


def missing_of(binaries: Iterable[Binary], target: str, *, folder: Path | None = None) -> list[Binary]:
    """Those that Triton's cache, or ``folder``, does not hold. Raises as `compile_ahead`."""
    with cached_in(folder):
        return [binary for binary in dict.fromkeys(binaries) if not recipe_of(binary, target).is_made()]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def cached_in(folder: Path | None) -> Iterator[None]:
    """Triton's cache is this folder inside the ``with`` block, in processes started there too; None: where it was."""
    if folder is None:
        yield
        return
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder.absolute())
        yield


def _compile_in_processes(
    waiting: deque[tuple[Binary, bytes]], jobs: int, limit_s: float, done: Callable[[Binary, str | None, float], None]
) -> None:
    workers: list[_Worker] = []
    try:
        with selectors.DefaultSelector() as selector:
            while waiting or workers:
                while len(workers) < min(jobs, len(waiting) + sum(worker.task is not None for worker in workers)):
                    workers.append(_Worker(limit_s))
                    selector.register(workers[-1].replies, selectors.EVENT_READ, workers[-1])
                until = min(worker.deadline for worker in workers)
                heard = [key.data for key, _ in selector.select(max(0.0, until - time.monotonic()))]
                late = [one for one in workers if one not in heard and one.deadline <= time.monotonic()]
                for worker in [*heard, *late]:
                    task, seconds = worker.task, worker.seconds
                    reply = worker.reply() if worker in heard else None
                    if reply is None:  # it is no more, or is to be no more
                        selector.unregister(worker.replies)
                        workers.remove(worker)
                        why = worker.end(crashed=worker in heard)
                        if task is None:  # it could not even start, and no other would
                            while waiting:
                                done(waiting.popleft()[0], why, 0.0)
                        else:
                            done(task, why, seconds)
                        continue
                    if task is not None:
                        done(task, *reply)
                    if waiting:
                        worker.compile(*waiting.popleft())
                    else:
                        selector.unregister(worker.replies)
                        workers.remove(worker)
                        worker.end()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that compiles one binary after the other (`compiler.worker`).

    Attributes:
        task: what it is compiling; None: it starts.
        deadline: when it is to have replied, on the clock of `time.monotonic`.
    """

    def __init__(self, limit_s: float) -> None:
        package = Path(__file__).parents[1]
        script = Path(__file__).with_name("worker.py")
        # As a script it would have its folder, with names like those of Python's own modules, on its path.
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process is)
        try:
            self._process: Any = subprocess.Popen(
                [sys.executable, "-c", code, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C is this process's to see, and what a compiler starts ends with it
            )
        except BaseException:
            self._said.close()
            raise
        self._limit_s, self._since = limit_s, time.monotonic()
        self.task: Binary | None = None
        self.deadline = self._since + START_LIMIT_S
        self._send(_packed((sys.path, str(package))))

    @property
    def replies(self) -> Any:
        return self._process.stdout

    @property
    def seconds(self) -> float:
        """Since it was told what to do."""
        return time.monotonic() - self._since

    def compile(self, binary: Binary, message: bytes) -> None:
        """Hand a binary over."""
        self.task, self._since = binary, time.monotonic()
        self.deadline = self._since + self._limit_s
        self._send(message)

    def reply(self) -> Any:
        """What it replies, a tuple; None: it is no more."""
        head = self.replies.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        message = self.replies.read(LENGTH.unpack(head)[0])
        try:
            return pickle.loads(message) or ()
        except (EOFError, pickle.UnpicklingError):  # of half a message
            return None

    def end(self, *, crashed: bool = False) -> str:
        """End the process and what it has started; why it ended, in words."""
        if crashed:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)  # for a status of its own
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        status = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                stream.close()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        self._said.close()
        if not crashed:
            limit = self._limit_s if self.task is not None else START_LIMIT_S
            return f"the compiler took longer than {limit:g} s, and was ended"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the compiler crashed ({how})" + (f": {last}" if last else "")

    def _send(self, message: bytes) -> None:
        with suppress(BrokenPipeError):  # where it is no more, which `reply` says
            self._process.stdin.write(LENGTH.pack(len(message)) + message)
            self._process.stdin.flush()


def _packed(message: object) -> bytes:
    """A message to `compiler.worker`, in which kernels stand by module and name.

    Raises:
        pickle.PicklingError: another process would not find a kernel by these.
    """
    stream = io.BytesIO()
    _Pickler(stream).dump(message)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, triton.JITFunction):
            return None
        module, name = value.fn.__module__, value.fn.__qualname__
        found = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not value or module == "__main__":
            raise pickle.PicklingError(f"{name}: expected a kernel that its module, {module}, can be imported for")
        return module, name
