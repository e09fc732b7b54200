"""The residual family of the papers, built from `fusedres.nn` blocks."""

from fusedres.models.cifar import CifarResNet, cifar_resnet
from fusedres.models.registry import create, names

__all__ = ["CifarResNet", "cifar_resnet", "create", "names"]
