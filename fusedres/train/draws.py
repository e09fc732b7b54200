"""Random numbers that are a function of what they are drawn for, so that nothing has to be replayed.

The augmentation of an image depends on the seed, the epoch and the image's number, not on the order in which images
were loaded: the same with any number of worker processes and of ranks, and after a resumed run.
"""

from __future__ import annotations

import torch

__all__ = ["normal", "uniform"]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), which spreads every bit over all 64."""
    x = (x ^ _shift(x, 30)) * FACTORS[0]
    x = (x ^ _shift(x, 27)) * FACTORS[1]
    return x ^ _shift(x, 31)


def uniform(seed: int, epoch: int, indices: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` numbers in (0, 1) for each index.

    Args:
        seed, epoch: whole numbers.
        indices: (N,) int64.
        count: numbers per index.

    Returns:
        (N, count) fp64.
    """
    # Tensors throughout, since Python's numbers do not wrap around.
    state = _mix(torch.tensor(_signed((seed + 1) % 2**64)) * GOLDEN)
    state = _mix(state + torch.tensor(epoch + 1) * GOLDEN)
    rows = _mix(state + (indices + 1) * GOLDEN)
    bits = _mix(rows[:, None] + (torch.arange(count) + 1) * GOLDEN)
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def normal(draws: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers from numbers uniform in (0, 1)."""
    return torch.special.ndtri(draws)
