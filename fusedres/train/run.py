"""`fusedres train`: from options to a trained network in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from fusedres.arguments import check_packages
from fusedres.train import checkpoint, memory, trainer
from fusedres.train.augment import Augment, measure
from fusedres.train.data import open_data
from fusedres.train.distributed import World, world
from fusedres.train.evaluation import KINDS, Evaluator, Result, Scores, mean_of_scores, views
from fusedres.train.logs import Logs
from fusedres.train.network import Network, build, known_options
from fusedres.train.recipe import Plateau, Recipe, recipe
from fusedres.train.sources import Data, Folder
from fusedres.train.stopping import Stopped, stopping

__all__ = ["TrainOptions", "run"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_RECIPES = {"cifar10": "he2015-cifar", "cifar100": "he2015-cifar", "digits": "digits", "mnist5k": "digits"}


@dataclass(frozen=True)
class TrainOptions:
    """What `fusedres train` was asked for. None is the recipe's number, or what suits data and machine."""

    model: str = "cifar_resnet20"
    data: str = "digits"
    recipe: str | None = None
    data_dir: Path = Path("data")
    download: bool = True
    validation: int = 0
    px: int | None = None
    epochs: int | None = None
    iterations: int | None = None
    batch: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    plateau: int | None = None
    plain: bool = False
    schedule: str = "auto"
    option: tuple[str, ...] = ()
    amp: str | None = None
    channels_last: bool = True
    deterministic: bool = False
    device: str | None = None
    threads: int | None = None
    workers: int | None = None
    augment_on_device: bool = False
    graph: bool = False
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    weights: tuple[Path, ...] = ()
    evaluate: bool = False
    test: str = "single"
    tensorboard: bool = False

    def chosen_recipe(self) -> Recipe:
        """The recipe with the numbers that were given instead of its own."""
        found = recipe(self.recipe or DEFAULT_RECIPES.get(self.data, "he2015-imagenet"))
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("epochs: expected instead of --iterations, not together with it")
        if self.epochs is not None:
            found = found.lasting(self.epochs, "epochs")
        if self.iterations is not None:
            found = found.lasting(self.iterations, "iterations")
        if self.plateau is not None:
            found = replace(found, schedule=Plateau(patience=self.plateau))
        given = {name: getattr(self, name) for name in ("batch", "lr", "weight_decay")}
        return replace(found, **{name: value for name, value in given.items() if value is not None})

    def folder(self) -> Path:
        """Where the results go."""
        data = self.data.partition(":")[0]
        name = Path(self.model).name if ":" in self.model else self.model.replace("/", ".")
        return self.out or Path("runs") / f"{name}-{data}-{'plain' if self.plain else 'fused'}-seed{self.seed}"


def run(options: TrainOptions) -> int:
    """Train, or only test, and return the exit status: 1 if the training failed, 128 + n if signal n stopped it.

    Raises:
        ValueError: an option is out of range, does not go with another, or with the checkpoint to be resumed.
        ImportError: a package of an extra is missing.
    """
    _check(options)
    if not options.evaluate:
        check_packages("matplotlib")
    with _determinism(options.deterministic), world(options.device) as here:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not here.main)
        try:
            return (_evaluate if options.evaluate else _train)(options, here, console)
        except Stopped as stopped:
            console.print(str(stopped))
            return stopped.status
        except (trainer.Diverged, memory.DoesNotFit) as failure:
            console.print(f"FAILED: {failure}")
            return 1


def _check(options: TrainOptions) -> None:
    if options.evaluate and not options.weights:
        raise ValueError("evaluate: expected together with --weights FILE")
    if options.resume and options.weights:
        raise ValueError("weights: expected without --resume, which has weights of its own")
    if len(options.weights) > 1 and not options.evaluate:
        raise ValueError(f"weights: expected one file to start from, or --evaluate, got {len(options.weights)} files")
    if options.test not in KINDS:
        raise ValueError(f"test: expected one of {', '.join(KINDS)}, got {options.test!r}")
    if options.amp is not None and options.amp not in DTYPES:
        raise ValueError(f"amp: expected one of {', '.join(DTYPES)}, got {options.amp!r}")
    if not options.evaluate and not options.resume and (options.folder() / trainer.CHECKPOINT).exists():
        raise ValueError(f"out: {options.folder()} holds a training already; go on with --resume or choose another")


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Every batch has the same shape, so that the search for the fastest convolution pays; but it may choose anew.
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class _Member(NamedTuple):
    """A network by its name, what its images go through, and the file of its weights if it has been read from one."""

    name: str
    network: Network
    augment: Augment
    file: Path | None = None


