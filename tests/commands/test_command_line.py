"""fusedres_cli: one convention for all commands, answered without PyTorch."""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres_cli
from fusedres.commands import coverage
from fusedres.patterns.choose import AUTO, MEMORY
from fusedres.plan.schedule import SCHEDULES
from fusedres.train import recipe
from fusedres_cli import coverage as declared
from fusedres_cli import main, options, train
from fusedres_cli.main import COMMANDS, parser

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def parsed(*arguments):
    return parser().parse_args(list(map(str, arguments)))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--version"], 0), (["bnech"], 2), (["bench", "--modle", "x"], 2)]
    + [([name, "--help"], 0) for name in NAMES],
)
def test_what_needs_no_model_is_answered_at_once(arguments, status):
    code = (
        "import sys\nfrom fusedres_cli.main import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as exit_: print(exit_.code, 'torch' in sys.modules or 'fusedres' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == f"{status} False"
    # Of the processor, so that other work on the machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_only_the_standard_library_is_imported_to_declare_arguments():
    for path in Path(fusedres_cli.__path__[0]).glob("*.py"):
        found = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M)) - {"fusedres_cli"}
        assert found <= sys.stdlib_module_names, path


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_80_columns_and_its_examples_parse(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main.main([name, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in text.partition("examples:")[2].splitlines()]
    examples = [line for line in lines if "fusedres " in line and line.startswith(("fusedres", "torchrun"))]
    assert examples
    for line in examples:
        assert parsed(*shlex.split(line.partition("fusedres ")[2])).command == name


def test_every_option_says_what_it_is_for_and_its_default():
    for name, command in main._commands(parser()).items():
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
    text = " ".join(main._commands(parser())["demo"].format_help().split())
    assert "-b, --batch, --batch-size N images of a step (default: 64)" in text
    assert "--threads N CPU threads (PyTorch decides if not given)" in text
    assert "default: None" not in text


def test_names_of_timm_and_torchvision_are_taken():
    asked = ["--model", "resnet50", "--batch-size", 8, "--epochs", 2, "--lr", 0.1, "--wd", 1e-4, "--workers", 3]
    found = parsed("train", *asked, "--amp", "--amp-dtype", "float16", "--output-dir", "x", "--img-size", 64)
    assert (found.model, found.batch, found.epochs, found.lr, found.weight_decay, found.workers) == (
        "resnet50", 8, 2, 0.1, 1e-4, 3,
    )  # fmt: skip
    assert (found.amp, found.out, found.px) == ("fp16", Path("x"), 64)
    assert parsed("train", "resnet18", "-b", 4, "-j", 2, "--amp", "--plain").amp == "bf16"
    assert parsed("train", "--amp", "bfloat16").amp == "bf16"
    for command in ("explain", "tune"):
        found = parsed(command, "resnet50", "-b", 8, "--amp-dtype", "bfloat16")
        assert (found.model, found.batch, found.dtype) == ("resnet50", 8, "bf16")
    assert parsed("bench", "a", "b", "--dtype", "float32,bf16").dtype == ("fp32", "bf16")


def test_a_model_is_a_word_or_an_option():
    for command in ("explain", "predict", "tune", "doctor", "train"):
        assert parsed(command, "resnet50").model == parsed(command, "--model", "resnet50").model == "resnet50"
    for command in ("bench", "compile", "coverage"):
        assert [*parsed(command, "a", "b").model] == [*parsed(command, "--model", "a,b").model] == ["a", "b"]
        assert [*parsed(command, "--model", "a", "--model", "b").model] == ["a", "b"] and not parsed(command).model
    assert parsed("predict").model == "torchvision.resnet50" and parsed("train").model == "cifar_resnet20"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bnech"], "fusedres: error: 'bnech' is no command, did you mean bench?; those are demo,"),
        (["qqq"], "'qqq' is no command; those are demo,"),
        (["train", "--epoch", "3"], "fusedres train: error: no argument --epoch, did you mean --epochs?"),
        (["explain", "resnet50", "--infre=1"], "fusedres explain: error: no argument --infre, did you mean --infer"),
        (["tune", "resnet50", "resnet18"], "fusedres tune: error: no argument resnet18\n"),
        (["train", "--recipe", "he2015"], "invalid choice: 'he2015' (choose from"),
        (["train", "--amp-dtype", "int8"], "argument --amp/--amp-dtype: invalid choice: 'int8' (choose from"),
    ],
)
def test_a_near_miss_is_suggested(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_listed_without_pytorch_is_what_there_is():
    assert (AUTO, MEMORY, *SCHEDULES) == options.SCHEDULES
    assert recipe.names() == train.RECIPES
    assert declared.LIBRARIES == coverage.LIBRARIES


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        main.main(["--print-completion", shell])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES) and "--min-accuracy" in printed


def test_completion_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit_:
        main.main(["--print-completion", "bash"])
    assert exit_.value.code == 1 and "pip install fusedres[cli]" in capsys.readouterr().err


def test_the_package_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "--version"], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout == "fusedres 0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "resnet500"],
        ["train", "--data", "digit"],
        ["train", "--option", "depth=x"],
        ["train", "--device", "cuda:99"],
        ["study", "degradations"],
        ["study", "degradation", "--device", "tpu"],
        ["compile", "resnet500", "--target", "sm_90"],
    ],
    ids=" ".join,
)
def test_arguments_are_checked_before_folders_are_made(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*arguments, "--out", "made"]) == 2
    assert capsys.readouterr().err.startswith(f"fusedres {arguments[0]}: error: ")
    assert list(tmp_path.iterdir()) == []
