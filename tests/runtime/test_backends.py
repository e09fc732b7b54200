"""fusedres.runtime.backends: a choice per thread, restored, and remembered by the backward pass."""

import threading
from operator import attrgetter

import pytest
import torch

import fusedres
from fusedres import functional, record, vgpu
from fusedres.ops.op import Op
from fusedres.runtime.backends import DEFAULT, backend, current, runs_kernels, runs_native
from fusedres.runtime.launch import multiplies_in_tf32, tf32_allowed
from tests.comparison import assert_close
from tests.vgpu_support import needs_vgpu


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


def test_a_target_that_is_not_executed_is_refused_with_those_that_are():
    message = "expected vgpu:<target> with one of sm_80, sm_90, gfx1100, got 'vgpu:sm_75'"
    with pytest.raises(ValueError, match=message), backend("vgpu:sm_75"):
        pass
    assert current() == DEFAULT


def test_a_machine_that_can_not_execute_kernels_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr("fusedres.vgpu.why_unavailable", lambda: "no llvmlite: pip install fusedres[vgpu]")
    message = r"backend 'vgpu:sm_90': no llvmlite: pip install fusedres\[vgpu\]"
    with pytest.raises(vgpu.Unavailable, match=message), backend("vgpu:sm_90"):
        pass
    assert current() == DEFAULT


def test_kernels_on_a_cpu_tensor_are_refused_without_a_target():
    with pytest.raises(RuntimeError, match="runs kernels on CUDA and HIP tensors"), backend("triton"):
        functional.add_act(torch.ones(1, 8, 2, 2), torch.ones(1, 8, 2, 2))


@needs_vgpu
@pytest.mark.parametrize("target", vgpu.TARGETS)
def test_kernels_run_where_an_op_has_them_and_the_formula_elsewhere(target, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    ones, zeros = torch.ones(8), torch.zeros(8)
    with backend(f"vgpu:{target}"), record() as trace:
        assert runs_kernels("cpu") and not runs_native()
        z = functional.conv_bn_act(x, weight, ones, zeros, None, None, training=True, schedule="block_end")
    names = ("conv_forward_kernel", "bn_statistics_kernel", "bn_finalize_kernel", "bn_act_kernel")
    assert trace.by_kernel() == dict.fromkeys(names, 1)
    with backend("reference"):
        assert_close(z, functional.conv_bn_act(x, weight, ones, zeros, None, None, training=True), 1e-6)


TF32 = {
    "allowed before": (("cudnn", "allow_tf32", True), True),
    "forbidden before": (("cudnn", "allow_tf32", False), False),
    "forbidden everywhere": (("", "fp32_precision", "ieee"), False),
    "allowed everywhere": (("", "fp32_precision", "tf32"), True),
    "forbidden in cuDNN": (("cudnn", "fp32_precision", "ieee"), False),
    "forbidden in convolutions": (("cudnn.conv", "fp32_precision", "ieee"), False),
    "allowed in convolutions alone": (("cudnn.conv", "fp32_precision", "tf32"), True),
}


@pytest.fixture
def precisions():
    """Nobody has said anything of precision, and in the end PyTorch's default holds again."""
    cudnn = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "none"
    yield
    torch.backends.fp32_precision = cudnn.fp32_precision = "none"
    cudnn.allow_tf32 = True
    assert tf32_allowed()


@pytest.mark.parametrize(("setting", "allowed"), TF32.values(), ids=TF32)
def test_tf32_is_used_where_convolutions_may(setting, allowed, precisions):
    place, name, value = setting
    setattr(attrgetter(place)(torch.backends) if place else torch.backends, name, value)
    assert tf32_allowed() is allowed
    for target in ("sm_90", "gfx1100"):
        with record(target):
            assert multiplies_in_tf32(torch.ones(1, device="meta")) is (allowed and target == "sm_90")
            assert not multiplies_in_tf32(torch.ones(1, device="meta", dtype=torch.bfloat16))
    model = fusedres.nn.BasicBlock(8, 8)
    for _ in range(3):
        model(torch.randn(2, 8, 5, 5)).sum().backward()


@needs_vgpu
def test_double_precision_has_no_kernels():
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    with backend("vgpu:sm_90"), record() as trace:
        assert torch.equal(functional.add_act(x, x), torch.relu(2 * x))
    assert not trace.launches


def test_a_dry_run_launches_kernels_only_while_it_is_recorded():
    pytest.importorskip("triton")
    x = torch.empty(1, 8, 5, 5, device="meta")
    with record() as trace:
        assert functional.add_act(x, x).shape == x.shape
    assert trace.by_kernel() == {"bn_act_kernel": 1}
    assert functional.add_act(x, x).shape == x.shape
    assert len(trace.launches) == 1
