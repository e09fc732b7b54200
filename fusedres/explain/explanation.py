"""What each rung of the ladder moves, computes and keeps, beside eager PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedres.compiler.targets import TARGETS
from fusedres.explain.step import Step, Twins, check_images, run_step
from fusedres.models.sources import Size, Source, source
from fusedres.patterns.choose import AUTO, CHOSEN
from fusedres.plan.gpus import Gpu, gpu_named
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.launch import tf32_allowed
from fusedres.traffic.account import Entry, bytes_by_kind
from fusedres.traffic.predict import prediction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EAGER = "eager"


@dataclass(frozen=True)
class Question:
    """What is to be explained.

    Attributes:
        model: as in `models.source`.
        batch: images of a step.
        dtype: a key of `DTYPES`; 16 bits by autocast, parameters in fp32.
        gpu: of `plan.gpus.GPUS`.
        rungs: of the ladder, or ``"auto"``; all of them if empty.
        infer: inference in place of a training step.
        size: (C, H, W) of an image, the model's own if None.
        images_grad: whether the images come from another block: in ``dtype``, and a gradient of them is asked for.
        cast: inference of a model whose parameters and images have ``dtype`` themselves, without autocast.
    """

    model: str
    batch: int = 256
    dtype: str = "bf16"
    gpu: str = "h100"
    rungs: tuple[str, ...] = ()
    infer: bool = False
    size: Size | None = None
    images_grad: bool = False
    cast: bool = False


@dataclass(frozen=True)
class Figures:
    """A step's figures, each for one image but ``launches`` and the prediction.

    Attributes:
        predicted_ms: milliseconds of the step by the model of `plan.time`: of the GPU, or of Python where that takes
            longer to start the launches.
        predicted_band_ms: the same by its optimistic and its pessimistic assumptions.
        roofline_images_per_s: a bound, which no step reaches.
    """

    bytes_per_image: float
    read_per_image: float
    written_per_image: float
    saved_bytes_per_image: float
    launches: int
    flops_per_image: float
    roofline_images_per_s: float
    predicted_ms: float
    predicted_band_ms: tuple[float, float]

    @classmethod
    def of(cls, entries: Sequence[Entry], saved: int, batch: int, seconds: float, gpu: Gpu) -> Figures:
        read, written = sum(entry.read for entry in entries), sum(entry.written for entry in entries)
        flops = sum(entry.flops for entry in entries)
        predicted = prediction([entry.work for entry in entries], gpu)
        optimistic, central, pessimistic = (1e3 * max(seconds, predicted.host) for seconds in predicted.band)
        return cls(
            (read + written) / batch, read / batch, written / batch, saved / batch, len(entries), flops / batch,
            batch / seconds if seconds else 0.0, central, (optimistic, pessimistic),
        )  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """The answer: a `Step` for eager PyTorch and for each rung.

    Attributes:
        question: what was asked, its size filled in.
        gpu: the one whose roofline is meant.
        eager: the plain model's step.
        rungs: the fused model's, by schedule.
        parameters: how many the model has.
    """

    question: Question
    gpu: Gpu
    eager: Step
    rungs: Mapping[str, Step]
    parameters: int

    @property
    def rate(self) -> float:
        """Floating-point operations per second of the roofline."""
        tf32 = tf32_allowed() and TARGETS[self.gpu.target].backend == "cuda"
        return self.gpu.rate(DTYPES[self.question.dtype], tf32=tf32)

    def seconds(self, entries: Iterable[Entry]) -> float:
        """The roofline: each launch takes the longer of moving its bytes and computing."""
        bandwidth, rate = self.gpu.bandwidth, self.rate
        return sum(max(entry.bytes / bandwidth, entry.flops / rate) for entry in entries)

    def figures(self, step: Step) -> Figures:
        return Figures.of(step.entries, step.saved, self.question.batch, self.seconds(step.entries), self.gpu)

    def alike(self, step: Step) -> int:
        """Launches that are predicted from the code of a binary like theirs."""
        return prediction([entry.work for entry in step.entries], self.gpu).alike

    @property
    def steps(self) -> dict[str, Step]:
        """Eager and the rungs, in the order of the ladder."""
        return {EAGER: self.eager, **self.rungs}

    def layers(self) -> dict[str, dict[str, Figures]]:
        """By layer, the figures of each step; what is saved is not told apart."""
        order = dict.fromkeys(entry.layer for step in self.steps.values() for entry in step.entries)
        table: dict[str, dict[str, Figures]] = {}
        for name in order:
            table[name] = {}
            for rung, step in self.steps.items():
                entries = [entry for entry in step.entries if entry.layer == name]
                table[name][rung] = Figures.of(entries, 0, self.question.batch, self.seconds(entries), self.gpu)
        return table

    def operations(self, step: Step) -> list[tuple[str, int, float, float]]:
        """(name, launches, bytes per image, share of the roofline) by kernel, the most bytes first."""
        count, moved, seconds = Counter[str](), Counter[str](), Counter[str]()
        for entry in step.entries:
            count[entry.name] += 1
            moved[entry.name] += entry.bytes
            seconds[entry.name] += self.seconds([entry])  # type: ignore[assignment]
        whole = sum(seconds.values()) or 1.0
        return [
            (name, count[name], total / self.question.batch, seconds[name] / whole)
            for name, total in moved.most_common()
        ]

    def reread_per_image(self) -> float:
        """Bytes by which eager's figure grows if both gradients of a convolution read the output's, as kernels do."""
        return sum(entry.reread for entry in self.eager.entries) / self.question.batch

    def sgd_per_image(self) -> float:
        """Bytes of SGD with momentum: parameter, gradient and momentum read, parameter and momentum written, fp32."""
        return 5 * 4 * self.parameters / self.question.batch

    def as_json(self) -> dict[str, Any]:
        """What ``fusedres explain --json`` prints."""
        question = self.question

        def described(step: Step) -> dict[str, Any]:
            kinds = {kind: total / question.batch for kind, total in bytes_by_kind(step.entries).items() if total}
            return {**vars(self.figures(step)), "bytes_per_image_by_kind": kinds, "launches_alike": self.alike(step)}

        choices = self.rungs[AUTO].choices if AUTO in self.rungs else {}
        chosen = {
            name: {"choice": c.schedule.name, "source": c.source, "reason": c.reason} for name, c in choices.items()
        }
        layers = []
        for name, by_rung in self.layers().items():
            figures = {
                rung: {
                    "bytes_per_image": f.bytes_per_image,
                    "launches": f.launches,
                    "flops_per_image": f.flops_per_image,
                    "predicted_ms": f.predicted_ms,
                }
                for rung, f in by_rung.items()
            }
            layers.append({"name": name, EAGER: figures.pop(EAGER), "rungs": figures, **chosen.get(name, {})})
        return {
            "model": question.model,
            "batch": question.batch,
            "dtype": question.dtype,
            "gpu": self.gpu.name,
            "gpu_scaled_from": self.gpu.alike,
            "mode": "inference" if question.infer else "training",
            "cast": question.cast,
            "size": list(question.size or ()),
            EAGER: described(self.eager),
            "rungs": {name: described(step) for name, step in self.rungs.items()},
            "layers": layers,
        }


def explain(
    question: Question, *, model: Source | None = None, tell: Callable[[str, int, int], None] | None = None
) -> Explanation:
    """Count a step of a model, eager and on each rung, on the meta device: nothing is computed.

    Args:
        question: what to explain.
        model: in place of the one that ``question.model`` names.
        tell: is called with words, how many steps are counted, and of how many, before each.

    Raises:
        ValueError: an unknown model, GPU, dtype or rung, a batch that is not positive, images that the model does not
            take, a model with nothing to fuse, or sizes beyond what kernels address, with the layer.
    """
    gpu = gpu_named(question.gpu)
    if question.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {question.dtype!r}")
    known = (*SCHEDULES, *CHOSEN)
    for rung in question.rungs:
        if rung not in known:
            raise ValueError(f"rung: expected all or one of {', '.join(known)}, got {rung!r}")
    if question.cast and not question.infer:
        raise ValueError("cast: expected False for a training step, whose parameters are fp32, got True")
    if question.batch < 1:
        raise ValueError(f"batch: expected at least 1, got {question.batch}")
    found = (model or source(question.model)).of_images()
    size = question.size or found.size
    network = found.on_meta()
    if question.cast:
        network.to(DTYPES[question.dtype])
    twins = Twins.of(network)
    arriving = DTYPES[question.dtype] if question.images_grad or question.cast else torch.float32
    images = torch.empty(question.batch, *size, dtype=arriving, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    check_images(twins.plain, images, infer=question.infer)

    wanted = (None, *(question.rungs or (*SCHEDULES, AUTO)))
    steps: dict[str | None, Step] = {}
    for name in wanted:
        if tell is not None:
            tell(f"counting {name or EAGER}", len(steps), len(wanted))
        steps[name] = run_step(
            twins, images, name, gpu=gpu, dtype=DTYPES[question.dtype], infer=question.infer,
            images_grad=question.images_grad, cast=question.cast,
        )  # fmt: skip
    rungs = {rung: step for rung, step in steps.items() if rung is not None}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Explanation(Question(**{**vars(question), "size": tuple(size)}), gpu, steps[None], rungs, parameters)
