"""fusedres.explain.binaries: binaries recorded from models, compiled in parallel, and reported."""

import csv
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from torch import nn

from fusedres.compiler.binary import compile_for
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS, Unavailable
from fusedres.context import here
from fusedres.explain import binaries
from fusedres.explain.binaries import Outcome, Recorded, compile_all, recorded_binaries
from fusedres.explain.compile_report import CompileOptions, run, table, write_csv
from fusedres.models.sources import Source
from fusedres.ops.bn_finalize import bn_finalize
from fusedres.ops.input_moments import measured_input
from fusedres.runtime.launch import launch, target_of
from tests.small_kernels import copy, copy_kernel, hoard, hoard_kernel, matmul


class Copies(nn.Module):
    """Copies its input with the small kernel, in training and in inference."""

    def __init__(self, kernel=copy_kernel, block=lambda target: 32):
        super().__init__()
        self.kernel, self.block = kernel, block
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if self.kernel is hoard_kernel:
            arguments = {"x_ptr": x.float(), "y_ptr": x.float(), "BLOCK": 16384}
        else:
            sizes = {"rows": x.shape[0], "C": 64, "BLOCK_ROWS": self.block(target_of(x)), "BLOCK_C": 64}
            arguments = {"x_ptr": x, "y_ptr": x} | sizes
        launch(self.kernel, (1,), arguments, reads=["x_ptr"], writes=["y_ptr"], num_warps=1)
        return self.conv(x)


@pytest.fixture
def models(monkeypatch):
    known = {
        "copies": Copies,
        "twin": Copies,
        "hoards": lambda: Copies(hoard_kernel),
        "adapts": lambda: Copies(block=lambda target: 64 if target.warp_size == 64 else 16),
        "silent": lambda: nn.Conv2d(3, 3, 1),
    }
    small = {name: Source(name, build, (3, 8, 8)) for name, build in known.items()}
    monkeypatch.setattr(binaries, "SHALLOW", small)


def test_recording_gives_each_binary_once_with_its_models(models):
    users = recorded_binaries(["copies", "twin", "silent"], ["bf16", "fp32"], ["sm_80"])
    # Per dtype: the rows of a batch, and those of one image, which are a constant 1.
    assert len(users) == 4
    assert [(one.models, one.blocks) for one in users.values()] == [(["copies", "twin"], 1)] * 4
    assert {(binary.kernel, target) for binary, target in users} == {(copy_kernel, "sm_80")}
    types = [dict(binary.specialisation.signature) for binary, _ in users]
    assert {(type_["x_ptr"], type_["rows"]) for type_ in types} == {
        (pointer, rows) for pointer in ("*bf16", "*fp32") for rows in ("i32", "constexpr")
    }


@pytest.mark.parametrize(
    ("name", "norms"), [("resnet18", 20), ("resnet50", 53), ("resnext50_32x4d", 53), ("cifar_resnet20", 19)]
)
def test_listed_models_launch_on_every_schedule(name, norms, monkeypatch):
    """One launch is planted for each batch norm of the blocks and of torchvision's stems."""

    def planted(*_, **__):
        if here().account is not None:  # weighed on paper
            return NotImplemented
        x = torch.empty(2, 64, device="meta")
        arguments = {"x_ptr": x, "y_ptr": x, "rows": len(planted_in), "C": 64, "BLOCK_ROWS": 32, "BLOCK_C": 64}
        launch(copy_kernel, (1,), arguments, reads=["x_ptr"], writes=["y_ptr"])
        planted_in.append(name)
        return NotImplemented

    planted_in = []
    monkeypatch.setattr(bn_finalize, "_triton", planted)
    monkeypatch.setattr(measured_input, "_triton", None)  # which ends in the other then
    monkeypatch.setattr(binaries, "TRAINING_BATCH", 16)
    users = recorded_binaries([name], ["bf16"], ["sm_90"])
    # Under auto a small network may run eager.
    assert len(planted_in) in (norms * 4, norms * 5)
    kinds = [task for task in users if task[0].kernel is copy_kernel]
    assert len(kinds) == 3  # a row count of 1, one that 16 divides, any other
    assert all(users[task].models == [name] for task in kinds)


def test_a_binary_is_recorded_only_for_the_targets_that_launch_it(models):
    targets = ["sm_80", "sm_90", "sm_100", "gfx942"]
    users = recorded_binaries(["adapts"], ["bf16"], targets)
    blocks = {(dict(binary.specialisation.constants)["BLOCK_ROWS"], target) for binary, target in users}
    assert blocks == {(16, "sm_80"), (16, "sm_90"), (16, "sm_100"), (64, "gfx942")}


