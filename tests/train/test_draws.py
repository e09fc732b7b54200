"""fusedres.train.draws: numbers that depend on what they are for and on nothing else, and look random."""

import torch

from fusedres.train.draws import normal, uniform


def test_an_image_has_its_numbers_whatever_is_drawn_beside_it():
    all_ = uniform(3, 5, torch.arange(100), 4)
    assert torch.equal(uniform(3, 5, torch.tensor([17, 4]), 4), all_[[17, 4]])
    assert torch.equal(uniform(3, 5, torch.arange(100), 2), all_[:, :2])


def test_seed_epoch_image_and_column_all_matter():
    one = uniform(0, 0, torch.arange(1000), 2)
    for other in (uniform(1, 0, torch.arange(1000), 2), uniform(0, 1, torch.arange(1000), 2)):
        assert not torch.isin(other, one).any()
    assert one.unique().numel() == 2000


def test_they_are_uniform_and_uncorrelated():
    x = uniform(7, 2, torch.arange(200_000), 3)
    assert x.min() > 0
    assert x.max() < 1
    # Standard errors: 0.00065 for the mean, 0.0022 for a correlation, √(2000·0.01·0.99) = 4.4 per bin of 1/100.
    assert (x.mean(0) - 0.5).abs().max() < 0.003
    later = uniform(7, 3, torch.arange(200_000), 3)
    pairs = torch.corrcoef(torch.cat([x, x.roll(1, 0), later], 1).T)
    assert (pairs - torch.eye(9)).abs().max() < 0.012
    counts = torch.histc(x[:, 0], 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 160  # chi-squared of 99 degrees, 4 deviations above


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    z = normal(uniform(0, 0, torch.arange(200_000), 1)[:, 0])
    moments = [float((z**power).mean()) for power in (1, 2, 3, 4)]
    for moment, exact, error in zip(moments, (0, 1, 0, 3), (0.01, 0.02, 0.04, 0.1), strict=True):
        assert abs(moment - exact) < error


def test_huge_and_negative_seeds_are_as_good():
    seeds = (-1, 0, 2**62, 2**64 - 1 - 2**32)
    draws = [uniform(seed, 0, torch.arange(10), 1) for seed in seeds]
    assert len({tuple(draw[:, 0].tolist()) for draw in draws}) == 4
