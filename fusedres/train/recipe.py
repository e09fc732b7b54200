"""How the papers trained their networks: every number with the place it is from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Drops", "OneCycle", "PadCrop", "Plateau", "Recipe", "ScaleCrop", "WarmUp", "names", "recipe"]


@dataclass(frozen=True)
class Drops:
    """The learning rate is multiplied by ``factor`` at each of ``at`` (in the recipe's unit)."""

    at: tuple[float, ...]
    factor: float = 0.1


@dataclass(frozen=True)
class Plateau:
    """The learning rate is multiplied by ``factor`` when the error has not fallen for ``patience`` epochs.

    The error is that of the validation images, or of the training images where none are held out.
    """

    factor: float = 0.1
    patience: int = 5


@dataclass(frozen=True)
class OneCycle:
    """The learning rate rises from lr/25 for the fraction ``rise`` of the training, then falls as a cosine to 0."""

    rise: float = 0.2


@dataclass(frozen=True)
class WarmUp:
    """A lower rate at first: for ``fraction`` of the training, or until the training error is below ``until_error``.

    Networks of fewer than ``min_layers`` convolutions and linear layers do without.
    """

    lr: float
    fraction: float | None = None
    until_error: float | None = None
    min_layers: int = 0


@dataclass(frozen=True)
class PadCrop:
    """Images of one size: ``pad`` pixels on every side, a crop of the original size, half of them mirrored."""

    pad: int = 4
    mode: Literal["zero", "reflect"] = "zero"
    flip: bool = True


@dataclass(frozen=True)
class ScaleCrop:
    """Images of any size: the shorter side scaled to one of ``sides``, a crop of ``size``, half of them mirrored.

    ``test_side`` is the shorter side for single crops and ten crops, ``test_sides`` those of the multi-scale test.
    ``colour`` is the standard deviation of the shift along the principal axes of the colours.
    """

    sides: tuple[int, int] = (256, 480)
    size: int = 224
    test_side: int = 256
    test_sides: tuple[int, ...] = (224, 256, 384, 480, 640)
    colour: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """A way of training. Lengths and ``schedule.at`` count ``unit``; ``batch`` is that of all devices together.

    ``mean`` says what is subtracted from the images: the mean of every "pixel" or of every "channel".
    """

    name: str
    source: str
    unit: Literal["iterations", "epochs"]
    length: int
    batch: int
    schedule: Drops | Plateau | OneCycle
    crop: PadCrop | ScaleCrop
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    warm_up: WarmUp | None = None
    mean: Literal["pixel", "channel"] = "channel"

    def lasting(self, length: int, unit: Literal["iterations", "epochs"]) -> Recipe:
        """The same for another length, the drops at the same fractions of it."""
        schedule = self.schedule
        if isinstance(schedule, Drops):
            schedule = replace(schedule, at=tuple(at * length / self.length for at in schedule.at))
        return replace(self, unit=unit, length=length, schedule=schedule)


# What a paper does not state is said to be unstated; it is then as in the source that is named, or a choice of ours.
# Unstated everywhere: the value of padded pixels (a mean that is subtracted first makes it 0) unless it is given below,
# and that half of the images are mirrored. Papers that say "momentum" alone are taken to mean Nesterov's not.
# He 2015: "Deep Residual Learning", arXiv:1512.03385; He 2016: "Identity Mappings", arXiv:1603.05027.
_RECIPES = (
    # Section 4.2: batch 128, 0.1 divided by 10 at 32k and 48k of 64k iterations, weight decay 1e-4, momentum 0.9; pad
    # 4, crop 32, flip, per-pixel mean. The 110-layer network starts at 0.01 until the training error is below 80 %;
    # that of 1202 layers is trained like it.
    Recipe(
        "he2015-cifar", "arXiv:1512.03385, section 4.2", "iterations", 64_000, 128, Drops((32_000, 48_000)),
        PadCrop(), warm_up=WarmUp(0.01, until_error=0.8, min_layers=110), mean="pixel",
    ),
    # Section 3.4: batch 256, 0.1 divided by 10 when the error plateaus, up to 60·10⁴ iterations, weight decay 1e-4,
    # momentum 0.9; shorter side in [256, 480], crop 224, flip, per-pixel mean, Krizhevsky's colour augmentation
    # (Krizhevsky 2012, section 4.1: deviation 0.1); testing with his 10 crops or at {224, 256, 384, 480, 640}.
    # Unstated: how long a plateau is, and which error tells it; the side for single and ten crops, which is
    # Krizhevsky's (section 2: 256).
    Recipe(
        "he2015-imagenet", "arXiv:1512.03385, section 3.4", "iterations", 600_000, 256, Plateau(),
        ScaleCrop(), mean="pixel",
    ),
    # Appendix: 0.1 divided by 10 at 32k and 48k iterations, 0.01 for the first 400 whatever the depth, batch 128,
    # weight decay 1e-4, momentum 0.9, translation and flipping as He 2015. Unstated: the length and the mean, which are
    # those of He 2015.
    Recipe(
        "he2016-preact", "arXiv:1603.05027, appendix", "iterations", 64_000, 128, Drops((32_000, 48_000)),
        PadCrop(), warm_up=WarmUp(0.01, fraction=400 / 64_000), mean="pixel",
    ),
    # Appendix: 0.1 without warm-up, divided by 10 at 30 and 60 epochs, batch 256, weight decay and momentum as on
    # CIFAR, augmentation as He 2015. Unstated: the length (90 is that of later papers, DenseNet's for one), the mean.
    Recipe(
        "he2016-preact-imagenet", "arXiv:1603.05027, appendix", "epochs", 90, 256, Drops((30, 60)),
        ScaleCrop(), mean="pixel",
    ),
    # "Deep Networks with Stochastic Depth", section 4: 500 epochs, batch 128, 0.1 divided by 10 after 250 and 375,
    # weight decay 1e-4, Nesterov momentum 0.9 without dampening; translation by 4 pixels, flip. Unstated: the mean.
    Recipe(
        "stochastic-depth", "arXiv:1603.09382, section 4", "epochs", 500, 128, Drops((250, 375)),
        PadCrop(), nesterov=True,
    ),
    # "Wide Residual Networks", section 3: 200 epochs, batch 128, 0.1 times 0.2 at 60, 120 and 160, weight decay 5e-4,
    # Nesterov momentum 0.9 without dampening; crops from images padded by 4 reflected pixels, flip. Unstated: whether
    # mean and deviation are those of channels. The paper whitens (ZCA) in some experiments, this recipe does not.
    Recipe(
        "wide-resnet", "arXiv:1605.07146, section 3", "epochs", 200, 128, Drops((60, 120, 160), 0.2),
        PadCrop(mode="reflect"), nesterov=True, weight_decay=5e-4,
    ),
    # "Aggregated Residual Transformations", appendix A: 300 epochs, batch 128, 0.1 reduced at 150 and 225, weight decay
    # 5e-4, momentum 0.9; crop 32 of images padded with zeros to 40, flip. Unstated: the factor, Nesterov and the mean,
    # which are those of the code that it refers to for the rest (fb.resnet.torch).
    Recipe(
        "resnext-cifar", "arXiv:1611.05431, appendix A", "epochs", 300, 128, Drops((150, 225)),
        PadCrop(), nesterov=True, weight_decay=5e-4,
    ),
    # "Densely Connected Convolutional Networks", section 4.2: 300 epochs, batch 64, 0.1 divided by 10 at 50 % and 75 %,
    # weight decay 1e-4, Nesterov momentum 0.9 without dampening. Section 4.1: mirroring and shifting, channel means and
    # deviations. Unstated: by how much is shifted, which is He 2015's.
    Recipe("densenet", "arXiv:1608.06993, section 4.2", "epochs", 300, 64, Drops((150, 225)), PadCrop(), nesterov=True),
    # The same sections, ImageNet: 90 epochs, batch 256, 0.1 divided by 10 at 30 and 60; testing on one or ten crops of
    # 224. Unstated: the mean, and which augmentation of the three that it refers to; this is He 2015's.
    Recipe(
        "densenet-imagenet", "arXiv:1608.06993, section 4.2", "epochs", 90, 256, Drops((30, 60)),
        ScaleCrop(), nesterov=True,
    ),
    # Of no paper: 98 % within minutes on two cores. Digits must not be mirrored.
    Recipe(
        "digits", "this library", "epochs", 30, 64, OneCycle(), PadCrop(pad=1, flip=False), weight_decay=5e-4,
    ),
)  # fmt: skip

_BY_NAME = {one.name: one for one in _RECIPES}


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(_BY_NAME)


def recipe(name: str) -> Recipe:
    """The `Recipe` called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in _BY_NAME:
        raise ValueError(f"recipe: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
