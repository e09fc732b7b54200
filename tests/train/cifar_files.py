"""CIFAR's files as they are published, with few images."""

import io
import pickle
import struct

import numpy as np


class _Python2(pickle._Pickler):
    """Writes what Python 2's pickle wrote: every string as bytes without an encoding."""

    def save_string(self, value):
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def dumps(value):
    """A pickle as in the published files, by Python 2 and the NumPy of 2009."""
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def images(count, classes, seed=0):
    """Pixels (count, 3072) uint8, red plane first, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    labels[:classes] = np.arange(min(classes, count))
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def write_cifar10_pickled(root, per_file=20, seed=0):
    """cifar-10-batches-py: a dict of bytes per batch, as Python 2 wrote them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    written = []
    for i, name in enumerate(names):
        pixels, labels = images(per_file, 10, seed + i)
        batch = {
            b"batch_label": name.encode(),
            b"labels": [int(label) for label in labels],
            b"data": pixels,
            b"filenames": [b"image.png"] * per_file,
        }
        (folder / name).write_bytes(dumps(batch))
        written.append((pixels, labels))
    meta = {b"label_names": [b"airplane"] * 10, b"num_cases_per_batch": per_file, b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(dumps(meta))
    return folder, written


def write_cifar100_pickled(root, count=120):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    written = []
    for i, name in enumerate(("train", "test")):
        pixels, labels = images(count, 100, i)
        batch = {
            b"filenames": [b"image.png"] * count,
            b"fine_labels": [int(label) for label in labels],
            b"coarse_labels": [int(label) // 5 for label in labels],
            b"data": pixels,
        }
        (folder / name).write_bytes(dumps(batch))
        written.append((pixels, labels))
    return folder, written


def write_binary(root, classes, count=20):
    """cifar-10-batches-bin or cifar-100-binary: records of the label bytes and 3,072 pixels."""
    folder = root / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    written = []
    for i, name in enumerate(names if classes == 10 else ["train.bin", "test.bin"]):
        pixels, labels = images(count, classes, i)
        rows = [labels.astype(np.uint8)[:, None], pixels]
        if classes == 100:
            rows.insert(0, (labels // 5).astype(np.uint8)[:, None])
        (folder / name).write_bytes(np.concatenate(rows, 1).tobytes())
        written.append((pixels, labels))
    return folder, written
