"""Tuning: what is fastest on the GPU at hand is measured, and the whole step is never slower than eager PyTorch's."""

from fusedres.tuning.tune import Estimate, Progress, Tuning, estimate, tune

__all__ = ["Estimate", "Progress", "Tuning", "estimate", "tune"]
