"""Hugging Face's ResNet and RegNet, small, from their configurations."""

import pytest


def resnet(layer_type="basic", **changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type=layer_type, num_labels=5, **changes
    )
    return transformers.ResNetForImageClassification(config)


def regnet(layer_type="x"):
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], groups_width=8, layer_type=layer_type, num_labels=5
    )
    return transformers.RegNetForImageClassification(config)
