"""The residual family of the papers, built from `fusedres.nn` blocks."""

from fusedres.models.cifar import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "cifar_resnet"]
