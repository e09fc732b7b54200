"""fusedres.train.digits: a stratified split, standardised images, batches that depend on the seed alone."""

import sys

import pytest
import torch

from fusedres.train.digits import batches, load_digits, shift

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_split_is_complete_and_stratified(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    for label in range(10):
        total = (datasets.load_digits().target == label).sum()
        assert abs((digits.test_labels == label).sum().item() - total / 5) < 1
        assert (digits.train_labels == label).sum() + (digits.test_labels == label).sum() == total


def test_no_test_image_is_a_training_image(digits):
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_images_are_standardised_and_match_the_source(digits):
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.train_images.std().item() == pytest.approx(1, abs=1e-5)
    assert digits.background == digits.train_images.min().item()
    # Undone by its own two figures, the first test image (the first zero) is the first image of the source.
    grey = torch.from_numpy(datasets.load_digits().images).float()
    scale = 16 / (digits.train_images.max() - digits.background)
    assert digits.test_labels[0] == 0
    torch.testing.assert_close((digits.test_images[0, 0] - digits.background) * scale, grey[0])


def test_larger_images_keep_their_mean(digits):
    large = load_digits(16)
    assert large.train_images.shape == (1437, 1, 16, 16)
    assert torch.equal(large.train_labels, digits.train_labels)
    assert large.train_images.std().item() == pytest.approx(1, abs=1e-5)


def test_shift_moves_every_image_by_its_own_offset():
    images = torch.zeros(64, 1, 5, 5)
    images[:, 0, 2, 2] = 1
    moved = shift(images, 1, background=-3.0, generator=torch.Generator().manual_seed(0))
    positions = {tuple((image[0] == 1).nonzero()[0].tolist()) for image in moved}
    assert positions == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
    for image in moved:
        row, column = (image[0] == 1).nonzero()[0].tolist()
        entered = torch.full((5, 5), False)
        if row != 2:
            entered[0 if row == 3 else 4] = True
        if column != 2:
            entered[:, 0 if column == 3 else 4] = True
        assert torch.equal(image[0] == -3, entered)


def test_batches_depend_on_the_seed_alone(digits):
    def epoch(seed):
        return list(batches(digits, 64, generator=torch.Generator().manual_seed(seed)))

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert len(first) == 1437 // 64
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_an_epoch_shows_every_image_at_most_once_with_its_own_label(digits):
    label_of = {
        image.numpy().tobytes(): label.item()
        for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    }
    seen = []
    for images, labels in batches(digits, 50, generator=torch.Generator().manual_seed(0), max_shift=0):
        for image, label in zip(images, labels, strict=True):
            assert label_of[image.numpy().tobytes()] == label.item()
            seen.append(image.numpy().tobytes())
    assert len(seen) == len(set(seen)) == 1400


@pytest.mark.parametrize("size", [0, -1, 1438])
def test_batch_size_out_of_range_is_refused_at_once(digits, size):
    with pytest.raises(ValueError, match=f"size must be between 1 and the 1437 training images, got {size}"):
        batches(digits, size, generator=torch.Generator())


def test_image_size_below_the_original_is_refused():
    with pytest.raises(ValueError, match=r"px must be at least 8.*got 7"):
        load_digits(7)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install fusedres\[cli\]"):
        load_digits()
