"""Operands as kernels are told of them."""

from typing import Any

from fusedres.activation import Activation


def device_activation(act: Activation | None, needed: object = True) -> Any:
    """An activation as a kernel's compile-time argument; None where nothing that it works on is given (``needed``)."""
    if act is None or needed is None:
        return None
    from fusedres.kernels.activation import named

    return named(act.name, act.numbers)
