"""What is known per channel of a dense block's features while its layers are written, and while they give gradients."""

import torch
from torch import Tensor

from fusedres.operands import Normaliser, OutputGrad, Partials, statistics_dtype
from fusedres.ops.bn_backward import NormSums, bn_backward_apply
from fusedres.ops.bn_finalize import bn_combine
from fusedres.ops.rows import channels_last, pixels


class FeatureStatistics:
    """The statistics of a buffer's channels, filled in as its layers are written."""

    def __init__(self, features: Tensor) -> None:
        dtype, device = statistics_dtype(features.dtype), features.device
        self.count = torch.full((1,), pixels(features), dtype=dtype, device=device)
        self.mean, self.m2 = torch.empty((2, 1, features.shape[1]), dtype=dtype, device=device)

    def put(self, partials: Partials, first: int) -> None:
        """Those of channels from ``first`` on."""
        _, mean, m2 = bn_combine(partials)
        places = slice(first, first + mean.shape[1])
        self.mean[:, places], self.m2[:, places] = mean, m2

    def of(self, channels: int) -> Partials:
        """Of the first channels."""
        return Partials(self.count, self.mean[:, :channels], self.m2[:, :channels])


class FeatureCorrections:
    """What all consumers' batch norms add to the gradient of features that they share, q * (x - mean) + r in total.

    Args:
        features: (N, C, H, W).
        mean: (C,) of them; None where no batch norm measures.
        dtype: of the gradients.
    """

    def __init__(self, features: Tensor, mean: Tensor | None, dtype: torch.dtype) -> None:
        self.features, self.mean = features, mean
        self.q, self.r = torch.zeros((2, features.shape[1]), dtype=statistics_dtype(dtype), device=features.device)
        self.ones = torch.ones_like(self.q)

    def add(self, sums: NormSums, numbers: Normaliser) -> None:
        """The part of a batch norm over the first channels; where processes share statistics, its mean is another."""
        channels = len(sums.q)
        self.q[:channels] += sums.q
        self.r[:channels] += sums.r
        if self.mean is not None and numbers.shared is not None:
            self.r[:channels] += sums.q * (self.mean[:channels] - numbers.mean)

    def applied(self, sent: Tensor, first: int, end: int, *, corrected: bool) -> Tensor:
        """The gradient of channels from ``first`` to ``end``, once all of their consumers have added to ``sent``.

        ``corrected``: whether any has.
        """
        g = sent[:, first:end]
        if self.mean is None or not corrected:
            return channels_last(g)
        p, q, r, mean = (vector[first:end] for vector in (self.ones, self.q, self.r, self.mean))
        return bn_backward_apply(OutputGrad(g, y=self.features[:, first:end], p=p, q=q, r=r, mean=mean))
