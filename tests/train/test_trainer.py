"""fusedres.train.trainer: resuming is exact, failures leave the last good checkpoint, signals save first."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("rich")

from fusedres.train import checkpoint
from fusedres.train.augment import Augment, measure
from fusedres.train.distributed import World
from fusedres.train.evaluation import Evaluator
from fusedres.train.logs import Logs
from fusedres.train.recipe import Drops, PadCrop, Plateau, Recipe, WarmUp
from fusedres.train.sources import Arrays, DataError
from fusedres.train.stopping import Stopped, Stopping, stopping
from fusedres.train.trainer import CHECKPOINT, LOOK_EVERY, Diverged, Settings, Trainer, seed_everything

HERE = World(0, 1, torch.device("cpu"))
RECIPE = Recipe("test", "", "epochs", 4, 8, Drops((3,)), PadCrop(1), warm_up=WarmUp(0.02, fraction=0.3), lr=0.05)
PLATEAU = dataclasses.replace(
    RECIPE, schedule=Plateau(patience=0), warm_up=WarmUp(0.01, until_error=0.6), lr=1.0
)  # fmt: skip
STILL = Logs(None, "", 1, "test")


class Recorder(Logs):
    """Keeps what the bar shows at regular looks."""

    def __init__(self):
        super().__init__(None, "", 1, "test")
        self.seen = {}

    def step(self, step, epoch, lr, loss, error, speed, memory):
        if step % LOOK_EVERY == 0:
            self.seen[step] = (epoch, lr, loss, error)


class Net(nn.Module):
    """Batch norm for running statistics, dropout for the generator's state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.bn(self.conv(x)).relu(), 0.2, self.training)
        return self.fc(x.mean((2, 3)))


def images(count=106):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 100, (count, 3, 6, 6), generator=generator) + 50 * labels[:, None, None, None]
    return Arrays(pixels.clamp(max=255).to(torch.uint8), labels)


def make(folder=None, *, recipe=RECIPE, settings=None, source=None, model=None, config=None):
    settings = settings or Settings(seed=1)
    source = source or images()
    seed_everything(settings.seed)
    augment = Augment(measure(source, "pixel"), PadCrop(1))
    return Trainer(
        model or Net(), recipe, source, Evaluator(images(30), augment, HERE, batch=10), augment, HERE, settings,
        config=config or {"lr": recipe.lr}, folder=folder,
    )  # fmt: skip


def stop_after(trainer, steps):
    """A wish that is made once the trainer has done so many steps."""

    class Wish(Stopping):
        @property
        def requested(self):
            return signal.SIGTERM if trainer.step >= steps else 0

    return Wish()


def everything(trainer):
    tensors = dict(trainer.model.state_dict())
    for i, state in trainer.optimizer.state_dict()["state"].items():
        tensors[f"momentum {i}"] = state["momentum_buffer"]
    return tensors


def assert_same(one, other):
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    figures = [[row[:8] for row in trainer.history] for trainer in (one, other)]
    assert figures[0] == figures[1]