class _Setting:
    """Data, networks and how images are read: what training and testing share."""

    def __init__(self, options: TrainOptions, here: World) -> None:
        self.options, self.here = options, here
        self.recipe = options.chosen_recipe()
        self.data = self._open(here.main and options.download) if here.main else None
        here.wait()
        self.data = data = self.data or self._open(False)
        views(data.test, options.test)
        self.statistics = cache(lambda mean: measure(data.train, mean))
        trainer.seed_everything(options.seed)
        cores = os.cpu_count() or 1
        default = min(8, cores) if isinstance(data.train, Folder) else 0
        self.settings = trainer.Settings(
            seed=options.seed,
            amp=DTYPES[options.amp] if options.amp is not None else None,
            channels_last=options.channels_last,
            workers=default if options.workers is None else options.workers,
            augment_on_device=options.augment_on_device,
            graph=options.graph,
        )

    def _open(self, download: bool) -> Data:
        options = self.options
        return open_data(
            options.data, self.recipe.crop, root=options.data_dir, validation=options.validation, px=options.px,
            download=download,
        )  # fmt: skip

    def build(self, name: str, option: Mapping[str, Any]) -> Network:
        assert self.data is not None
        return build(
            name, classes=len(self.data.classes), channels=self.data.channels, fused=not self.options.plain,
            schedule=self.options.schedule, options=option,
        )  # fmt: skip

    def asked_for(self) -> _Member:
        """The network of --model, with random weights."""
        return self._member(self.options.model, known_options(self.options.option), self.recipe.mean)

    def read(self, path: Path) -> _Member:
        """The network whose weights are in ``path``: a checkpoint says which, a state_dict is of that of --model."""
        weights = checkpoint.read_weights(path)
        member = self.asked_for() if weights.config is None else self._member(*self._told(path, weights.config))
        weights.give(member.network.model)
        return member._replace(file=path)

    def _told(self, path: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], Any]:
        """Name and options of the network of a checkpoint, and the mean that it was trained with."""
        name, option, how = (config.get(key) for key in ("model", "option", "recipe"))
        mean = how.get("mean") if isinstance(how, Mapping) else None
        if not (isinstance(name, str) and isinstance(option, Mapping) and mean in ("pixel", "channel")):
            raise ValueError(
                f"weights: {path}: config: expected model, option and recipe.mean, got {name!r}, {option!r}, {mean!r}"
            )
        if (":" in name or name.endswith(".py")) and name != self.options.model:
            # A file of weights is not to choose which file's code is run.
            raise ValueError(f"weights: {path} is of a network in a file; expected --model {name} together with it")
        return name, option, mean

    def _member(self, name: str, option: Mapping[str, Any], mean: Literal["pixel", "channel"]) -> _Member:
        data, network = self.data, self.build(name, option)
        assert data is not None
        augment = Augment(
            self.statistics(mean),
            data.train.crop if isinstance(data.train, Folder) else self.recipe.crop,
            background=data.background,
            channels=network.channels if network.channels != data.channels else None,
        )
        return _Member(name, network, augment)

    def evaluator(self, source: Any, kind: str, augment: Augment) -> Evaluator:
        return Evaluator(
            source, augment, self.here, batch=self.recipe.batch, workers=self.settings.workers, kind=kind,
            channels_last=self.options.channels_last, autocast=lambda: self.settings.autocast(self.here.device),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """What decides on the numbers of a training, and must not change when it is resumed."""
        assert self.data is not None
        options = self.options
        return {
            "model": options.model,
            "option": known_options(options.option),
            "plain": options.plain,
            "schedule": options.schedule,
            "data": options.data.partition(":")[0],
            "classes": len(self.data.classes),
            "images": len(self.data.train.labels),
            "validation": options.validation,
            "px": options.px,
            "recipe": asdict(self.recipe),
            "seed": options.seed,
            "amp": options.amp,
            "channels_last": options.channels_last,
            "augment_on_device": options.augment_on_device,
            "processes": self.here.size,
        }

    def explain(self, member: _Member) -> memory.DoesNotFit:
        """Why there was not enough memory to train it."""
        images = member.augment(self.data.train.fetch(torch.arange(1), None), None)  # type: ignore[union-attr]
        _, C, H, W = images.shape
        share = self.recipe.batch // self.here.size
        return memory.DoesNotFit(
            memory.explanation(
                lambda: self.asked_for().network.model, (C, H, W), share, self.here.device, amp=self.settings.amp
            )
        )


def _train(options: TrainOptions, here: World, console: Console) -> int:
    setting = _Setting(options, here)
    data, chosen = setting.data, setting.recipe
    assert data is not None
    member = setting.asked_for()
    for path in options.weights:
        checkpoint.read_weights(path).give(member.network.model)
    folder = options.folder()
    held_out, source = ("validation", data.validation) if data.validation is not None else ("test", data.test)
    evaluator = setting.evaluator(source, "single", member.augment)
    training = trainer.Trainer(
        member.network.model, chosen, data.train, evaluator, member.augment, here,
        setting.settings, config=setting.config(), folder=folder, validation=data.validation is not None,
    )  # fmt: skip
    if options.resume:
        path = folder / trainer.CHECKPOINT
        training.resume(checkpoint.load(path), str(path))
    if here.main:
        _make(folder)
    console.print(_headline(options, setting, training))
    title = f"{options.model} on {options.data}, {'plain' if options.plain else 'fused'}, recipe {chosen.name}"
    with (
        Logs(
            folder if here.main else None, title, training.rate.total, held_out,
            console=console, tensorboard=options.tensorboard, start=training.step,
        ) as logs,
        stopping(patient=here.size > 1) as wish,
    ):  # fmt: skip
        try:
            training.run(logs, wish)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise setting.explain(member) from error
        finally:
            evaluator.close()
    if here.main:
        checkpoint.write(folder / "model.pt", training.model.state_dict())
    if source is not data.test or options.test != "single":
        _test(options, setting, [member], console)
    else:
        last = training.history[-1]
        _report(console, "test (single)", Result(last.held_out_loss, last.held_out_error, last.held_out_error5))
    console.print(f"best {held_out} error {training.best:.2%}; weights, log and curves: {folder.resolve()}")
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: the folder {folder} can not be made: {error}") from error


def _headline(options: TrainOptions, setting: _Setting, training: trainer.Trainer) -> str:
    assert setting.data is not None
    chosen = setting.recipe
    weights = sum(parameter.numel() for parameter in training.model.parameters())
    length = f"{training.rate.total} steps of {chosen.batch} images"
    here = f"{setting.here.size} processes on {setting.here.device.type}" if setting.here.size > 1 else (
        f"{setting.here.device}, {torch.get_num_threads()} threads" if setting.here.device.type == "cpu"
        else torch.cuda.get_device_name(setting.here.device)
    )  # fmt: skip
    started = f"resumed at step {training.step}, " if training.step else ""
    return (
        f"{options.model} ({'plain' if options.plain else 'fused'}, {weights / 1e6:.2f} M parameters) on"
        f" {len(setting.data.train.labels)} images of {options.data}, recipe {chosen.name} ({chosen.source}):"
        f" {started}{length}, seed {options.seed}, {here}, torch {torch.__version__}"
    )


def _report(console: Console, what: str, result: Result) -> None:
    console.print(
        f"{what}: loss {result.loss:.4f}, error {result.error:.2%}, accuracy {1 - result.error:.2%},"
        f" top-5 error {result.error5:.2%}"
    )


def _evaluate(options: TrainOptions, here: World, console: Console) -> int:
    setting = _Setting(options, here)
    _test(options, setting, [setting.read(path) for path in options.weights], console)
    return 0


def _test(options: TrainOptions, setting: _Setting, members: Sequence[_Member], console: Console) -> None:
    """Report on each, and where there are several on the ensemble: the mean of the probabilities that they give."""
    assert setting.data is not None
    what = f"test ({options.test})"
    if options.test == "multi-scale":
        torch.backends.cudnn.benchmark = False  # nearly every image is of another shape
    scores: list[Scores] = []
    for member in members:
        evaluator = setting.evaluator(setting.data.test, options.test, member.augment)
        scores.append(_scores(setting, member.network.model, evaluator))
        title = what if len(members) == 1 else f"{member.file}, {member.name}: {what}"
        _report(console, title, evaluator.result(scores[-1]))
    if len(members) > 1:
        _report(console, f"ensemble of {len(members)}: {what}", evaluator.result(mean_of_scores(scores)))


def _scores(setting: _Setting, model: torch.nn.Module, evaluator: Evaluator) -> Scores:
    model = model.to(setting.here.device)
    if setting.settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    try:
        scores = evaluator.scores(model)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        message = f"testing {setting.recipe.batch} images at a time does not fit into memory; try a smaller --batch"
        raise memory.DoesNotFit(message) from error
    finally:
        evaluator.close()
    assert scores is not None  # nobody wished to stop
    return scores
