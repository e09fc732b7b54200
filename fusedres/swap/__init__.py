"""Swapping fused blocks into existing models and out of them."""

from fusedres.swap.freeze import freeze
from fusedres.swap.register import register
from fusedres.swap.report import report
from fusedres.swap.swap import fuse, unfuse
from fusedres.swap.table import Norm, Report, Row

__all__ = ["Norm", "Report", "Row", "freeze", "fuse", "register", "report", "unfuse"]
