"""Swapping fused blocks into existing models and out of them."""

from fusedres.swap.freeze import freeze
from fusedres.swap.report import report
from fusedres.swap.swap import fuse, unfuse
from fusedres.swap.table import Report, Row

__all__ = ["Report", "Row", "freeze", "fuse", "report", "unfuse"]
