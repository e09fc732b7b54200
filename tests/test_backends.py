"""fusedres.backends: a choice per thread, restored, and remembered by the backward pass."""

import threading

import pytest
import torch

from fusedres import functional
from fusedres.backends import DEFAULT, backend, current, runs_kernels, runs_native
from fusedres.ops.op import Op


def test_kernels_on_a_gpu_and_the_library_elsewhere_is_the_default():
    assert current() == DEFAULT == "auto"
    assert runs_kernels("cuda")
    assert not runs_kernels("cpu")
    assert runs_native()


def test_choice_nests_and_is_restored():
    with backend("reference"):
        assert current() == "reference"
        with backend("native"):
            assert current() == "native"
        assert current() == "reference"
    assert current() == DEFAULT


def test_choice_is_restored_after_an_exception():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert current() == DEFAULT


def test_unknown_name_is_refused_and_changes_nothing():
    message = r"backend: expected one of \['auto', 'native', 'reference', 'triton'\] or vgpu:<target>, got 'tritn'"
    with pytest.raises(ValueError, match=message), backend("tritn"):
        pass
    assert current() == DEFAULT


def test_choice_belongs_to_the_thread():
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [DEFAULT]


@pytest.mark.parametrize("name", ["native", "reference"])
def test_backward_runs_on_the_backend_of_its_forward(name, monkeypatch):
    calls = []
    plain_call = Op.__call__

    def recording(self, *args, **kwargs):
        calls.append(current())
        return plain_call(self, *args, **kwargs)

    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    weight, vector = torch.randn(8, 4, 3, 3, requires_grad=True), torch.ones(8, requires_grad=True)
    with backend(name):
        z = functional.conv_bn_act(x, weight, vector, vector, None, None, training=True)
    other = "reference" if name == "native" else "native"
    monkeypatch.setattr(Op, "__call__", recording)
    with backend(other):
        z.square().sum().backward()
        assert current() == other
    assert calls
    assert set(calls) == {name}
