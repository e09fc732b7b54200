"""fusedres.runtime.launch: what a launch records, what it refuses, and that nothing else starts a kernel."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedres
from fusedres.compiler.targets import TARGETS, Target
from fusedres.context import context
from fusedres.runtime.launch import (
    MAX_GRID,
    Trace,
    launch,
    look_into_folders,
    record,
    target_name,
    target_of,
    wants_kernels,
    why_not_on,
    with_scratch,
)
from fusedres.runtime.replay import replayed
from tests.gpu_support import needs_gpu
from tests.small_kernels import copy_boxes_kernel, copy_kernel, fill_kernel, triton
from tests.vgpu_support import needs_vgpu

META = torch.device("meta")


def start_copy(x, y, *, grid=None, reads=("x_ptr",), writes=("y_ptr",), arguments=None, **options):
    rows, channels = x.shape
    given = {"x_ptr": x, "y_ptr": y, "rows": rows, "C": channels, "BLOCK_ROWS": 4, "BLOCK_C": 32} | (arguments or {})
    launch(copy_kernel, grid or (triton.cdiv(rows, 4),), given, reads=reads, writes=writes, **options)


def start_fill(y, x=None, **options):
    arguments = {"y_ptr": y, "x_ptr": x, "n": y.numel(), "BLOCK": 64}
    launch(fill_kernel, (triton.cdiv(y.numel(), 64),), arguments, reads=["x_ptr"], writes=["y_ptr"], **options)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


def test_a_launch_on_meta_tensors_is_recorded_and_not_started():
    with record() as trace:
        start_copy(meta(10, 24, dtype=torch.bfloat16), meta(10, 24), flops=7, num_warps=2, num_stages=5)
    (entry,) = trace.launches
    assert (entry.kernel, entry.name, entry.grid) == (copy_kernel, "copy_kernel", (3,))
    assert (entry.num_warps, entry.num_stages, entry.flops) == (2, 5, 7)
    assert entry.read == {"x_ptr": 480}
    assert entry.written == {"y_ptr": 960}
    assert entry.counters is None
    assert dict(entry.specialisation.signature)["x_ptr"] == "*bf16"


def test_a_trace_adds_up_its_launches():
    with record() as trace:
        start_copy(meta(10, 24), meta(10, 24), flops=7)
        start_copy(meta(3, 8), meta(3, 8), flops=2)
        start_fill(meta(100))
    assert trace.bytes_read == 4 * (240 + 24)
    assert trace.bytes_written == 4 * (240 + 24 + 100)
    assert trace.flops == 9
    assert trace.by_kernel() == {"copy_kernel": 2, "fill_kernel": 1}


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param(meta(6, 8), 192, id="whole"),
        pytest.param(meta(6, 8, dtype=torch.uint8), 48, id="bytes"),
        pytest.param(meta(1, 8).expand(6, 8), 32, id="one row for all"),
        pytest.param(meta(1, 1).expand(6, 8), 4, id="one element for all"),
        pytest.param(meta(12, 16)[::2, ::2], 192, id="every other row and column"),
        pytest.param(meta(6, 0), 0, id="no elements"),
        pytest.param(meta(1, 8).expand(0, 8), 0, id="no rows of an expanded one"),
        pytest.param(meta(8, 6).t(), 192, id="transposed"),
    ],
)
def test_declared_bytes_are_those_of_the_elements_in_memory(x, expected):
    with record() as trace:
        start_copy(x, meta(6, 8), grid=(1,))
    assert trace.launches[0].read == {"x_ptr": expected}


def test_partial_bytes_take_the_place_of_whole_tensors():
    with record() as trace:
        start_copy(meta(6, 8), meta(6, 8), partial={"x_ptr": 100, "y_ptr": 0})
    assert trace.launches[0].read == {"x_ptr": 100}
    assert trace.launches[0].written == {"y_ptr": 0}


def test_what_is_read_and_written_counts_twice_and_what_is_left_out_not_at_all():
    with record() as trace:
        start_copy(meta(6, 8), meta(6, 8), reads=("x_ptr", "y_ptr"))
        start_fill(meta(100), x=None)
        start_fill(meta(100), x=meta(1))
    assert [(entry.bytes_read, entry.bytes_written) for entry in trace.launches] == [(384, 192), (0, 400), (4, 400)]


@pytest.mark.parametrize(
    "grid", [(MAX_GRID[0] + 1,), (1, MAX_GRID[1] + 1), (1, 1, MAX_GRID[2] + 1), (MAX_GRID[0] + 1, 2, 2)]
)
def test_a_grid_beyond_the_limit_is_refused(grid):
    message = (
        rf"copy_kernel: a grid of \({', '.join(map(str, grid))},?\) blocks exceeds the limit of \(2147483647, 65535"
    )
    with record() as trace, pytest.raises(ValueError, match=message):
        start_copy(meta(6, 8), meta(6, 8), grid=grid)
    assert trace.launches == []


def test_the_largest_grid_is_accepted():
    with record() as trace:
        start_copy(meta(6, 8), meta(6, 8), grid=MAX_GRID)
    assert trace.launches[0].grid == (2147483647, 65535, 65535)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**40])
def test_a_number_beyond_32_bits_is_refused(number):
    with (
        record() as trace,
        pytest.raises(ValueError, match=f"copy_kernel: rows: expected a number of 32 bits, got {number}"),
    ):
        start_copy(meta(6, 8), meta(6, 8), arguments={"rows": number})
    assert trace.launches == []


@pytest.mark.parametrize("number", [2**31 - 1, -(2**31)])
def test_the_largest_numbers_are_accepted(number):
    with record() as trace:
        start_copy(meta(6, 8), meta(6, 8), arguments={"rows": number})
    assert dict(trace.launches[0].specialisation.signature)["rows"] == "i32"


def test_partial_bytes_of_what_is_not_moved_are_refused():
    with pytest.raises(ValueError, match=r"copy_kernel: partial: expected names of what is read.*, got \['z_ptr'\]"):
        start_copy(meta(6, 8), meta(6, 8), partial={"z_ptr": 1})


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 2**40)])
def test_an_empty_grid_starts_nothing(grid):
    x, y = torch.ones(6, 8), torch.full((6, 8), 3.0)  # on the CPU, where a start would raise
    with record() as trace:
        start_copy(x, y, grid=grid)
    assert trace.launches == []
    assert torch.equal(y, torch.full((6, 8), 3.0))


@pytest.mark.parametrize("name", ["auto", "triton", "native", "reference"])
def test_cpu_tensors_without_the_vgpu_are_refused(name):
    y = torch.zeros(6, 8)
    message = (
        rf"copy_kernel: the backend '{name}' runs kernels on CUDA and HIP tensors.*choose backend\('vgpu:<target>'\)"
    )
    with fusedres.backend(name), record() as trace, pytest.raises(RuntimeError, match=message):
        start_copy(torch.ones(6, 8), y)
    assert trace.launches == []
    assert not y.any()


@needs_vgpu
@pytest.mark.parametrize("target", ["sm_80", "gfx1100"])
def test_the_vgpu_executes_and_its_counters_confirm_the_declared_bytes(target):
    torch.manual_seed(0)
    x, y = torch.randn(10, 24).to(torch.bfloat16), torch.empty(10, 24)
    with fusedres.backend(f"vgpu:{target}"), record() as trace:
        start_copy(x, y)
    assert torch.equal(y, x.float())
    (entry,) = trace.launches
    assert entry.counters.arguments["x_ptr"].bytes_read == entry.read["x_ptr"] == 480
    assert entry.counters.arguments["y_ptr"].bytes_written == entry.written["y_ptr"] == 960


@needs_vgpu
def test_the_vgpu_runs_a_kernel_that_reads_nothing_and_needs_no_record():
    y = torch.empty(100)
    with fusedres.backend("vgpu:sm_80"):
        start_fill(y)
        assert torch.equal(y, torch.zeros(100))
        start_fill(y, torch.full((1,), 2.5))
    assert torch.equal(y, torch.full((100,), 2.5))


@needs_vgpu
def test_what_is_written_alone_is_poisoned_and_what_is_read_too_is_not():
    y = torch.arange(100.0)
    arguments = {"y_ptr": y, "x_ptr": y, "n": 100, "BLOCK": 128}
    with fusedres.backend("vgpu:sm_80"):
        with pytest.raises(fusedres.vgpu.VgpuError, match="never written"):
            launch(fill_kernel, (1,), arguments, reads=[], writes=["y_ptr", "x_ptr"], num_warps=1)
        launch(fill_kernel, (1,), arguments, reads=["x_ptr", "y_ptr"], writes=["y_ptr"], num_warps=1)
    assert torch.equal(y, torch.zeros(100))


def test_nested_traces_hold_what_was_launched_inside_each():
    with record() as outer:
        with record() as first:
            pass
        start_copy(meta(6, 8), meta(6, 8))
        with record() as second:
            start_copy(meta(6, 8), meta(6, 8))
            with record() as inner:
                start_fill(meta(100))
        start_fill(meta(100))
    start_fill(meta(100))
    names = [[entry.name for entry in trace.launches] for trace in (outer, first, second, inner)]
    assert names == [
        ["copy_kernel", "copy_kernel", "fill_kernel", "fill_kernel"],
        [],
        ["copy_kernel", "fill_kernel"],
        ["fill_kernel"],
    ]


def test_a_trace_ends_with_its_block_even_by_an_error():
    with pytest.raises(KeyError), record() as trace:
        raise KeyError
    start_fill(meta(100))
    assert trace.launches == []


def test_launches_of_other_threads_are_recorded():
    with record() as trace:
        thread = threading.Thread(target=start_fill, args=(meta(100),))
        thread.start()
        thread.join()
    assert trace.by_kernel() == {"fill_kernel": 1}


SAME_NAME = triton.jit(copy_kernel.fn)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        pytest.param({}, True, id="nothing"),
        pytest.param({"grid": (7,)}, True, id="grid"),
        pytest.param({"rows": 160}, True, id="rows, both multiples of 16"),
        pytest.param({"rows": 17}, False, id="rows not a multiple of 16"),
        pytest.param({"rows": 1}, False, id="rows of 1, a constant"),
        pytest.param({"C": 40}, False, id="C not a multiple of 16"),
        pytest.param({"BLOCK_C": 64}, False, id="compile-time constant"),
        pytest.param({"x_ptr": meta(16, 32, dtype=torch.float16)}, False, id="dtype"),
        pytest.param({"x_ptr": meta(17, 32)[1:]}, True, id="another tensor, aligned too"),
        pytest.param({"x_ptr": meta(513)[1:].view(16, 32)}, False, id="not aligned"),
        pytest.param({"num_warps": 8}, False, id="warps"),
        pytest.param({"num_stages": 2}, False, id="stages"),
        pytest.param({"kernel": SAME_NAME}, False, id="another kernel of that name"),
    ],
)
def test_launches_share_a_binary_exactly_if_they_run_the_same_code(changed, same):
    def start(kernel=copy_kernel, grid=(4,), num_warps=4, num_stages=3, **changed):
        x = meta(16, 32)
        arguments = {"x_ptr": x, "y_ptr": x, "rows": 16, "C": 32, "BLOCK_ROWS": 4, "BLOCK_C": 32} | changed
        options = {"num_warps": num_warps, "num_stages": num_stages}
        launch(kernel, grid, arguments, reads=["x_ptr"], writes=["y_ptr"], **options)

    with record() as trace:
        start()
        start(**changed)
    first, second = (entry.binary for entry in trace.launches)
    assert (first == second) == same
    assert len({first, second}) == (1 if same else 2)


def test_kernels_are_wanted_where_they_run_or_are_recorded():
    tensors = {"meta": meta(1), "cpu": torch.zeros(1)}

    def wanted():
        return [name for name, tensor in tensors.items() if wants_kernels(tensor)]

    assert wanted() == []
    with record():
        assert wanted() == ["meta"]
        for name, expected in (("triton", ["meta", "cpu"]), ("native", []), ("reference", [])):
            with fusedres.backend(name):
                assert wanted() == expected
        with context(backend="vgpu:sm_80"):
            assert wanted() == ["cpu"]


class OnGpu:
    """Stands for a tensor there."""

    is_meta, is_cuda, device = False, True, torch.device("cuda", 0)

    def get_device(self):
        return 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("cuda", 80, 32, 0, 1), None),
        (Target("cuda", 121, 32, 0, 1), None),
        (Target("cuda", 75, 32, 0, 1), "tensor cores from sm_80 on, and this is sm_75"),
        (Target("hip", "gfx942", 64, 0, 1), None),
        (Target("hip", "gfx1102", 32, 0, 1), None),
        (Target("hip", "gfx1030", 32, 0, 1), "matrix units of gfx90a, gfx942, gfx950, gfx11, and this is gfx1030"),
    ],
)
def test_a_gpu_without_matrix_units_is_left_to_the_library(target, reason, monkeypatch):
    monkeypatch.setattr("fusedres.runtime.launch._device_target", lambda index: target)
    monkeypatch.setattr("fusedres.runtime.launch.why_not_on", why_not_on.__wrapped__)
    assert (why_not_on.__wrapped__(0) or "").endswith(reason or "")
    assert wants_kernels(OnGpu()) == (reason is None)
    with fusedres.backend("triton"):
        assert wants_kernels(OnGpu())
    monkeypatch.setattr("fusedres.compiler.targets.triton", None)
    assert why_not_on.__wrapped__(0) == "triton is not installed"
    assert not wants_kernels(OnGpu())


def test_a_dry_run_is_for_the_target_that_was_asked_for():
    assert target_of(meta(1)) == TARGETS["sm_90"]
    with record(target="gfx942") as trace:
        assert target_of(meta(1)) == TARGETS["gfx942"]
        with record(), pytest.raises(KeyError):
            assert target_of(meta(1)) == TARGETS["sm_90"]
            raise KeyError
        assert target_of(meta(1)) == TARGETS["gfx942"]
        assert target_of(torch.zeros(1)) == TARGETS["sm_90"]  # no dry run
    assert trace.target == "gfx942"
    assert target_of(meta(1)) == TARGETS["sm_90"]


def test_a_dry_run_for_an_unknown_target_is_refused_with_the_known():
    with pytest.raises(ValueError, match=f"target: expected one of {', '.join(TARGETS)}, got 'sm_1'"), record("sm_1"):
        pass
    assert not wants_kernels(meta(1))


def test_an_empty_trace_counts_nothing():
    assert (Trace().bytes_read, Trace().bytes_written, Trace().flops, Trace().by_kernel()) == (0, 0, 0, {})


def test_tensors_on_several_devices_are_refused_before_anything_starts():
    message = "y_ptr: expected a tensor on meta, where x_ptr is, got one on cpu"
    with record() as trace, pytest.raises(ValueError, match=message):
        start_copy(meta(6, 8), torch.empty(6, 8))
    assert not trace.launches


def on_a_thread(function, *arguments):
    """What a function gives or raises on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_memory_for_compilers_is_there_on_every_thread_and_only_inside_a_launch():
    current = importlib.import_module("triton.runtime._allocation")._allocator

    def start(first, *, second):
        return first, second, current.get()

    for called in (with_scratch(start), lambda *a, **k: on_a_thread(lambda: with_scratch(start)(*a, **k))):
        mine = object()
        token = current.set(mine)
        try:
            first, second, allocator = called(1, second=2)
            assert current.get() is mine
        finally:
            current.reset(token)
        assert (first, second) == (1, 2)
        assert callable(allocator) and allocator is not mine


