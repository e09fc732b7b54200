"""CIFAR-10 and CIFAR-100 in both of their published formats, pickled ("python") and binary.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import socket
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedres.train.sources import Arrays, DataError

__all__ = ["CIFAR10", "CIFAR100", "Format", "load_cifar"]

PIXELS = 3 * 32 * 32


class Format(NamedTuple):
    """The files of one of the two data sets. ``label_bytes`` stand before each image; the last is the label."""

    name: str
    classes: int
    pickled_folder: str
    pickled: tuple[tuple[str, ...], str]
    label_key: bytes
    binary_folder: str
    binary: tuple[tuple[str, ...], str]
    label_bytes: int
    images_per_file: tuple[int, int]
    url: str


CIFAR10 = Format(
    "cifar10", 10, "cifar-10-batches-py", (tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), b"labels",
    "cifar-10-batches-bin", (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"), 1,
    (10_000, 10_000), "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)  # fmt: skip
CIFAR100 = Format(
    "cifar100", 100, "cifar-100-python", (("train",), "test"), b"fine_labels",
    "cifar-100-binary", (("train.bin",), "test.bin"), 2,
    (50_000, 10_000), "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)  # fmt: skip


def load_cifar(form: Format, root: Path, *, download: bool = True) -> tuple[Arrays, Arrays]:
    """Training and test images, (N, 3, 32, 32) uint8, from the files under ``root``.

    Where there are none, torchvision downloads and checks them.

    Raises:
        DataError: files are missing or broken, and which.
    """
    layout = _find(form, root)
    if layout is None and download:
        _download(form, root)
        layout = _find(form, root)
    if layout is None:
        raise DataError(_expected(form, root))
    folder, (train, test), read = layout
    missing = [name for name in (*train, test) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"data: {form.name}: {folder} lacks {', '.join(missing)}")
    batches = [read(form, folder / name, form.images_per_file[0]) for name in train]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Arrays(images, labels), Arrays(*read(form, folder / test, form.images_per_file[1]))


def _find(form: Format, root: Path) -> tuple[Path, tuple[tuple[str, ...], str], Any] | None:
    # The files may also lie in `root` itself.
    for folder_name, names, read in (
        (form.pickled_folder, form.pickled, _read_pickled),
        (form.binary_folder, form.binary, _read_binary),
    ):
        for folder in (root / folder_name, root):
            if any((folder / name).is_file() for name in (*names[0], names[1])):
                return folder, names, read
    return None


def _expected(form: Format, root: Path) -> str:
    (pickled, pickled_test), (binary, binary_test) = form.pickled, form.binary
    return (
        f"data: {form.name}: no files under {root}; expected {form.pickled_folder}/ with"
        f" {', '.join((*pickled, pickled_test))} (unpack {form.url} there)"
        f" or {form.binary_folder}/ with {', '.join((*binary, binary_test))}"
    )


def _download(form: Format, root: Path) -> None:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{_expected(form, root)}; torchvision would download them: {error}") from error
    kind = datasets.CIFAR10 if form.classes == 10 else datasets.CIFAR100
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        kind(str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{_expected(form, root)}; downloading them failed: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout)


class _Arrays(pickle.Unpickler):
    """Loads arrays, lists and strings; any other class in a pickle could run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")


def _read_pickled(form: Format, path: Path, expected: int) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = torch.as_tensor(content[b"data"])
        labels = torch.as_tensor(content[form.label_key], dtype=torch.int64)
    # A broken pickle can raise nearly anything, or hold nearly anything.
    except Exception as error:
        message = f"data: {form.name}: {path} is truncated or no pickled batch: {type(error).__name__}: {error}"
        raise DataError(message) from error
    if pixels.dtype != torch.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS or len(pixels) != len(labels):
        raise DataError(
            f"data: {form.name}: {path}: expected N rows of {PIXELS} bytes and N labels, got {pixels.dtype}"
            f" {tuple(pixels.shape)} and {len(labels)} labels"
        )
    return _checked(form, path, pixels, labels, expected)


def _read_binary(form: Format, path: Path, expected: int) -> tuple[torch.Tensor, torch.Tensor]:
    record = form.label_bytes + PIXELS
    size = path.stat().st_size
    if size == 0 or size % record:
        raise DataError(
            f"data: {form.name}: {path} is truncated: expected records of {record} bytes"
            f" ({expected * record} bytes in the published file), got {size} bytes"
        )
    rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, record)
    labels = rows[:, form.label_bytes - 1].long()
    return _checked(form, path, rows[:, form.label_bytes :], labels, expected)


def _checked(
    form: Format, path: Path, pixels: torch.Tensor, labels: torch.Tensor, expected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= form.classes:
        raise DataError(f"data: {form.name}: {path}: expected labels from 0 to {form.classes - 1}, got others or none")
    if len(labels) != expected:
        warnings.warn(f"{path} holds {len(labels)} images, the published file {expected}", stacklevel=2)
    return pixels.reshape(-1, 3, 32, 32).contiguous(), labels
