"""fusedres.compiler.binary: what a kernel is specialised for, and compiling for GPUs that are not here."""

import pytest
import torch

from fusedres.compiler import targets
from fusedres.compiler.binary import Binary, compile_for, compile_options, specialise
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS, Unavailable
from fusedres.kernels.act_mask import act_backward_kernel
from fusedres.kernels.activation import named
from tests.small_kernels import copy, copy_kernel, fill_kernel, tl, triton


def arguments(**changed):
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    return {"x_ptr": x, "y_ptr": x, "rows": 64, "C": 64, "BLOCK_ROWS": 32, "BLOCK_C": 64} | changed


def test_types_constants_and_alignment():
    specialisation = specialise(copy_kernel, arguments())
    assert dict(specialisation.signature) == {
        "x_ptr": "*bf16",
        "y_ptr": "*bf16",
        "rows": "i32",
        "C": "i32",
        "BLOCK_ROWS": "constexpr",
        "BLOCK_C": "constexpr",
    }
    assert dict(specialisation.constants) == {"BLOCK_ROWS": 32, "BLOCK_C": 64}
    assert specialisation.aligned == ("x_ptr", "y_ptr", "rows", "C")


@pytest.mark.parametrize(
    ("name", "value", "type_", "aligned"),
    [
        ("rows", 17, "i32", False),
        ("rows", 0, "i32", True),
        ("rows", -16, "i32", True),
        ("rows", 1, "constexpr", False),
        ("rows", True, "u1", False),
        ("rows", 2**31, "i64", True),
        ("rows", 2.0, "fp32", False),
        ("rows", None, "constexpr", False),
        ("x_ptr", torch.empty(3, dtype=torch.uint8, device="meta"), "*u8", True),
        ("x_ptr", torch.empty(9, device="meta")[4:], "*fp32", True),
        ("x_ptr", torch.empty(9, device="meta")[1:], "*fp32", False),
        ("x_ptr", torch.empty(64, dtype=torch.float16)[1:], "*fp16", False),
    ],
)
def test_each_kind_of_argument(name, value, type_, aligned):
    specialisation = specialise(copy_kernel, arguments(**{name: value}))
    assert dict(specialisation.signature)[name] == type_
    assert (name in specialisation.aligned) == aligned
    assert (name in dict(specialisation.constants)) == (type_ == "constexpr")


def test_equal_calls_share_a_specialisation():
    assert specialise(copy_kernel, arguments()) == specialise(copy_kernel, arguments(rows=128))
    assert len({specialise(copy_kernel, arguments(C=c)) for c in (64, 128, 63, 65, 1)}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z": 1}, r"copy_kernel: missing arguments \[\], unknown arguments \['z'\]"),
        ({"C": "64"}, "copy_kernel: C: expected a tensor or a number, got '64'"),
        ({"x_ptr": torch.empty(1, dtype=torch.complex64, device="meta")}, "copy_kernel: x_ptr: expected a tensor"),
    ],
)
def test_arguments_that_kernels_do_not_take(changed, message):
    with pytest.raises(TypeError, match=message):
        specialise(copy_kernel, arguments(**changed))


def test_missing_argument():
    with pytest.raises(TypeError, match=r"missing arguments \['C'\]"):
        specialise(copy_kernel, {name: value for name, value in arguments().items() if name != "C"})


