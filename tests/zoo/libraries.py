"""Networks of torchvision and timm, one or more of every family of architectures, as small as they come."""

import pytest
import torch
from torch import nn

_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def network(name: str, px: int) -> nn.Module:
    """A network of random weights: ``torchvision.NAME``, ``torchvision.fpn.NAME`` with its feature pyramid, or
    ``timm.NAME``."""
    library, _, name = name.partition(".")
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        try:
            return timm.create_model(name, pretrained=False, num_classes=10, img_size=px)
        except TypeError:
            return timm.create_model(name, pretrained=False, num_classes=10)
    models = pytest.importorskip("torchvision").models
    if name.startswith("fpn."):
        made = models.detection.backbone_utils
        of = made.mobilenet_backbone if "mobilenet" in name else made.resnet_fpn_backbone
        pyramid = {"fpn": True} if "mobilenet" in name else {}
        return of(backbone_name=name[4:], weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **pyramid)
    pretrained = {"weights": None}
    if name.startswith(("fcn", "deeplab", "lraspp")):
        pretrained["weights_backbone"] = None
    return models.get_model(name, num_classes=10, **pretrained, **_OPTIONS.get(name, {}))


def opened(model: nn.Module) -> nn.Module:
    """Gammas of 0.1 and betas of 1: every channel is open, so that no rounding decides whether a ReLU is."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            with torch.no_grad():
                part.weight.fill_(0.1)
                part.bias.fill_(1.0)
    return model


def needs_no_onednn(model: nn.Module) -> bool:
    """Whether oneDNN's weight gradient of one of its convolutions in fp32 writes past its end: strided, 1x1, and of
    fewer than 8 channels."""
    return any(
        max(conv.kernel_size) == 1 and max(conv.stride) > 1 and min(conv.weight.shape[:2]) < 8
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
    )
