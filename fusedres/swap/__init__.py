"""Swapping fused blocks into existing models and out of them."""

from .report import Report, Row
from .swap import fuse, report, unfuse

__all__ = ["Report", "Row", "fuse", "report", "unfuse"]
