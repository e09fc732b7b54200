"""CIFAR networks of the blocks that the papers compare with the residual block (He et al. 2016, tables 1 and 2)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from fusedres.models.cifar import SHORTCUTS, WIDTHS, cifar_resnet, cifar_stem
from fusedres.models.network import ResNet, build, check_choice, check_sizes, cifar_depth, library, residual_stages
from fusedres.models.preact import preact_resnet

__all__ = ["VARIANTS", "highway", "variant_resnet"]

SHORTCUT_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant_scaling": ("ScaledBlock", {}),
    "constant_scaling_shortcut": ("ScaledBlock", {"residual_scale": 1.0}),
    "exclusive_gating": ("GatedBlock", {}),
    "shortcut_gating": ("GatedBlock", {"exclusive": False}),
    "dropout_shortcut": ("DropoutShortcutBlock", {}),
}
ORDER_VARIANTS = ("bn_after_add", "relu_before_add", "relu_only")
VARIANTS = ("original", *SHORTCUT_VARIANTS, "conv_shortcut", *ORDER_VARIANTS, "full_preactivation")


def variant_resnet(
    depth: int,
    variant: str,
    *,
    bottleneck: bool = False,
    num_classes: int = 10,
    shortcut: str = "zero_pad",
    in_channels: int = 3,
    fused: bool = True,
    **options: Any,
) -> ResNet:
    """A CIFAR ResNet of the blocks of figure 2 or 4 of He et al. 2016; the paper has 110 and (figure 4) 164 layers.

    Args:
        depth: 6n + 2 of basic blocks, 9n + 2 of bottlenecks.
        variant: one of `VARIANTS`. Figure 2: "original", "constant_scaling" (both paths times 0.5),
            "constant_scaling_shortcut" (the shortcut alone), "exclusive_gating", "shortcut_gating", "conv_shortcut"
            (a 1x1 projection everywhere), "dropout_shortcut". Figure 4: "original", "bn_after_add",
            "relu_before_add", "relu_only", "full_preactivation".
        bottleneck: bottlenecks instead of basic blocks (the variants of figure 4).
        num_classes, in_channels, fused: as in `cifar_resnet`.
        shortcut: where the shape changes, "zero_pad" or "projection".
        options: the block's own: ``shortcut_scale``, ``residual_scale``, ``gate_bias``, ``dropout``.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("variant", variant, VARIANTS)
    check_choice("shortcut", shortcut, SHORTCUTS)
    ordered = variant in ORDER_VARIANTS
    if bottleneck and not (ordered or variant in ("original", "full_preactivation")):
        raise ValueError(f"bottleneck must be False for {variant!r}, got True")
    common: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "fused": fused}
    if variant in ("original", "conv_shortcut", "full_preactivation") or ordered:
        _check_no_options(variant, options)
    if variant == "full_preactivation":
        kind = "bottleneck" if bottleneck else "basic"
        return preact_resnet(depth, block=kind, shortcut=shortcut, **common)  # type: ignore[arg-type]
    if variant in ("original", "conv_shortcut") and not bottleneck:
        kind = "projection_always" if variant == "conv_shortcut" else shortcut
        return cifar_resnet(depth, shortcut=kind, **common)  # type: ignore[arg-type]
    n = cifar_depth(depth, 3 if bottleneck else 2)
    check_sizes(num_classes, in_channels)
    blocks = library(fused)
    if variant == "original":
        name, own = "Bottleneck", {}
    elif ordered:
        name, own = ("ActivationBottleneck" if bottleneck else "ActivationBasicBlock"), {"order": variant}
    else:
        name, own = SHORTCUT_VARIANTS[variant]
    block = getattr(blocks, name)
    make = partial(block, shortcut=shortcut, **{**own, **options})
    conv1 = cifar_stem(in_channels)
    stages = residual_stages(lambda _, *sizes: make(*sizes), [n] * 3, WIDTHS, WIDTHS[0], block.expansion)
    # The paper: "for the last Residual Unit ... we adopt an extra activation right after its addition".
    end = nn.ReLU() if variant == "relu_only" else None
    return build(conv1, stages, num_classes=num_classes, fused=fused, end=end)


def _check_no_options(variant: str, options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"{next(iter(options))}: {variant!r} has no such option")


FITNET_4 = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)
"""Channels of the layers of each stage in FitNet 4 (Romero et al. 2015, arXiv:1412.6550)."""


class HighwayNet(nn.Module):
    """Convolutional highway layers in three stages with max-pooling between them, one hidden layer, a classifier."""

    def __init__(
        self, stages: tuple[tuple[int, ...], ...], *, num_classes: int, gate_bias: float, in_channels: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for i_stage, widths in enumerate(stages):
            for width in widths:
                # A layer that changes the number of channels is a plain one (section 2.1 of the paper).
                if width == channels:
                    layers.append(library(False).HighwayBlock(width, gate_bias=gate_bias))
                else:
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            if i_stage < len(stages) - 1:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.hidden = nn.Linear(channels, 500)
        self.fc = nn.Linear(500, num_classes)

    def forward(self, x: Any) -> Any:
        x = self.pool(self.features(x)).flatten(1)
        return self.fc(self.hidden(x).relu())


def highway(
    *,
    stages: tuple[tuple[int, ...], ...] = FITNET_4,
    gate_bias: float = -2.0,
    num_classes: int = 10,
    in_channels: int = 3,
    fused: bool = True,
) -> HighwayNet:
    """A CIFAR highway network (Srivastava et al. 2015, arXiv:1505.00387), by default its 19 layers after FitNet 4.

    Args:
        stages: the channels of every 3x3 layer of each stage.
        gate_bias: the gates' initial bias.
        num_classes: width of the classifier.
        in_channels: channels of the images.
        fused: changes nothing: there is no batch norm to fuse.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_sizes(num_classes, in_channels)
    if not stages or any(width < 1 for widths in stages for width in widths):
        raise ValueError(f"stages must hold the channels of each layer, at least 1, got {stages!r}")
    model = HighwayNet(stages, num_classes=num_classes, gate_bias=gate_bias, in_channels=in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
