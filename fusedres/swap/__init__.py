"""Swapping fused blocks into existing models and out of them."""

from fusedres.swap.freeze import freeze
from fusedres.swap.reasons import report
from fusedres.swap.report import Report, Row
from fusedres.swap.swap import fuse, unfuse

__all__ = ["Report", "Row", "freeze", "fuse", "report", "unfuse"]