@pytest.mark.slow
def test_every_tile_is_recorded_if_that_is_asked_for():
    default = recorded_binaries(["cifar_resnet20"], ["bf16"], ["sm_90"])
    every = recorded_binaries(["cifar_resnet20"], ["bf16"], ["sm_90"], every_tile=True)
    assert default.keys() < every.keys()
    tile = {"BLOCK_ROWS", "BLOCK_C", "BLOCK_PIXELS", "BLOCK_K"}

    def tiles(users, name):
        return {
            (*(item for item in binary.specialisation.constants if item[0] in tile), binary.num_warps)
            for binary, _ in users
            if binary.name == name
        }

    for name in ("bn_act_kernel", "conv_forward_kernel", "conv_input_grad_kernel"):
        assert tiles(default, name) < tiles(every, name)


def test_batch_norm_stays_in_fp32_as_under_autocast(monkeypatch):
    seen = []

    def made():
        layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def note(module, inputs):
            (x,) = inputs
            seen.append((x.dtype, module[0].weight.dtype, module[1].weight.dtype, x.is_meta))

        layers.register_forward_pre_hook(note)
        return layers

    net = Source("net", made, (3, 8, 8))
    monkeypatch.setitem(binaries.SHALLOW, "net", net)
    recorded_binaries(["net"], ["bf16"], ["sm_90"])
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32, True)}


def test_parallel_is_serial():
    binaries = [copy(), matmul(block=(64, 64, 32)), copy(torch.float32)]
    tasks = [(binary, target) for binary in binaries for target in ("sm_80", "gfx942")]
    serial = list(compile_all(tasks, jobs=1))
    assert list(compile_all(tasks, jobs=2)) == serial
    assert [(outcome.binary, outcome.target) for outcome in serial] == tasks
    for outcome in serial:
        compiled = compile_for(outcome.binary.kernel, outcome.binary.specialisation, outcome.target)
        assert outcome.figures == read_figures(compiled, outcome.target)
        assert outcome.faults == []


def test_without_reading_only_the_cache_is_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (outcome,) = compile_all([(copy(), "sm_80")], read=False)
    assert outcome == Outcome(copy(), "sm_80")
    assert outcome.faults == []
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert not list(tmp_path.rglob("figures-*"))


def test_one_that_does_not_compile_is_an_outcome_among_others():
    wrong = matmul(torch.float32, precision="tf32")  # which gfx90a has not
    first, second = compile_all([(wrong, "gfx90a"), (copy(), "gfx90a")], jobs=2)
    assert first.figures is None
    (fault,) = first.faults
    assert fault.startswith("does not compile: CompilationError")
    assert second.faults == []


def test_a_compiler_that_crashes_is_an_outcome_too(monkeypatch):
    def crash(binary, target):
        if target == "sm_90":
            os.kill(os.getpid(), signal.SIGKILL)
        return compile_binary(binary, target)

    monkeypatch.setattr(binaries, "compile_binary", crash)
    outcomes = list(compile_all([(copy(), target) for target in ("sm_80", "sm_90", "sm_100")], jobs=2))
    assert [outcome.faults for outcome in outcomes] == [[], ["the compiler crashed"], []]


def test_a_crash_while_tasks_are_handed_in_loses_none(monkeypatch):
    submit = ProcessPoolExecutor.submit

    def broken(pool, task, index, read):
        if index == 1:
            raise BrokenProcessPool
        return submit(pool, task, index, read)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", broken)
    first, second = compile_all([(copy(), "sm_80"), (copy(), "sm_90")], jobs=1)
    assert first.figures.access == second.figures.access == 16


def test_unknown_target_is_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="target: expected one of sm_80"):
        compile_all([(copy(), "sm_80"), (copy(), "sm_1")])


def test_missing_disassembler_ends_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fusedres.compiler.figures._cuobjdump", lambda: "/bin/false")
    with pytest.raises(Unavailable, match="/bin/false failed with exit status 1"):
        list(compile_all([(copy(), "sm_80")]))


def test_table_has_a_dash_where_a_target_does_not_say():
    binaries = [copy(), hoard(), matmul()]
    outcomes = list(compile_all([(binary, target) for binary in binaries for target in ("sm_80", "gfx942")]))
    cells = [list(column.cells) for column in table(outcomes, {(matmul(), "sm_80"): Recorded(["m"], 432)}).columns]
    rows = list(zip(*cells, strict=True))
    assert [row[0] for row in rows] == ["copy_kernel", "", "hoard_kernel", "", "matmul_kernel", ""]
    assert rows[0][1] == "bf16 BLOCK_ROWS=32 BLOCK_C=64 warps=4 stages=3"
    assert [row[2] for row in rows] == ["sm_80", "gfx942"] * 3
    assert rows[0][4:6] == ("-", "-")
    assert rows[1][4] != "-"
    assert rows[1][5:7] == ("0", "0/0")
    assert [row[12] for row in rows] == ["-", "-", "-", "-", f"{outcomes[4].figures.issue:.2f}", "-"]
    narrow, wgmma, outside, blocks, waves, _ = rows[4][13:]
    assert (narrow, wgmma, outside) == ("0.00", "", str(outcomes[4].figures.code.straight.instructions))
    together = int(blocks.split()[0])
    assert waves == f"{432 / (108 * together):.2f}"
    assert rows[0][-2] == "-"
    assert [row[-1] for row in rows] == ["kept", "kept", "BROKEN", "kept", "kept", "kept"]


