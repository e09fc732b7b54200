"""fusedres.ops.op: which face of an op runs."""

import pytest
import torch

from fusedres.ops.op import Op
from fusedres.runtime.backends import backend


def double(x: int, *, refuse: bool = False) -> tuple[str, int]:
    """2 x"""
    return "reference", 2 * x


@pytest.fixture
def op():
    op = Op(double)

    @op.native
    def native(x, *, refuse=False):
        return NotImplemented if refuse else ("native", 2 * x)

    return op


def test_backend_chooses_the_face(op):
    with backend("native"):
        assert op(3) == ("native", 6)
    with backend("reference"):
        assert op(3) == ("reference", 6)


def test_reference_runs_where_the_library_has_no_call(op):
    with backend("native"):
        assert op(3, refuse=True) == ("reference", 6)


def test_reference_runs_where_no_native_face_is_registered():
    with backend("native"):
        assert Op(double)(3) == ("reference", 6)


def test_op_carries_the_contract_of_its_reference(op):
    assert (op.__name__, op.__doc__) == ("double", "2 x")
    assert op.reference(4) == ("reference", 8)


def test_operands_are_checked_once_before_any_face_sees_them():
    seen = []
    double = Op(lambda x, *, by=2: x * by, check=lambda x, *, by=2: seen.append(by))
    double.native(lambda x, *, by=2: NotImplemented)
    assert double(torch.ones(1), by=3).item() == 3
    assert seen == [3]

    def refuse(x):
        raise ValueError("x: expected nothing")

    with pytest.raises(ValueError, match="x: expected nothing"):
        Op(lambda x: x, check=refuse)(torch.ones(1))
