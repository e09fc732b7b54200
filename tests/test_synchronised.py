"""Synchronised batch norms in fused passes: processes of gloo on the CPU against one process with the joined batch."""

import functools
import sys

import pytest
import torch

import fusedres
from tests.comparison import relative_error
from tests.synchronised import (
    NETWORKS,
    STEPS,
    counting,
    fused,
    in_group,
    in_processes,
    leave,
    network,
    norms_of,
    steps_of,
)
from tests.vgpu_support import needs_vgpu

RUNGS = ("block_end", "stats", "prologue", "moments")
# Name, rung, dtype, samples of each process.
CASES = [
    *((name, "auto", torch.float64, (3, 5)) for name in NETWORKS),
    *((name, "auto", torch.float32, (5, 3)) for name in ("bottleneck", "others")),
    *((name, rung, torch.float64, (2, 4)) for name in ("basic", "bottleneck") for rung in RUNGS),
    *((name, rung, torch.float64, (2, 4)) for name in ("preact", "dense") for rung in RUNGS[:3]),
    *((name, "moments", torch.float64, (4, 0)) for name in NETWORKS),
    *((name, "stats", torch.float64, (2, 0, 3)) for name in NETWORKS),
    ("bottleneck", "auto", torch.float32, (1, 4, 0)),
]


# A group of three takes as long to start as all else.
TESTED = [pytest.param(case, marks=pytest.mark.slow) if len(case[3]) > 2 else case for case in CASES]

# Executed by the processes, where there is no GPU.
ON_KERNELS = [
    ("basic", "stats", torch.float32, (1, 2)),
    ("bottleneck", "moments", torch.float32, (2, 1)),
    ("preact", "prologue", torch.float32, (0, 2)),
]


def work(rank: int, world: int, folder: str, backend: str = "auto") -> None:
    found = {}
    torch.backends.cudnn.allow_tf32 = False
    with in_group(rank, world, folder), fusedres.backend(backend):
        for name, rung, dtype, sizes in CASES if backend == "auto" else ON_KERNELS:
            if len(sizes) != world:
                continue
            model = fused(name, dtype, rung)
            with counting() as sent:
                steps = steps_of(model, rank, sizes, dtype, STEPS.get(rung, 1))
            found[name, rung, dtype, sizes] = {"steps": steps, "norms": norms_of(model), **sent}
    leave(found, rank, folder)


@functools.cache
def joined(name, dtype, sizes, steps):
    return steps_of(network(name, dtype), -1, sizes, dtype, steps)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes of a group of so many found."""
    if sys.platform != "linux" or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    return functools.cache(lambda world: in_processes(__name__, tmp_path_factory.mktemp("synchronised"), world))


def check(found, expected, tolerance):
    """Of every rank against one process: its share of outputs, the sum of gradients, each one's buffers."""
    # The gradient of a bias before a batch norm is 0, with the rounding of what it is summed of.
    least = 0.1 * max(whole.abs().max() for key, whole in expected.items() if key.startswith("grad"))
    for key, whole in expected.items():
        parts = [each[key] for each in found]
        if key.startswith(("z", "dx")):
            parts = [torch.cat(parts)]
        elif key.startswith("grad"):
            parts = [sum(parts)]
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{key} differs between processes"
        for part in parts:
            error = (part - whole).abs().max() / whole.abs().max().clamp_min(least if key.startswith("grad") else 1e-3)
            assert error <= tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_processes_equal_one_with_the_joined_batch(case, results):
    name, rung, dtype, sizes = case
    found = [each[case]["steps"] for each in results(len(sizes))]
    check(found, joined(name, dtype, sizes, STEPS.get(rung, 1)), 1e-10 if dtype == torch.float64 else 1e-5)


TOGETHER = {"basic": 2, "bottleneck": 2, "others": 1}
"""Pairs of batch norms that do not depend on each other: a projection's and another layer's, or two that are added."""


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_collectives_are_the_same_on_every_rank_and_rung(case, results):
    name, rung, _, sizes = case
    count = norms_of(network(name)) - TOGETHER.get(name, 0)
    expected = 2 * count * STEPS.get(rung, 1)
    assert [each[case]["collectives"] for each in results(len(sizes))] == [expected] * len(sizes)


@pytest.mark.slow
@needs_vgpu
def test_kernels_are_as_accurate_as_eager_on_the_joined_batch(tmp_path):
    found = in_processes(__name__, tmp_path, 2, "vgpu:sm_90")
    for case in ON_KERNELS:
        name, _, dtype, sizes = case
        exact, eager = (joined(name, of, sizes, 1) for of in (torch.float64, dtype))
        ours = [each[case]["steps"] for each in found]
        # As whole networks in one process are held to.
        for what, floor in {"z": 1e-6, "dx": 1e-5, "grad": 1e-5}.items():
            keys = [key for key in exact if key.startswith(what)]
            true, plain = (torch.cat([one[key].flatten().double() for key in keys]) for one in (exact, eager))
            join = sum if what == "grad" else torch.cat
            fused = torch.cat([join([one[key] for one in ours]).flatten().double() for key in keys])
            assert relative_error(fused, true) <= max(1.5 * relative_error(plain, true), floor), (case, what)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