def test_csv_has_every_figure(tmp_path):
    outcomes = [*compile_all([(copy(), "sm_80")]), Outcome(copy(), "sm_90", None, "does not compile: because")]
    users = {
        (copy(), "sm_80"): Recorded(["resnet18", "resnet50"], 216),
        (copy(), "sm_90"): Recorded(["resnet18"], 1),
    }
    write_csv(tmp_path / "report.csv", outcomes, users)
    with (tmp_path / "report.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["kernel"] == "copy_kernel"
    assert first["models"] == "resnet18 resnet50"
    assert first["target"] == "sm_80"
    assert first["access"] == "16"
    assert first["scalar_registers"] == first["issue"] == ""
    assert (first["faults"], first["serialised"]) == ("", "()")
    assert first["blocks"].split()[1] in ("registers", "warps")
    assert float(first["waves"]) == pytest.approx(216 / (108 * int(first["blocks"].split()[0])), abs=0.0051)
    assert int(first["outside"]) > 20
    assert second["models"] == "resnet18"
    assert second["registers"] == ""
    assert second["faults"] == "does not compile: because"


def test_run_reports_and_keeps_budgets(models, tmp_path, capsys):
    options = CompileOptions(
        report=True, models=["copies"], dtypes=["bf16"], targets=["sm_90", "gfx942"], csv=tmp_path / "report.csv"
    )
    assert run(options) == 0
    out = capsys.readouterr().out
    assert "copy_kernel" in out
    assert "gfx942" in out
    assert "4 binaries for 2 targets, recorded from copies in bf16" in out
    assert "FAILED" not in out
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 1 + 4


def test_a_report_has_the_targets_of_a_binary_together_and_no_others(models, tmp_path):
    path = tmp_path / "report.csv"
    options = CompileOptions(
        report=True, models=["copies", "adapts"], dtypes=["fp32"], targets=["gfx942", "sm_80", "gfx90a"], csv=path
    )
    assert run(options) == 0
    with path.open() as file:
        lines = [
            (int(re.search(r"BLOCK_ROWS=(\d+)", line["variant"])[1]), line["target"], line["models"])
            for line in csv.DictReader(file)
            if "rows=1 " not in line["variant"]  # those of a single image
        ]
    assert lines == [
        (16, "sm_80", "adapts"),
        (32, "gfx942", "copies"),
        (32, "sm_80", "copies"),
        (32, "gfx90a", "copies"),
        (64, "gfx942", "adapts"),
        (64, "gfx90a", "adapts"),
    ]


def test_run_fails_when_a_budget_is_broken(models, capsys):
    assert run(CompileOptions(report=True, models=["hoards"], dtypes=["fp32"], targets=["sm_80"])) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out
    assert "FAILED: hoard_kernel [fp32 BLOCK=16384 warps=1 stages=3] on sm_80: spills" in out


def test_run_without_report_compiles(models, capsys):
    assert run(CompileOptions(models=["copies"], dtypes=["bf16"], targets=["sm_80"])) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 binaries for 1 targets")
    assert "copy_kernel" not in out


def test_run_fails_where_nothing_is_launched(models, capsys):
    assert run(CompileOptions(models=["silent"])) == 1
    assert "launch no kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": ["sm_1"]}, f"targets: expected some of {', '.join(TARGETS)}, got 'sm_1'"),
        ({"models": ["resnet19"]}, "model: expected a name such as .*resnet18.*, got 'resnet19'"),
        ({"models": ["torchvision.ssd300_vgg16"]}, "got torchvision.ssd300_vgg16, which takes a list of images"),
        ({"dtypes": ["fp64"]}, "dtypes: expected some of bf16, fp16, fp32, got 'fp64'"),
    ],
)
def test_unknown_names_are_refused_with_the_known(changed, message):
    with pytest.raises(ValueError, match=message):
        run(CompileOptions(**changed))


@pytest.mark.parametrize(
    ("report", "path", "message"),
    [
        (True, "missing/report.csv", "csv must lie in an existing folder"),
        (False, "report.csv", "csv: expected together with --report"),
    ],
)
def test_csv_that_can_not_be_written_is_refused_before_compiling(report, path, message, tmp_path, monkeypatch):
    monkeypatch.setattr(binaries, "recorded_binaries", None)
    with pytest.raises(ValueError, match=message):
        run(CompileOptions(report=report, csv=tmp_path / path))