class Driver:
    """What Triton's launcher asks of a GPU before it compiles."""

    def __init__(self, target):
        spec = TARGETS[target]
        self.target = triton.backends.compiler.GPUTarget(spec.backend, spec.arch, spec.warp_size)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target.arch)

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Compiles as a launch on the GPU would."""

    def compiled_by_launcher(kernel, target, given, *, registers=0):
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
        options = compile_options(TARGETS[target].backend, 4, 3, registers=registers)
        return kernel.run(**given, **options, grid=(1,), warmup=True)

    return compiled_by_launcher


X = torch.zeros(2, 64, dtype=torch.bfloat16)


@triton.jit
def choose_kernel(
    y_ptr,  # (1,) out
    HOW: tl.constexpr,
):
    tl.store(y_ptr, 1.0 if HOW == "DENSE" else 0.0)


def masked(act):
    sizes = {"rows": 64, "image": None, "C": 64, "C_MULTIPLE": 16, "BLOCK_ROWS": 16, "BLOCK_C": 64}
    return {"g_ptr": X, "mask_ptr": X, "out_ptr": X, "ACT": act, **sizes}


def test_binaries_are_told_apart_by_their_activations():
    acts = [named("relu"), named("leaky_relu", (0.2,)), named("leaky_relu", (0.1,)), named("silu"), None]
    given = [specialise(act_backward_kernel, masked(act)) for act in acts]
    assert len(set(given)) == len(acts)
    assert given[1] == specialise(act_backward_kernel, masked(named("leaky_relu", (0.2,))))
    assert "ACT=leaky_relu(0.2)" in Binary(act_backward_kernel, given[1], 4, 3).variant
    hashes = [compile_for(act_backward_kernel, each, "sm_90").hash for each in given[:-1]]
    assert len(set(hashes)) == len(hashes)


GENERAL = triton.jit(copy_kernel.fn, do_not_specialize=["x_ptr", "rows"], do_not_specialize_on_alignment=["C"])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("kernel", "given"),
    [
        pytest.param(copy_kernel, arguments(x_ptr=X, y_ptr=X), id="aligned"),
        pytest.param(copy_kernel, arguments(x_ptr=X, y_ptr=X.flatten()[1:], C=63), id="not aligned"),
        pytest.param(copy_kernel, arguments(x_ptr=X, y_ptr=X, rows=1), id="a constant 1"),
        pytest.param(copy_kernel, arguments(x_ptr=X, y_ptr=X.bool(), rows=True), id="bool"),
        pytest.param(copy_kernel, arguments(x_ptr=X, y_ptr=X, rows=2.0), id="float"),
        pytest.param(choose_kernel, {"y_ptr": X, "HOW": "DENSE"}, id="a constant string"),
        pytest.param(act_backward_kernel, masked(named("relu")), id="a constant of functions"),
        pytest.param(act_backward_kernel, masked(named("leaky_relu", (0.2,))), id="one with numbers"),
        pytest.param(GENERAL, arguments(x_ptr=X, y_ptr=X, rows=1, C=64), id="values that are not looked at"),
        pytest.param(GENERAL, arguments(x_ptr=X, y_ptr=X, rows=64, C=1), id="values that are partly looked at"),
        pytest.param(fill_kernel, {"y_ptr": X, "x_ptr": None, "n": 16, "BLOCK": 64}, id="none, an annotated number"),
        pytest.param(fill_kernel, {"y_ptr": X, "x_ptr": X, "n": 17, "BLOCK": 64}, id="an odd annotated number"),
    ],
)
def test_a_launch_finds_in_the_cache_what_was_compiled_without_its_gpu(kernel, given, target, launched):
    ours = compile_for(kernel, specialise(kernel, given), target)
    assert ours.hash == launched(kernel, target, given).hash


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_all_registers_are_another_binary_on_nvidia(target, launched):
    given = arguments(x_ptr=X, y_ptr=X)
    few, all_ = (Binary(copy_kernel, specialise(copy_kernel, given), 4, 3, registers) for registers in (False, True))
    assert compile_binary(all_, target).hash == launched(copy_kernel, target, given, registers=255).hash
    assert (compile_binary(all_, target).hash == compile_binary(few, target).hash) == (target == "gfx942")
    assert compile_binary(all_, target).metadata._asdict().get("maxnreg") == (255 if target == "sm_90" else None)


def test_amd_is_told_which_tensors_span_less_than_2_gib(launched):
    large = torch.empty(2**31, dtype=torch.uint8, device="meta")
    near, far = arguments(x_ptr=large[1:]), arguments(x_ptr=large)
    assert specialise(copy_kernel, near).small == ("y_ptr",)  # the storage counts
    assert specialise(copy_kernel, arguments(x_ptr=large.new_empty(2**31 - 1))).small == ("x_ptr", "y_ptr")
    ours = {target: compile_for(copy_kernel, specialise(copy_kernel, far), target) for target in ("sm_90", "gfx942")}
    small = specialise(copy_kernel, far)._replace(small=("x_ptr", "y_ptr"))
    assert ours["sm_90"].hash == compile_for(copy_kernel, small, "sm_90").hash
    assert ours["gfx942"].hash != compile_for(copy_kernel, small, "gfx942").hash
    assert ours["gfx942"].hash == launched(copy_kernel, "gfx942", far).hash


def test_variant_tells_types_odd_counts_choices_and_what_is_left_out():
    given = arguments(y_ptr=torch.empty(9, device="meta")[1:], rows=17, C=1, BLOCK_ROWS=True, BLOCK_C=False)
    assert Binary(copy_kernel, specialise(copy_kernel, given), 4, 3).variant == (
        "bf16/fp32 y_ptr%16 rows%16 C=1 BLOCK_ROWS"
    )
    general = Binary(GENERAL, specialise(GENERAL, arguments(rows=17)), 4, 3)
    assert general.variant == "bf16 C%16 BLOCK_ROWS=32 BLOCK_C=64"
    given = {"y_ptr": X, "x_ptr": None, "n": 16, "BLOCK": 64}
    assert Binary(fill_kernel, specialise(fill_kernel, given), 4, 3).variant == "bf16 BLOCK=64 no x"


@pytest.mark.parametrize(("target", "binary"), [("sm_90", "cubin"), ("gfx1100", "hsaco")])
def test_compile_for_gives_the_binary_of_its_target(target, binary):
    compiled = compile_for(copy_kernel, copy().specialisation, target, num_warps=8, num_stages=2)
    assert compiled.asm[binary][:4] == b"\x7fELF"
    assert (compiled.metadata.num_warps, compiled.metadata.num_stages) == (8, 2)
    assert compiled.metadata.target.arch == TARGETS[target].arch


def test_unknown_target_names_the_known():
    with pytest.raises(ValueError, match=f"expected one of {', '.join(TARGETS)}, got 'sm_1'"):
        compile_for(copy_kernel, copy().specialisation, "sm_1")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(targets, "triton", None)
    with pytest.raises(Unavailable, match="pip install triton"):
        compile_for(copy_kernel, copy().specialisation, "sm_90")
