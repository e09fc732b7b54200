"""What tests that execute compiled kernels on the CPU need of the machine."""

import pytest

from fusedres.vgpu import why_unavailable

REASON = why_unavailable()

needs_vgpu = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def skip_module_without_vgpu() -> None:
    """Skip a whole module of tests, whose imports need Triton, with the reason why this machine can not run them."""
    if REASON is not None:
        pytest.skip(REASON, allow_module_level=True)
