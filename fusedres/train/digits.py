"""The 1,797 handwritten digits that scikit-learn ships: real images without a download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, test part; 8×8
pixels, grey values 0 to 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = ["Digits", "batches", "every_fifth", "load_digits", "shift"]


@dataclass(frozen=True)
class Digits:
    """Standardised images (N, 1, H, W) fp32, labels (N,) int64, and the `background` value of empty paper."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    background: float


def load_digits(px: int = 8) -> Digits:
    """1,437 training and 360 test images of `px`×`px` pixels, every class split four to one.

    The split is a rule, not a draw: in order of class, every fifth image is a test image. Images larger than
    8×8 are interpolated bilinearly. Mean and standard deviation are those of the training images.

    Raises:
        ValueError: `px` is below 8.
        ImportError: scikit-learn is not installed.
    """
    if px < 8:
        raise ValueError(f"px must be at least 8, the size of the original images, got {px}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install fusedres[cli]") from error

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    if px != 8:
        images = F.interpolate(images, size=(px, px), mode="bilinear", align_corners=False)

    is_test = every_fifth(labels)
    std, mean = torch.std_mean(images[~is_test])
    images = (images - mean) / std
    return Digits(
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        background=float(-mean / std),
    )


def every_fifth(labels: torch.Tensor) -> torch.Tensor:
    """Which images are for testing: in order of class, every fifth."""
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[labels.argsort(stable=True)[::5]] = True
    return is_test


def shift(images: torch.Tensor, max_shift: int, *, background: float, generator: torch.Generator) -> torch.Tensor:
    """Move every image by its own random offset of at most `max_shift` pixels along both axes."""
    if max_shift == 0:
        return images
    N, C, H, W = images.shape
    padded = F.pad(images, [max_shift] * 4, value=background)
    top, left = torch.randint(0, 2 * max_shift + 1, (2, N, 1), generator=generator)
    rows = (top + torch.arange(H))[:, None, :, None]
    columns = (left + torch.arange(W))[:, None, None, :]
    i_image = torch.arange(N)[:, None, None, None]
    i_channel = torch.arange(C)[None, :, None, None]
    return padded[i_image, i_channel, rows, columns]


def batches(
    digits: Digits, size: int, *, generator: torch.Generator, max_shift: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of shuffled, randomly shifted batches of exactly `size` images; the rest is left out.

    Raises:
        ValueError: `size` is below 1 or above the number of training images.
    """
    count = len(digits.train_labels)
    if not 1 <= size <= count:
        raise ValueError(f"size must be between 1 and the {count} training images, got {size}")
    return _draw(digits, size, generator, max_shift)


def _draw(
    digits: Digits, size: int, generator: torch.Generator, max_shift: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.randperm(len(digits.train_labels), generator=generator)
    for i_batch in order[: len(order) // size * size].split(size):
        images = shift(digits.train_images[i_batch], max_shift, background=digits.background, generator=generator)
        yield images, digits.train_labels[i_batch]
