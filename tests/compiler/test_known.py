"""fusedres.compiler.known: the table of what binaries ask for, and binaries that it does not hold."""

import dataclasses

import pytest
import torch

from fusedres.compiler import known
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary, executed, form_of, limited, register_limit, write
from fusedres.compiler.occupancy import occupancy
from fusedres.explain import Question, explain
from fusedres.explain.binaries import compile_all
from fusedres.runtime.launch import Launch
from tests.small_kernels import copy, matmul


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "known.csv"
    monkeypatch.setattr(known, "TABLE", path)
    path.write_text(",".join(known.COLUMNS) + "\n")
    caches = known._table, known._executed
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


def rows(*binaries, target="sm_90"):
    outcomes = compile_all([(binary, target) for binary in binaries])
    return [(one.binary, one.target, 0, one.figures) for one in outcomes]


def test_what_is_written_is_what_is_found(table):
    one, other = matmul(), matmul(block=(64, 64, 32))
    assert write(rows(one, other), table) == 2
    for binary in (one, other):
        figures = read_figures(compile_binary(binary, "sm_90"), "sm_90")
        found = executed(binary, "sm_90")
        assert found.read
        assert (found.registers, found.shared, found.code) == (figures.registers, figures.shared, figures.code)
    assert executed(copy(), "sm_90") is None


def test_rows_of_other_targets_stay(table):
    write(rows(matmul(), target="sm_80"), table)
    write(rows(matmul()), table)
    write(rows(copy()), table)
    assert [line.split(",")[:2] for line in table.read_text().splitlines()[1:]] == [
        ["sm_80", "matmul_kernel"], ["sm_90", "copy_kernel"],
    ]  # fmt: skip


def test_another_binary_is_taken_for_the_one_most_like_it(table):
    small, wide = matmul(block=(64, 64, 32)), matmul(block=(128, 64, 64))
    write(rows(small, wide), table)
    found = executed(matmul(block=(128, 64, 32)), "sm_90")
    assert not found.read
    exact = {form_of(binary): executed(binary, "sm_90").code for binary in (small, wide)}
    assert (
        found.code in exact.values() or found.code.straight.instructions > exact[form_of(small)].straight.instructions
    )
    # 16-bit numbers are of one kind, and a target without rows is taken for its kin.
    half = matmul(torch.float16, block=(64, 64, 32))
    assert executed(half, "sm_90").read
    assert executed(small, "sm_100").code == executed(small, "sm_90").code


def test_a_limit_of_registers_is_found_where_one_block_more_fits(monkeypatch):
    """By figures of binaries that are made up: 168 registers of 8 warps are one block, 128 are two."""
    made = read_figures(compile_binary(matmul(), "sm_90"), "sm_90")

    def with_limit(spilled=0, more=1.0, shared=90_000):
        def read(binary, target, registers):
            code = made.code._replace(
                straight=made.code.straight._replace(instructions=round(1000 * (more if registers < 255 else 1)))
            )
            spill = spilled if registers < 255 else 0
            return dataclasses.replace(
                made, registers=min(168, registers), shared=shared, spill_stores=spill, code=code
            )

        monkeypatch.setattr(known, "_compiled", lambda *told: told)
        monkeypatch.setattr(known, "read_figures", lambda told, target: read(*told))
        return limited(matmul()._replace(num_warps=8, all_registers=True), "sm_90")

    limit, figures = with_limit()
    assert (limit, figures.registers) == (128, 128)
    assert occupancy(8, figures.registers, figures.shared, "sm_90").blocks == 2
    assert with_limit(spilled=8)[0] == 255
    assert with_limit(more=1.2)[0] == 255
    assert with_limit(shared=120_000)[0] == 255  # no place in shared memory


def test_a_launch_is_compiled_under_the_limit_of_the_table(table):
    binary = matmul()._replace(all_registers=True)
    free = read_figures(compile_binary(binary, "sm_90"), "sm_90")
    write([(binary, "sm_90", 64, free)], table)
    known._table.cache_clear()
    assert register_limit(binary, "sm_90") == 64
    assert compile_binary(binary, "sm_90").metadata.maxnreg == 64
    assert register_limit(binary, "sm_80") == 255


@pytest.fixture(scope="module")
def launched():
    """ResNet-50's launches under auto, by target."""
    found = {gpu: explain(Question("torchvision.resnet50", gpu=gpu, rungs=("auto",))) for gpu in ("h100", "a100")}
    return {
        one.gpu.target: [entry.work for entry in one.rungs["auto"].entries if isinstance(entry.work, Launch)]
        for one in found.values()
    }


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_the_shipped_table_holds_what_a_resnet_launches(target, launched):
    unknown = {one.binary.name for one in launched[target] if not executed(one.binary, target).read}
    # Images arrive in fp32 under autocast, and in 16 bits where binaries are recorded.
    assert unknown <= {"space_to_depth_kernel"}


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_the_shipped_table_is_of_these_kernels(target, launched):
    """A row of each kernel, compiled anew; the assembler of another version may count a little otherwise."""
    kinds = {one.binary.name: one.binary for one in launched[target]}
    for name in ("bn_finalize_kernel", "conv_input_grad_kernel", "conv_forward_kernel", "moments_matrices_kernel"):
        binary = kinds[name]
        figures, row = read_figures(compile_binary(binary, target), target), executed(binary, target)
        assert row.registers == pytest.approx(figures.registers, abs=24), name
        assert row.shared == pytest.approx(figures.shared, rel=0.1), name
        assert len(row.code.loops) == len(figures.code.loops), name
        assert row.code.straight.instructions == pytest.approx(figures.code.straight.instructions, rel=0.15), name
        assert figures.spill_stores == figures.spill_loads == 0, name
