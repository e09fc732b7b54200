"""fusedres.bench.session and its command: what is refused before any work, and what is kept whatever happens."""

import sys

import pytest
import torch

from fusedres.bench import session
from fusedres.bench.harness import DeviceLost
from fusedres.bench.rows import OK, REFUSED, read_rows
from fusedres_cli.main import main
from tests.bench.tiny import row

TINY = [
    "--block", "basic1", "--px", "8", "--batch", "1", "--rounds", "1", "--contenders", "fused", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet49"], "model: expected a name such as resnet"),
        (["torchvision.alexnet"], "model: torchvision.alexnet: nothing to fuse in it ("),
        (["--block", "basic9"], "block: expected one such as basic"),
        (["--op", "block_ends.stage1"], "op: expected one such as block_end.stage1"),
        ([*TINY, "--contenders", "fusd"], "contenders: expected one such as fused"),
        ([*TINY, "--dtype", "bf61"], "dtype: expected one such as bf16"),
        ([*TINY, "--device", "gpu"], "device: expected cpu"),
        ([*TINY, "--device", "cuda:99", "--csv", "rows.csv"], "got 'cuda:99'"),
        ([], "model, block, op: expected at least one to run"),
        (["--quick", *TINY], "quick: expected without --model"),
        ([*TINY, "--csv", "/nonexistent/rows.csv"], "csv must name a file that can be written, got /nonexistent/"),
        ([*TINY, "--plot", "picture.jpg"], "plot must name a .png file"),
        ([*TINY, "--html", "/proc/page.html"], "html must name a file that can be written, got /proc/page.html"),
        ([*TINY, "--resume"], "resume: expected together with --csv"),
    ],
)
def test_impossible_arguments_return_2_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "compare", lambda *_, **__: pytest.fail("work was begun"))
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "missing"),
    [("--plot=a.png", "matplotlib"), ("--html=a.html", "matplotlib"), ("--html=a.html", "jinja2")],
)
def test_missing_packages_are_named_before_any_work(output, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "compare", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["bench", *TINY, output]) == 1
    assert f"{missing} not installed: pip install fusedres[cli]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_check_of_the_outputs_leaves_no_file_behind(tmp_path, capsys):
    assert main(["bench", *TINY, "--csv", str(tmp_path / "a.csv"), "--html", "/nonexistent/b.html"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_everything_is_written(tmp_path, capsys):
    files = [tmp_path / "rows.csv", tmp_path / "picture.png", tmp_path / "page.html"]
    outputs = ["--csv", str(files[0]), "--plot", str(files[1]), "--html", str(files[2])]
    assert main(["bench", *TINY, "--threads", "1", *outputs]) == 0
    told = capsys.readouterr()
    printed = told.out
    assert "[0/3] basic1, train: eager\n[1/3] basic1, train: fused\n[2/3] basic1, train: times, in turns\n" in told.err
    assert "basic1, train, fp32, batch 1, 8 px" in printed
    assert "No GPU was used." in printed
    rows = read_rows(files[0])
    assert [(one.mode, one.contender, one.status) for one in rows] == [
        (mode, name, OK) for mode in ("train", "infer") for name in ("eager", "fused")
    ]
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "basic1, infer" in files[2].read_text()


class Interrupted:
    """Stands in for `compare`: a row for each call, and an exception at one of them."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error, self.done = at, error, []

    def __call__(self, case, setting, contenders, _measurement, *, done, tell):
        self.left -= 1
        self.done.append(list(done))
        if self.left == 0:
            raise self.error
        names = [one.name for one in contenders if one.name not in done]
        place = {"case": case.name, "mode": setting.mode, "dtype": setting.dtype, "batch": setting.batch}
        here = {"px": setting.px, "device": session.machine(setting.device).device}
        return [row(name, **place, **here) for name in names]


def test_finished_rows_survive_an_interruption_and_are_not_measured_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["bench", *TINY, "--csv", str(path), "--html", str(tmp_path / "page.html")]
    monkeypatch.setattr(session, "compare", Interrupted(2, KeyboardInterrupt()))
    assert main(arguments) == 130
    assert [(one.mode, one.contender) for one in read_rows(path)] == [("train", "eager"), ("train", "fused")]
    assert "basic1, train" in (tmp_path / "page.html").read_text()
    again = Interrupted(0, KeyboardInterrupt())
    monkeypatch.setattr(session, "compare", again)
    assert main([*arguments, "--resume"]) == 0
    assert again.done == [[]]
    assert [(one.mode, one.contender) for one in read_rows(path)] == [
        (mode, name) for mode in ("train", "infer") for name in ("eager", "fused")
    ]


def test_a_lost_gpu_ends_the_process_with_its_row_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    place = {"case": "basic1", "px": 8, "batch": 1, "dtype": "fp32"}
    lost = DeviceLost("an illegal memory access", [row("fused", **place, status="failed", reason="lost")])
    monkeypatch.setattr(session, "compare", Interrupted(1, lost))
    assert main(["bench", *TINY, "--csv", str(path)]) == 3
    assert [one.contender for one in read_rows(path)] == ["fused"]


def test_rows_of_another_machine_are_not_gone_on_with(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    with session.new_table(path, [row()]):
        pass
    assert main(["bench", *TINY, "--csv", str(path), "--resume"]) == 2
    assert "resume: expected rows of this machine's" in capsys.readouterr().err
    assert len(read_rows(path)) == 1


def test_a_refused_contender_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        session, "compare", lambda *_, **__: [row(status=REFUSED, reason="output differs", median_s=None)]
    )
    assert main(["bench", *TINY, "--train"]) == 1
    assert "FAILED: resnet50, train, fp16, batch 256, 224 px: fused: refused by the gate" in capsys.readouterr().out


def test_the_registry_is_listed(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("resnet50", "cifar_resnet56", "bottleneck2_down", "block_end.stage2", "inplace_abn", "fused-moments"):
        assert name in printed


def test_defaults_are_small_on_a_cpu():
    options = session.BenchOptions(model=("resnet50",), block=("basic1",), op=("stem_pool",))
    found = session.comparisons(options, session.device_named("cpu"))
    assert [(case.name, one.mode, one.dtype, one.batch, one.px) for case, one in found] == [
        ("resnet50", "train", "fp32", 8, 224), ("resnet50", "infer", "fp32", 8, 224),
        ("basic1", "train", "fp32", 4, 56), ("basic1", "infer", "fp32", 4, 56), ("stem_pool", "op", "fp32", 2, 112),
    ]  # fmt: skip


def test_counted_figures_of_full_size(capsys, monkeypatch):
    """Eager's are those of the real graph: 727 launches, 461 MB without the loss."""
    from rich.console import Console

    monkeypatch.setattr(session.tables, "COUNTED", ("resnet50",))
    session.tables.print_counted(Console(width=150))
    printed = capsys.readouterr().out
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "resnet50" in line
    ]
    counted = {(mode, name): (int(launches), float(mb)) for _, mode, name, launches, mb, *_ in lines}
    assert counted["train", "eager"][0] == pytest.approx(727, rel=0.01)
    assert counted["train", "eager"][1] == pytest.approx(461.0, rel=0.01)
    assert counted["train", "fused-moments"][1] < 0.5 * counted["train", "eager"][1]
    assert counted["infer", "fused"][1] < 0.35 * counted["infer", "eager"][1]
    assert "Counted, not measured" in printed