CASES = {
    "in the first epoch": (5, Settings(seed=1), RECIPE),
    "between two looks": (LOOK_EVERY + 3, Settings(seed=1), RECIPE),
    "at the end of an epoch": (13, Settings(seed=1), RECIPE),
    "in the last epoch": (46, Settings(seed=1), RECIPE),
    "gradients scaled": (17, Settings(seed=1, amp=torch.float16), RECIPE),
    "bf16": (17, Settings(seed=1, amp=torch.bfloat16), RECIPE),
    "plateaus": (30, Settings(seed=1), PLATEAU),
    "augmented on the device": (17, Settings(seed=1, augment_on_device=True), RECIPE),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_stopped_and_resumed_ends_with_the_same_bits(tmp_path, name):
    steps, settings, recipe = CASES[name]
    logs, parts = Recorder(), Recorder()
    whole = make(recipe=recipe, settings=settings)
    whole.run(logs, Stopping())
    assert whole.step == whole.rate.total == 4 * 13
    assert len({row.lr for row in whole.history}) > 1

    first = make(tmp_path, recipe=recipe, settings=settings)
    with pytest.raises(Stopped) as stopped:
        first.run(parts, stop_after(first, steps))
    assert first.step == steps
    assert stopped.value.status == 128 + signal.SIGTERM

    torch.rand(7)  # what another process does to its generators does not matter
    second = make(tmp_path, recipe=recipe, settings=settings)
    second.resume(checkpoint.load(tmp_path / CHECKPOINT), "checkpoint.pt")
    second.run(parts, Stopping())
    assert_same(whole, second)
    assert parts.seen == logs.seen
    assert len(logs.seen) == 5


def test_a_signal_while_the_held_out_images_are_tested_loses_nothing(tmp_path):
    logs, parts = Recorder(), Recorder()
    whole = make()
    whole.run(logs, Stopping())

    class WhileTesting(Stopping):
        came = 0

        @property
        def requested(self):
            if first.step == 26 and not first.model.training:
                self.came = signal.SIGTERM
            return self.came

    first = make(tmp_path)
    with pytest.raises(Stopped, match="after step 26"):
        first.run(parts, WhileTesting())
    assert len(first.history) == 1
    second = make(tmp_path)
    second.resume(checkpoint.load(tmp_path / CHECKPOINT), "checkpoint.pt")
    second.run(parts, Stopping())
    assert_same(whole, second)
    assert parts.seen == logs.seen


def test_the_scale_of_gradients_is_resumed(tmp_path):
    settings = Settings(seed=1, amp=torch.float16)

    def scaled(folder=None):
        trainer = make(folder, settings=settings)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        return trainer

    whole = scaled()
    whole.run(STILL, Stopping())
    first = scaled(tmp_path)
    with pytest.raises(Stopped):
        first.run(STILL, stop_after(first, 17))
    second = make(tmp_path, settings=settings)
    second.resume(checkpoint.load(tmp_path / CHECKPOINT), "checkpoint.pt")
    second.run(STILL, Stopping())
    assert_same(whole, second)
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert whole.scaler.get_scale() not in (2.0**30, 2.0**16)


def test_worker_processes_change_nothing(tmp_path):
    one, other = (make(settings=Settings(seed=1, workers=workers)) for workers in (0, 2))
    for trainer in (one, other):
        seed_everything(1)
        trainer.run(STILL, Stopping())
    assert_same(one, other)
    assert multiprocessing.active_children() == []


def test_the_seed_matters():
    one, other = (make(settings=Settings(seed=seed)) for seed in (1, 2))
    for trainer in (one, other):
        trainer.run(STILL, Stopping())
    assert one.history[-1].train_loss != other.history[-1].train_loss


def test_history_tells_what_happened():
    trainer = make()
    trainer.run(STILL, Stopping())
    rows = trainer.history
    assert [row.epoch for row in rows] == [1, 2, 3, 4]
    assert [row.step for row in rows] == [13, 26, 39, 52]
    assert [row.lr for row in rows] == pytest.approx([0.02, 0.05, 0.05, 0.005])
    assert rows[-1].train_loss < rows[0].train_loss
    assert rows[-1].held_out_error < 0.75
    assert trainer.best == min(row.held_out_error for row in rows)
    assert all(row.seconds > 0 and row.memory_mb > 1 for row in rows)


def test_the_training_error_is_that_of_the_batches():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x.new_tensor([5.0, 0, 0, 0]).expand(len(x), 4) + 0 * self.bias

    trainer = make(model=Always(), source=Arrays(torch.zeros(80, 3, 6, 6, dtype=torch.uint8), torch.arange(80) % 5 % 4))
    trainer.run(STILL, Stopping())
    assert trainer.history[0].train_error == pytest.approx(0.6)  # classes 0 and 4 count as 0


class PoisonedAt(nn.Module):
    """Gives NaN in one training step, or weights that are NaN after it."""

    def __init__(self, step, *, gradient=False):
        super().__init__()
        self.net, self.at, self.gradient, self.calls = Net(), step, gradient, 0

    def forward(self, x):
        out = self.net(x)
        if self.training:
            self.calls += 1
            if self.calls == self.at:
                return out + 0 * torch.sqrt(out * 0) if self.gradient else out * float("nan")
        return out


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    trainer = make(tmp_path, model=PoisonedAt(18))
    with pytest.raises(Diverged, match=r"loss is not finite at step 18; the last good checkpoint is .*checkpoint.pt"):
        trainer.run(STILL, Stopping())
    state = checkpoint.load(tmp_path / CHECKPOINT)
    assert state["step"] == 13
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    # The loss of the last step of the epoch is finite, its gradient is not.
    trainer = make(tmp_path, model=PoisonedAt(26, gradient=True))
    with pytest.raises(Diverged, match="weights are not finite after step 26"):
        trainer.run(STILL, Stopping())
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 13


def test_a_signal_does_not_save_a_diverged_training(tmp_path):
    trainer = make(tmp_path, model=PoisonedAt(15))
    with pytest.raises(Diverged, match="step 15"):
        trainer.run(STILL, stop_after(trainer, 16))
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 13


def test_overflow_in_fp16_lowers_the_scale_and_goes_on():
    trainer = make(settings=Settings(seed=1, amp=torch.float16))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.run(STILL, Stopping())
    assert trainer.scaler.get_scale() < 2.0**40
    assert trainer.step == 52


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    make(tmp_path, config={"lr": 0.05, "recipe": {"batch": 8}}).save()
    trainer = make(config={"lr": 0.1, "recipe": {"batch": 8}})
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"c.pt is from a training with other settings: lr: was 0.05, now 0.1$"):
        trainer.resume(checkpoint.load(tmp_path / CHECKPOINT), "c.pt")
    assert all(torch.equal(value, before[name]) for name, value in everything(trainer).items())


def test_a_batch_that_the_data_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="batch must be between 1 and the 6 training images, got 8"):
        make(source=images(6))


def test_a_graph_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="graph: expected a GPU, which has graphs, got cpu"):
        make(settings=Settings(graph=True))


def test_a_broken_image_stops_the_training():
    class Broken(Arrays):
        def fetch(self, indices, draws):
            if draws is not None:
                raise DataError("data: the image x.png can not be read")
            return super().fetch(indices, draws)

    source = images()
    with pytest.raises(DataError, match=r"x\.png"):
        make(source=Broken(source.images, source.labels)).run(STILL, Stopping())


def test_best_weights_are_kept(tmp_path):
    trainer = make(tmp_path)
    trainer.run(STILL, Stopping())
    model = Net()
    checkpoint.read_weights(tmp_path / "best.pt").give(model)
    assert trainer.held_out(model.to(memory_format=torch.channels_last)).error == trainer.best


def test_signals_are_noted_and_a_second_interrupt_is_obeyed():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping(patient=False) as wish:
        assert wish.requested == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.requested == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stopping(patient=True) as wish:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert wish.requested == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
