"""A process that tunes on a made-up clock: ``python -m tests.tuning.process FOLDER STAGE SECONDS``.

At measurement number ``STAGE`` it kills itself as ``kill -9`` does; every measurement takes ``SECONDS``. It prints how
many measurements it made, and the plan's file.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fusedres.plan.gpus import GPUS
from fusedres.runtime import plans
from fusedres.tuning.tune import tuned_on
from tests.tuning.bench import FakeBench, FakeBlock

BLOCKS = [FakeBlock("stem"), FakeBlock("layer1.0"), FakeBlock("layer1.1", 5), FakeBlock("layer2.0")]
GPU = GPUS["h100"]


def main(folder, stage, seconds):
    made = 0

    def at(what):
        nonlocal made
        made += 1
        if made == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)

    bench = FakeBench(BLOCKS, 7, interference=2.0, at=at)
    path = Path(folder) / "plan.json"
    with plans.locked(path):
        found = tuned_on("model", BLOCKS, bench, GPU, path)
    print(made, found.path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
