"""Launches of a ResNet-50 step whose times are made up: as a GPU with other constants would take."""

import functools
import math
import random
from dataclasses import replace

from fusedres.bench.launches import distinct, steps_on_paper
from fusedres.plan import calibrate
from fusedres.plan.gpus import GPUS

H100 = GPUS["h100"]
# All of them far from what the model has.
OTHER = {
    "rows": 0.70, "contractions": 0.65, "tensor_cores": 0.80, "l2": 0.70, "issue": 0.60, "latency": 900.0, "gap": 3e-6,
    "library.products": 0.60, "library.bandwidth": 0.80, "library.weight_gradient": 0.70, "library.rows": 0.90,
    "library.statistics": 0.60,
}  # fmt: skip
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "driver": "1", "torch": "2", "triton": "3", "cudnn": "9", "commit": "abc"}


@functools.cache
def rows():
    """Each launch of a fused and of an eager training step, batch 256, without a time."""
    steps = steps_on_paper("resnet50", 256, "bf16", H100)
    return [work.row for step, every in steps.items() for work in distinct(step, every, H100, MACHINE)]


def timed(constants=OTHER, *, noise=0.0, wrong=0.0):
    """The rows with times: a share of ``wrong`` ones three times too long."""
    other, drawn = replace(H100, measured=constants), random.Random(0)
    found = []
    for row in rows():
        seconds = calibrate.seconds_of(calibrate.read(row.work), other) * math.exp(drawn.gauss(0, noise))
        seconds *= 3 if drawn.random() < wrong else 1
        found.append(replace(row, measured_s=seconds, low_s=seconds, high_s=seconds))
    return found


def samples(constants=OTHER, **attributes):
    """The same to fit to, what both steps have in common once."""
    every = {row.key: row for row in timed(constants, **attributes) if row.known}
    return [calibrate.Sample(row.kind, calibrate.read(row.work), row.measured_s) for row in every.values()]