def copied_boxes(x):
    rows, channels = x.shape
    y = torch.empty_like(x)
    arguments = {"x_ptr": x, "y_ptr": y, "rows": rows, "C": channels, "y_row": channels}
    grid = (triton.cdiv(rows, 64), triton.cdiv(channels, 64))
    launch(copy_boxes_kernel, grid, arguments | {"BLOCK_ROWS": 64, "BLOCK_C": 64}, reads=["x_ptr"], writes=["y_ptr"])
    return y


@needs_vgpu
def test_descriptors_are_launched_on_the_vgpu():
    x = torch.randn(130, 72).half()
    with fusedres.backend("vgpu:sm_90"):
        assert torch.equal(copied_boxes(x), x)


@needs_gpu
def test_descriptors_are_launched_and_replayed_on_a_gpu_on_every_thread():
    for call in (replayed, on_a_thread):
        for _ in range(4):
            x = torch.randn(130, 72, device="cuda").half()
            arguments = (copied_boxes, x) if call is replayed else (replayed, copied_boxes, x)
            assert torch.equal(call(*arguments), x)


def test_folders_of_binaries_are_looked_into_once_for_a_device(monkeypatch):
    used = []
    monkeypatch.setattr("fusedres.runtime.launch.use_for", used.append)
    monkeypatch.setattr("fusedres.runtime.launch._device_target", lambda index: TARGETS[("sm_80", "gfx942")[index]])
    caches = look_into_folders, target_name
    for cache in caches:
        cache.cache_clear()
    for index in (0, 1, 0):
        look_into_folders(index)
    for cache in caches:
        cache.cache_clear()
    assert used == ["sm_80", "gfx942"]
