"""fusedres.train.augment: statistics, and each transformation against its definition."""

import pytest
import torch
from torch.nn import functional as F

from fusedres.train.augment import Augment, Statistics, measure
from fusedres.train.draws import normal
from fusedres.train.recipe import PadCrop, ScaleCrop
from fusedres.train.sources import Arrays


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (700, 3, 6, 6), generator=generator, dtype=torch.uint8)
    images[:, 1] = images[:, 0] // 2 + images[:, 1] // 4
    return Arrays(images, torch.zeros(700, dtype=torch.long))


def test_statistics_are_those_of_the_images(source):
    exact = source.images.double() / 255
    pixel, channel = measure(source, "pixel"), measure(source, "channel")
    torch.testing.assert_close(pixel.mean, exact.mean(0).float())
    torch.testing.assert_close(channel.mean, exact.mean((0, 2, 3)).float()[:, None, None])
    torch.testing.assert_close(pixel.std.flatten(), exact.std((0, 2, 3), correction=0).float())
    covariance = torch.cov(exact.movedim(1, 0).flatten(1), correction=0).float()
    lengths = pixel.colours.norm(dim=0)
    axes = pixel.colours / lengths
    torch.testing.assert_close(axes @ torch.diag(lengths) @ axes.T, covariance, atol=1e-6, rtol=1e-4)


def test_normalised_images_have_mean_0_and_deviation_1(source):
    for mean in ("pixel", "channel"):
        images = Augment(measure(source, mean), PadCrop())(source.images, None)
        assert images.mean((0, 2, 3)).abs().max() < 1e-5
        assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3 + (0.02 if mean == "pixel" else 0)
    centred = Augment(measure(source, "pixel"), PadCrop())(source.images, None)
    assert centred.mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [True, False])
def test_pad_crop_cuts_where_the_draws_say(source, mode, flip):
    pad = 2
    augment = Augment(measure(source, "pixel"), PadCrop(pad, mode, flip))
    draws = torch.rand(700, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = augment(source.images, draws)
    plain = augment(source.images, None)
    # The mean is subtracted first, so that zeros stand for the mean.
    padded = F.pad(plain, [pad] * 4, mode="constant" if mode == "zero" else "reflect")
    for i in range(700):
        top, left = (int(draw * 5) for draw in draws[i, :2])
        expected = padded[i, :, top : top + 6, left : left + 6]
        if flip and draws[i, 2] < 0.5:
            expected = expected.flip(-1)
        assert torch.equal(got[i], expected)


def test_padding_of_a_known_background_is_that_background():
    images = torch.full((4, 1, 4, 4), -0.75)
    images[:, :, 1:3, 1:3] = 2.0
    source = Arrays(images, torch.zeros(4, dtype=torch.long))
    augment = Augment(measure(source, "channel"), PadCrop(1, flip=False), background=-0.75)
    moved = augment(images, torch.zeros(4, 3, dtype=torch.float64))
    plain = augment(images, None)
    torch.testing.assert_close(moved[:, :, 1:, 1:], plain[:, :, :-1, :-1])
    torch.testing.assert_close(moved[:, :, 0], plain[:, :, 0, :1].expand(-1, -1, 4))


def test_colours_move_along_their_principal_axes(source):
    statistics = measure(source, "channel")
    draws = torch.rand(700, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws[:, 3] = 0.9  # not mirrored
    got = Augment(statistics, ScaleCrop(colour=0.1))(source.images, draws)
    shift = 0.1 * normal(draws[:, 4:7]).float() @ statistics.colours.T
    plain = Augment(statistics, ScaleCrop())(source.images, None)
    torch.testing.assert_close((got - plain) * statistics.std, shift[:, :, None, None].expand(-1, -1, 6, 6))
    assert shift.abs().max() > 1e-3
    draws[:, 3] = 0.1
    still = Augment(statistics, ScaleCrop(colour=0))(source.images, draws)
    assert torch.equal(still, plain.flip(-1))


def test_images_of_another_size_lose_the_mean_per_channel(source):
    statistics = measure(source, "pixel")
    images = torch.randint(0, 256, (2, 10, 3, 9, 7), dtype=torch.uint8)
    got = Augment(statistics, ScaleCrop())(images, None)
    assert got.shape == (20, 3, 9, 7)
    exact = images.flatten(0, 1).float() / 255 - statistics.mean.mean((1, 2), keepdim=True)
    torch.testing.assert_close(got, exact / statistics.std)


def test_grey_images_are_repeated_where_colours_are_asked_for():
    statistics = Statistics(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1))
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(Augment(statistics, PadCrop(), channels=3)(images, None), images.expand(2, 3, 4, 4))
