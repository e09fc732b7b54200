"""`fusedres train` as a user runs it: whole trainings, killed and resumed ones, and refusals."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from fusedres.models import create
from fusedres.runtime.devices import gpus
from fusedres.train import checkpoint
from fusedres.train.trainer import Trainer
from fusedres_cli.main import main
from tests.gpu_support import allocations, needs_gpu, used_since
from tests.train.cifar_files import write_cifar10_pickled, write_cifar100_pickled
from tests.train.image_folder import write_image_folder

SHORT = ["--data", "digits", "--batch", "64", "--epochs", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


pytestmark = pytest.mark.usefixtures("plain_where_small")  # as in the processes that are started

# Here bits are compared, which a GPU gives again with --deterministic alone.
TRAIN = ["train", "--device", "cpu"]


def train(*arguments):
    return main([*TRAIN, *map(str, arguments)])


def command(*arguments):
    return [sys.executable, "-m", "fusedres", *TRAIN, *map(str, arguments)]


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def assert_same_weights(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "whole"
    threads = torch.get_num_threads()
    assert train(*SHORT, "--out", folder) == 0
    torch.set_num_threads(threads)
    return folder


def test_a_training_leaves_weights_log_and_curves(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"checkpoint.pt", "best.pt", "model.pt", "log.csv", "curves.png"}
    table = rows(uninterrupted)
    assert [int(row["step"]) for row in table] == [22, 44, 66, 88]
    assert float(table[-1]["train_loss"]) < 0.5 < 1.5 < float(table[0]["train_loss"])
    create("cifar_resnet20", in_channels=1, fused=False).load_state_dict(weights(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(uninterrupted, tmp_path, number):
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(*SHORT, "--out", folder), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "log.csv").exists() and len(rows(folder)) >= 2, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert not (folder / "model.pt").exists(), "it had ended"
    step = checkpoint.load(folder / "checkpoint.pt")["step"]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert step in (44, 66)
    else:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"stopped by signal 15 after step {step}; go on with --resume" in output

    assert train(*SHORT, "--out", folder, "--resume") == 0
    assert_same_weights(uninterrupted, folder)
    same = [name for name in rows(folder)[0] if name not in ("images_per_second", "seconds", "memory_mb")]
    assert [[row[name] for name in same] for row in rows(folder)] == [
        [row[name] for name in same] for row in rows(uninterrupted)
    ]


def test_a_finished_training_resumed_stays_as_it_is(uninterrupted, capsys):
    before = weights(uninterrupted)
    assert train(*SHORT, "--out", uninterrupted, "--resume") == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(uninterrupted).items())
    assert "resumed at step 88" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.2"], "recipe.lr: was 0.1, now 0.2"),
        (["--batch", "32"], "recipe.batch: was 64, now 32"),
        (["--plain"], "plain: was False, now True"),
        (["--seed", "1"], "seed: was 0, now 1"),
        (["--amp", "bf16"], "amp: was None, now 'bf16'"),
        (["--validation", "100"], "validation: was 0, now 100"),
        (["--option", "shortcut=projection"], "option.shortcut: was None, now 'projection'"),
    ],
)
def test_resuming_with_other_settings_names_them(uninterrupted, arguments, message, capsys):
    assert train(*SHORT, "--out", uninterrupted, "--resume", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_number_of_classes_is_refused(tmp_path, capsys):
    state = create("cifar_resnet20", num_classes=100, in_channels=1).state_dict()
    checkpoint.write(tmp_path / "hundred.pt", state)
    assert train(*SHORT, "--weights", tmp_path / "hundred.pt", "--out", tmp_path / "out") == 2
    assert "classes: expected weights for 10, got some for 100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.* holds .* images, the published file")
def test_a_training_on_cifar10_is_not_resumed_on_cifar100(tmp_path, capsys):
    write_cifar10_pickled(tmp_path)
    write_cifar100_pickled(tmp_path)
    short = ["--data-dir", tmp_path, "--batch", 16, "--iterations", 2, "--out", tmp_path / "out", "--threads", 1]
    assert train("--data", "cifar10", *short) == 0
    assert "recipe he2015-cifar" in capsys.readouterr().out
    assert train("--data", "cifar100", *short, "--resume") == 2
    message = capsys.readouterr().err
    assert "data: was 'cifar10', now 'cifar100'; classes: was 10, now 100" in message


def test_plain_and_fused_twins_see_the_same_images_and_learn_the_same(tmp_path):
    for name, more in (("fused", []), ("plain", ["--plain"])):
        assert train(*SHORT[:-4], "--iterations", "12", "--threads", "1", "--out", tmp_path / name, *more) == 0
    fused, plain = (rows(tmp_path / name)[0] for name in ("fused", "plain"))
    # Rounding alone differs; twelve steps make little of it.
    assert float(fused["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=1e-3)
    one, other = (weights(tmp_path / name) for name in ("fused", "plain"))
    assert one.keys() == other.keys()


def test_a_loss_that_is_not_finite_fails_with_its_step(tmp_path, capsys):
    assert train(*SHORT, "--lr", "1e30", "--out", tmp_path / "out") == 1
    output = capsys.readouterr().out
    assert "FAILED: the loss is not finite at step 2; the last good checkpoint is" in output
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pt")
    assert state["step"] == 0
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_training_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(*SHORT, "--out", tmp_path / "out") == 1
    assert "matplotlib not installed: pip install fusedres[cli]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_fit_is_explained(tmp_path, monkeypatch, capsys):
    def full(self, loaded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Trainer, "_step", full)
    assert train(*SHORT, "--out", tmp_path / "out") == 1
    output = capsys.readouterr().out
    assert "FAILED: a batch of 64 images does not fit into the memory of cpu: estimated" in output
    assert "fusedres explain" in output


@pytest.mark.slow
def test_memory_that_really_ends_is_explained(tmp_path):
    code = (
        "import resource, sys; from fusedres_cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = [*TRAIN, "--px", "64", "--batch", "1437", "--threads", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "a batch of 1437 images does not fit into the memory of cpu" in done.stdout


@needs_gpu
@pytest.mark.parametrize("place", [[], ["--augment-on-device"]], ids=["on the host", "on the GPU"])
def test_grey_images_train_a_network_for_colours_on_the_last_gpu(tmp_path, place, capsys):
    """Their three channels are one in memory, which can not be page-locked as it is."""
    last = gpus()[-1]
    before = allocations()
    given = ["--model", "regnet_x_400mf", "--px", 32, "--iterations", 3, "--batch", 8, "--threads", 1]
    assert train(*given, *place, "--device", last, "--out", tmp_path / "out") == 0
    assert torch.cuda.get_device_name(last) in capsys.readouterr().out
    (row,) = rows(tmp_path / "out")
    assert float(row["train_loss"]) > 0 and float(row["memory_mb"]) > 0
    assert weights(tmp_path / "out")["stem.0.weight"].shape == (32, 3, 3, 3)
    assert used_since(before) == [last]


def test_an_image_folder_from_training_to_every_kind_of_test(tmp_path, capsys):
    data = f"imagefolder:{write_image_folder(tmp_path / 'set')}"
    given = ["--data", data, "--px", 32, "--batch", 4, "--threads", 1]
    more = ["--iterations", 7, "--workers", 1, "--test", "multi-scale", "--validation", 3, "--amp", "bf16"]
    assert train(*given, *more, "--augment-on-device", "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "recipe he2015-imagenet (arXiv:1512.03385, section 3.4)" in output
    assert "test (multi-scale): loss" in output
    assert "best validation error" in output
    for kind in ("single", "ten-crop"):
        assert train(*given, "--evaluate", "--weights", tmp_path / "out" / "model.pt", "--test", kind) == 0
        assert f"test ({kind}): loss" in capsys.readouterr().out


def test_other_ways_to_compute(tmp_path):
    pytest.importorskip("tensorboard")
    more = ["--no-channels-last", "--deterministic", "--amp", "fp16", "--plateau", "1", "--tensorboard"]
    assert train("--model", "regnet_x_400mf", "--iterations", 2, "--batch", 8, "--px", 32, "--threads", 1, *more,
                 "--out", tmp_path / "out") == 0  # fmt: skip
    assert not torch.are_deterministic_algorithms_enabled()
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert weights(tmp_path / "out")["stem.0.weight"].shape == (32, 3, 3, 3)
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pt")["scaler"]["scale"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet51"], "model: expected a name such as"),
        (["--data", "mnist"], "data: expected one of cifar10"),
        (["--data", "imagefolder:/nowhere"], "data: there is no folder /nowhere/train"),
        (["--data", "cifar10", "--no-download", "--data-dir", "/nowhere"], "cifar10: no files under /nowhere"),
        (["--batch", "1438"], "batch must be between 1 and the 1437 training images, got 1438"),
        (["--epochs", "1", "--iterations", "1"], "epochs: expected instead of --iterations"),
        (["--test", "ten-crop"], "test: ten-crop needs an image folder"),
        (["--evaluate"], "evaluate: expected together with --weights"),
        (["--resume", "--weights", "model.pt"], "weights: expected without --resume"),
        (["--resume"], "resume: there is no checkpoint"),
        (["--weights", "/nowhere/model.pt"], "weights: there is no file /nowhere/model.pt"),
        (["--device", "tpu"], "device: expected cpu"),
        (["--device", ""], "got ''"),
        (["--device", "cuda:99"], "got 'cuda:99'"),
        (["--option", "shortcut"], "option: expected NAME=VALUE, got 'shortcut'"),
        (["--out", "/dev/null/out"], "out: the folder /dev/null/out can not be made"),
    ],
)
def test_impossible_arguments_return_2_and_leave_nothing(tmp_path, arguments, message, capsys):
    assert train("--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "expected a whole number of at least 1, got '0'"),
        (["--lr", "nan"], "expected a number of at least 0, got 'nan'"),
        (["--lr", "-1"], "expected a number of at least 0, got '-1'"),
        (["--workers", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["--amp", "fp8"], "invalid choice"),
        (["--test", "best"], "invalid choice"),
        (["--recipe", "sgd"], "invalid choice: 'sgd' (choose from"),
        (["--schedule", "fastest"], "invalid choice"),
    ],
)
def test_malformed_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_training_is_not_overwritten(uninterrupted, capsys):
    assert train(*SHORT, "--out", uninterrupted) == 2
    assert "holds a training already; go on with --resume or choose another" in capsys.readouterr().err


def torchrun(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusedres",
         *TRAIN, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_train_together_and_one_writes(tmp_path):
    given = ["--batch", "64", "--threads", "1", "--epochs", "2"]
    done = torchrun(*given, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch    1") == 1
    assert "2 processes on cpu" in done.stdout
    assert train(*given, "--out", tmp_path / "one") == 0
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    # The same images, but batch norm over halves of each batch.
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert float(two[0]["train_loss"]) == pytest.approx(float(one[0]["train_loss"]), rel=0.1)
    assert float(two[0]["train_loss"]) != float(one[0]["train_loss"])
    assert float(two[1]["train_loss"]) < float(two[0]["train_loss"])


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_bits(tmp_path):
    given = ["--batch", "64", "--threads", "1", "--epochs", "6", "--option", "shortcut=projection"]
    assert torchrun(*given, "--out", tmp_path / "whole").returncode == 0
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusedres",
         *TRAIN, *given, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: (folder / "log.csv").exists() and len(rows(folder)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not (folder / "model.pt").exists(), "it had ended"
    assert 44 < checkpoint.load(folder / "checkpoint.pt")["step"] < 132
    assert torchrun(*given, "--out", folder, "--resume").returncode == 0
    assert_same_weights(tmp_path / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reach_98_percent_within_three_minutes(tmp_path, seed):
    start = time.monotonic()
    assert train("--seed", seed, "--out", tmp_path / "out") == 0
    assert time.monotonic() - start < 180
    assert float(rows(tmp_path / "out")[-1]["held_out_error"]) <= 0.02
