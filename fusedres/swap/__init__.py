"""Swapping fused blocks into existing models and out of them."""

from .freeze import freeze
from .reasons import report
from .report import Report, Row
from .swap import fuse, unfuse

__all__ = ["Report", "Row", "freeze", "fuse", "report", "unfuse"]
