"""fusedres.train.cifar: the published formats, and files that are missing or broken."""

import pickle
import shutil
import urllib.error

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from fusedres.train.cifar import CIFAR10, CIFAR100, load_cifar
from fusedres.train.sources import DataError
from tests.train.cifar_files import write_binary, write_cifar10_pickled, write_cifar100_pickled

pytestmark = pytest.mark.filterwarnings("ignore:.* holds .* images, the published file")


def check(loaded, written):
    *train, test = written
    for arrays, parts in zip(loaded, (train, [test]), strict=True):
        pixels = np.concatenate([part[0] for part in parts])
        assert arrays.images.dtype == torch.uint8
        assert arrays.images.shape == (len(pixels), 3, 32, 32)
        # A row is the red plane, the green and the blue, each row by row.
        np.testing.assert_array_equal(arrays.images.flatten(1).numpy(), pixels)
        np.testing.assert_array_equal(arrays.images[:, 1, 2, 3].numpy(), pixels[:, 1024 + 2 * 32 + 3])
        np.testing.assert_array_equal(arrays.labels.numpy(), np.concatenate([part[1] for part in parts]))
        assert arrays.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("form", "write"),
    [
        (CIFAR10, write_cifar10_pickled),
        (CIFAR100, write_cifar100_pickled),
        (CIFAR10, lambda root: write_binary(root, 10)),
        (CIFAR100, lambda root: write_binary(root, 100, 120)),
    ],
    ids=["cifar10-pickled", "cifar100-pickled", "cifar10-binary", "cifar100-binary"],
)
def test_both_formats_load_pixel_for_pixel(tmp_path, form, write):
    folder, written = write(tmp_path)
    check(load_cifar(form, tmp_path, download=False), written)
    check(load_cifar(form, folder, download=False), written)  # the folder itself may be named too


def test_torchvision_reads_the_files_that_the_tests_write(tmp_path, monkeypatch):
    from torchvision import datasets

    write_cifar10_pickled(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = datasets.CIFAR10(str(tmp_path), train=True)
    ours, _ = load_cifar(CIFAR10, tmp_path, download=False)
    np.testing.assert_array_equal(theirs.data, ours.images.permute(0, 2, 3, 1).numpy())
    assert theirs.targets == ours.labels.tolist()


def test_a_file_of_another_length_is_read_with_a_warning(tmp_path):
    write_cifar10_pickled(tmp_path)
    with pytest.warns(UserWarning, match="data_batch_1 holds 20 images, the published file 10000"):
        load_cifar(CIFAR10, tmp_path, download=False)


def test_no_files_and_no_network_say_what_is_expected(tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(DataError) as raised:
        load_cifar(CIFAR10, tmp_path / "data")
    for part in ("cifar-10-batches-py/ with data_batch_1, data_batch_2", "test_batch", "cifar-10-batches-bin/",
                 str(tmp_path / "data"), "https://", "Network is unreachable"):  # fmt: skip
        assert part in str(raised.value)


def test_without_permission_to_download_nothing_is_tried(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR100, "download", lambda self: pytest.fail("downloaded"))
    with pytest.raises(DataError, match=r"cifar100: no files under .*; expected cifar-100-python/ with train, test"):
        load_cifar(CIFAR100, tmp_path, download=False)


def test_a_download_is_used(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "__init__", lambda self, root, **_: write_cifar10_pickled(tmp_path) and None)
    train, _ = load_cifar(CIFAR10, tmp_path)
    assert len(train.labels) == 100


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_labels(path):
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    path.write_bytes(pickle.dumps(batch | {b"labels": batch[b"labels"][:-1]}, protocol=2))


def class_10(path):
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    path.write_bytes(pickle.dumps(batch | {b"labels": [10] * 20}, protocol=2))


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "lacks data_batch_2"),
        (truncate, "data_batch_2 is truncated or no pickled batch"),
        (lambda path: path.write_bytes(b""), "data_batch_2 is truncated or no pickled batch"),
        (other_labels, "data_batch_2: expected N rows of 3072 bytes and N labels, got torch.uint8 .* and 19 labels"),
        (class_10, "data_batch_2: expected labels from 0 to 9"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "builtins.print is not expected in it"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "data_batch_2 is truncated or no pickled batch"),
    ],
)
def test_a_broken_pickled_file_is_named(tmp_path, damage, message, capsys):
    folder, _ = write_cifar10_pickled(tmp_path)
    damage(folder / "data_batch_2")
    with pytest.raises(DataError, match=message):
        load_cifar(CIFAR10, tmp_path, download=False)
    assert "this ran" not in capsys.readouterr().out


def test_a_truncated_binary_file_is_named_with_its_sizes(tmp_path):
    folder, _ = write_binary(tmp_path, 10)
    truncate(folder / "test_batch.bin")
    with pytest.raises(DataError, match=r"test_batch.bin is truncated: expected records of 3073 bytes .*got 60460"):
        load_cifar(CIFAR10, tmp_path, download=False)
    shutil.rmtree(folder)
    folder, _ = write_binary(tmp_path, 10)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3.bin"):
        load_cifar(CIFAR10, tmp_path, download=False)
