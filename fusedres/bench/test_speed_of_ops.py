"""pytest-benchmark's view of the ops: ``pytest fusedres/bench --benchmark-only``, with ``-k block_end`` for some.

Each has passed the gate before it is timed. On a GPU a round ends when the GPU has; between rounds L2 is overwritten.
``FUSEDRES_BENCH_DEVICE``, ``FUSEDRES_BENCH_DTYPE`` and ``FUSEDRES_BENCH_BATCH`` say where, in which format and on how
many images.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedres.bench.contenders import CONTENDERS, operands_of, own_copies
from fusedres.bench.gate import Gate
from fusedres.bench.ops import OPS, op
from fusedres.bench.session import CPU_BATCH
from fusedres.bench.setting import Setting, device_named
from fusedres.measure.timing import CudaClock

DEVICE = device_named(os.environ.get("FUSEDRES_BENCH_DEVICE", "auto"))
DTYPE = os.environ.get("FUSEDRES_BENCH_DTYPE", "bf16" if DEVICE.is_gpu else "fp32")
BATCH = os.environ.get("FUSEDRES_BENCH_BATCH")
ROUNDS, WARM_UP = 20, 3


def overwrite_cache() -> Callable[[], object]:
    if not DEVICE.is_gpu:
        return lambda: None
    buffer = CudaClock(DEVICE.torch, clear_cache=True).buffer
    assert buffer is not None
    return buffer.zero_


@pytest.mark.parametrize("contender", ["eager", "compile", "cudnn", "fused"])
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: Any, name: str, contender: str) -> None:
    case, who = op(name), CONTENDERS[contender]
    batch = int(BATCH) if BATCH else case.batch if DEVICE.is_gpu else CPU_BATCH["op"]
    setting = Setting("op", DTYPE, batch, case.px, DEVICE)
    why = setting.why_not() or who.why_not(case, setting)
    if why is not None:
        pytest.skip(why)
    clear = overwrite_cache()
    with DEVICE.made_current(), setting.arithmetic(), who.backend(setting):
        operands = operands_of(case, setting, 0)
        eager = CONTENDERS["eager"].prepare(case, setting, own_copies(operands)).observe()
        step = who.prepare(case, setting, operands)
        verdict = Gate(case, setting).judge(who, step.observe(), eager)
        assert verdict.reason is None, verdict.reason
        benchmark.extra_info.update(device=DEVICE.name, dtype=DTYPE, batch=batch, error=verdict.error)
        benchmark.group = name

        def run() -> None:
            step.run()
            if DEVICE.is_gpu:
                torch.cuda.synchronize(DEVICE.torch)

        benchmark.pedantic(run, setup=lambda: clear() and None, rounds=ROUNDS, warmup_rounds=WARM_UP)
