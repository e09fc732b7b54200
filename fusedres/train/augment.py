"""What happens to a batch of images before the network sees it, on the loader's process or on the GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from fusedres.train.draws import normal
from fusedres.train.recipe import PadCrop, ScaleCrop
from fusedres.train.sources import Source

__all__ = ["Augment", "Statistics", "measure"]

# Of image files: enough for deviations to a hundredth, and half a minute at most.
SAMPLE = 2048


@dataclass(frozen=True)
class Statistics:
    """Of training images, uint8 counted as 0 to 1, all fp32.

    Attributes:
        mean: (C, H, W), or (C, 1, 1).
        std: (C, 1, 1).
        colours: (C, C), a column per principal axis of the colours, as long as the variance along it.
    """

    mean: torch.Tensor
    std: torch.Tensor
    colours: torch.Tensor


def as_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def measure(source: Source, mean: Literal["pixel", "channel"]) -> Statistics:
    """The statistics of ``source``, from at most 2,048 images spread evenly over it if they are files."""
    count = len(source.labels)
    whole = hasattr(source, "images")
    indices = torch.arange(count) if whole else torch.linspace(0, count - 1, min(count, SAMPLE)).long().unique()
    total = pixels = outer = torch.zeros(())
    used = 0
    for part in indices.split(512):
        images = as_float(source.fetch(part, None)).double()
        rows = images.movedim(1, -1).flatten(0, -2)
        total = total + images.sum(0)
        pixels = pixels + rows.sum(0)
        outer = outer + rows.T @ rows
        used += len(part)
    places = total[0].numel() * used
    channel_mean = pixels / places
    covariance = outer / places - torch.outer(channel_mean, channel_mean)
    values, axes = torch.linalg.eigh(covariance)
    return Statistics(
        mean=(total / used if mean == "pixel" else channel_mean[:, None, None]).float(),
        std=covariance.diagonal().clamp_min(1e-12).sqrt()[:, None, None].float(),
        colours=(axes * values.clamp_min(0)).float(),
    )


class Augment:
    """Normalise images, and in training crop, mirror and recolour them as the recipe says.

    Whatever the recipe's mean, the images are also divided by the deviation per channel: networks whose stem is
    followed by batch norm do not notice, and pre-activation networks need a known scale.
    """

    def __init__(
        self,
        statistics: Statistics,
        crop: PadCrop | ScaleCrop,
        *,
        background: float | None = None,
        channels: int | None = None,
    ) -> None:
        self.mean, self.std, self.colours = statistics.mean, statistics.std, statistics.colours
        self.crop = crop
        # Numbers in (0, 1) that each image takes.
        self.columns = 7 if isinstance(crop, ScaleCrop) else 3
        # The papers subtract the mean before they pad with zeros.
        self.fill = 0.0 if background is None else float((background - self.mean.mean()) / self.std.mean())
        self.channels = channels

    def to(self, device: torch.device) -> Augment:
        """The same for images on ``device``."""
        moved = copy.copy(self)
        moved.mean, moved.std, moved.colours = (part.to(device) for part in (self.mean, self.std, self.colours))
        return moved

    def __call__(self, images: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images ready for the network.

        Args:
            images: (N, C, H, W) uint8 or float, or (N, views, C, H, W) at test time.
            draws: (N, `columns`) in (0, 1) for training, None at test time.

        Returns:
            (N, channels, h, w) fp32, or (N·views, channels, h, w).
        """
        images = as_float(images.flatten(0, 1) if images.ndim == 5 else images)
        if draws is not None and isinstance(self.crop, ScaleCrop):
            images = self._recolour(_mirror(images, draws[:, 3]), draws[:, 4:7])
        images = (images - self._mean_for(images)) / self.std
        if draws is not None and isinstance(self.crop, PadCrop):
            images = self._pad_crop(images, draws, self.crop)
        if self.channels is not None:
            images = images.expand(-1, self.channels, -1, -1)
        return images

    def _mean_for(self, images: torch.Tensor) -> torch.Tensor:
        if self.mean.shape[-2:] in ((1, 1), images.shape[-2:]):
            return self.mean
        # Images of another size, as in multi-scale tests, have no per-pixel mean.
        return self.mean.mean((1, 2), keepdim=True)

    def _recolour(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Krizhevsky 2012, section 4.1: add the principal axes, each by a normal multiple of its eigenvalue.

        An eigenvalue is a variance, so that the scale of pixels matters, which the paper does not state: 0 to 1 here.
        """
        assert isinstance(self.crop, ScaleCrop)
        if self.crop.colour == 0:
            return images
        multiples = normal(draws).float() * self.crop.colour
        return images + (multiples @ self.colours.T)[:, :, None, None]

    def _pad_crop(self, images: torch.Tensor, draws: torch.Tensor, crop: PadCrop) -> torch.Tensor:
        N, C, H, W = images.shape
        if crop.mode == "reflect":
            padded = F.pad(images, [crop.pad] * 4, mode="reflect")
        else:
            padded = F.pad(images, [crop.pad] * 4, value=self.fill)
        top, left = (draws[:, :2] * (2 * crop.pad + 1)).long().T
        columns = torch.arange(W, device=images.device).expand(N, W)
        if crop.flip:
            columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
        rows = top[:, None] + torch.arange(H, device=images.device)
        i_image = torch.arange(N, device=images.device)[:, None, None, None]
        i_channel = torch.arange(C, device=images.device)[:, None, None]
        return padded[i_image, i_channel, rows[:, None, :, None], (left[:, None] + columns)[:, None, None, :]]


def _mirror(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    return torch.where(draws[:, None, None, None] < 0.5, images.flip(-1), images)
