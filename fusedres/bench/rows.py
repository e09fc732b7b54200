"""A row of results: the schema of the CSV, written row by row so that an interruption loses nothing finished."""

from __future__ import annotations

import csv
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FAILED", "MEMORY", "NOT_AVAILABLE", "OK", "REFUSED", "Key", "Row", "Writer", "new_table", "read_rows"]

OK, REFUSED, NOT_AVAILABLE = "ok", "refused by the gate", "not available"
MEMORY, FAILED = "out of memory", "failed"


class Key(NamedTuple):
    """What tells rows apart."""

    case: str
    mode: str
    dtype: str
    batch: int
    px: int
    contender: str


@dataclass(frozen=True)
class Row:
    """One contender on one case under one setting. None (an empty cell) is what was not measured or does not exist.

    Attributes:
        case, kind: what was run; kind is op, block or network.
        mode: train, infer or op.
        dtype: fp32, tf32, fp16 or bf16.
        batch, px: images, and their height and width in pixels.
        contender: who ran it.
        status: ok, refused by the gate, not available, out of memory, failed; only ok has times.
        reason: why it is not ok.
        images_per_s: batch over the median; of blocks and networks.
        speedup: the median of channels_last eager over this one.
        median_s, low_s, high_s: seconds of a step, with 20 % and 80 % quantiles over ``rounds``.
        first_step_s: from the plain model to the end of the first step, compilation and tuning included.
        error, bound: relative error against fp64 (of all gradients, or the largest of the outputs), and what the gate
            allows.
        peak_bytes: most memory allocated on the GPU during a step, other contenders' left out.
        saved_bytes_per_image: what autograd keeps for backward, over the batch.
        launches: of kernels in a step, as the profiler counted them on the GPU.
        declared_launches, declared_bytes, declared_flops: of a step, as `fusedres explain` counts them, the loss and
            the optimiser left out; of an op, by its kernels.
        library_calls: how many of these launches are the library's; of an op, contractions beside its kernels.
        declared_whole: whether the bytes are those of the whole step.
        flops: of the plain model's contractions; of an op, as declared.
        gb_per_s: declared bytes over the median, where the declaration is of the whole step.
        tflop_per_s: ``flops`` over the median.
        roofline_s: what declared bytes and FLOPs take at the peaks measured on this machine.
        of_roofline: ``roofline_s`` over the median.
        peak_gb_per_s, peak_tflop_per_s: those peaks.
        sm_mhz, memory_mhz, watts, celsius: of the GPU right after the last round.
        device, processor, threads, driver, python, torch, triton, cuda, cudnn, fusedres, commit: the machine.
        date: UTC, when the row was finished.
    """

    case: str
    kind: str
    mode: str
    dtype: str
    batch: int
    px: int
    contender: str
    status: str
    reason: str | None = None
    images_per_s: float | None = None
    speedup: float | None = None
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    rounds: int | None = None
    first_step_s: float | None = None
    error: float | None = None
    bound: float | None = None
    peak_bytes: int | None = None
    saved_bytes_per_image: float | None = None
    launches: int | None = None
    declared_launches: int | None = None
    declared_bytes: int | None = None
    declared_flops: int | None = None
    library_calls: int | None = None
    declared_whole: bool | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roofline_s: float | None = None
    of_roofline: float | None = None
    peak_gb_per_s: float | None = None
    peak_tflop_per_s: float | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    watts: float | None = None
    celsius: int | None = None
    device: str = ""
    processor: str = ""
    threads: int | None = None
    driver: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    cudnn: str = ""
    fusedres: str = ""
    commit: str = ""
    date: str = ""

    @property
    def ours(self) -> bool:
        """Whether a fused model or an op of ours made it."""
        return self.contender.startswith("fused") or self.contender == "tuned"

    @property
    def key(self) -> Key:
        return Key(self.case, self.mode, self.dtype, self.batch, self.px, self.contender)

    @property
    def group(self) -> str:
        """What the contenders of one comparison have in common, for people."""
        return f"{self.case}, {self.mode}, {self.dtype}, batch {self.batch}, {self.px} px"


COLUMNS = tuple(field.name for field in fields(Row))


def types_of(row: type) -> dict[str, tuple[type, ...]]:
    """What the cells of a table of such rows hold, by column."""
    return {name: tuple(typing.get_args(hint)) or (hint,) for name, hint in typing.get_type_hints(row).items()}


def parsed(types: tuple[type, ...], text: str) -> Any:
    """What a cell holds.

    Raises:
        ValueError: it is none of these types.
    """
    if text == "" and type(None) in types:
        return None
    return text == "True" if types[0] is bool else types[0](text)


_TYPES = types_of(Row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV that `Writer` wrote; a last line that an interruption cut short is left out.

    Raises:
        ValueError: the file has other columns.
        OSError: it can not be read.
    """
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header != list(COLUMNS):
            raise ValueError(f"{path}: expected the columns of this version of fusedres, got {header}")
        return [
            Row(**{name: parsed(_TYPES[name], text) for name, text in zip(COLUMNS, line, strict=True)})
            for line in reader
            if len(line) == len(COLUMNS)
        ]


class Writer:
    """Adds rows to an open CSV."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.csv = csv.writer(file)

    def header(self) -> None:
        self.csv.writerow(COLUMNS)
        self.file.flush()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.csv.writerow([_text(getattr(row, name)) for name in COLUMNS])
        self.file.flush()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def new_table(path: Path, kept: Iterable[Row] = ()) -> Iterator[Writer]:
    """A `Writer` on a new file at ``path`` that begins with the rows ``kept``.

    Raises:
        OSError: it can not be written.
    """
    rows = list(kept)
    with path.open("w", newline="") as file:
        writer = Writer(file)
        writer.header()
        writer.add(rows)
        yield writer
