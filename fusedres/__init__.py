"""fusedres: residual networks that move fewer bytes, with the same parameters and the same numbers."""

from importlib.metadata import PackageNotFoundError, version

from fusedres import functional, models, nn
from fusedres.runtime.backends import backend
from fusedres.runtime.graphed import graphed
from fusedres.runtime.launch import record
from fusedres.runtime.logs import set_up as _set_up_logs
from fusedres.runtime.ranges import profile
from fusedres.swap import freeze, fuse, register, report, unfuse
from fusedres.tuning import tune

_set_up_logs()

try:
    __version__ = version("fusedres")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "backend",
    "freeze",
    "functional",
    "fuse",
    "graphed",
    "models",
    "nn",
    "profile",
    "record",
    "register",
    "report",
    "tune",
    "unfuse",
]
