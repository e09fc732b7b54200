"""`fusedres bench`: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedres.arguments import names, positive
from fusedres.commands.model_names import RULE, say_whose

DESCRIPTION = """Correctness gate first, then times: every contender is held against fp64 before it is measured, and
one that is wrong has no figures. Contenders take turns; medians with 20 % and 80 % quantiles are shown. Lists are
separated by commas."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "bench",
        help="correctness first, then throughput and memory of eager, torch.compile, fused: table, CSV, pictures",
        description=DESCRIPTION,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--model", type=names, default=(), help=RULE)
    what.add_argument("--block", type=names, default=(), help="blocks by stage, such as bottleneck2_down; or all")
    what.add_argument("--op", type=names, default=(), help="ops by stage, such as block_end.stage2; or all")
    what.add_argument("--contenders", type=names, help="such as eager,compile,fused; all; or ladder, for every rung")
    what.add_argument("--train", action="store_true", help="only the training step (default: both)")
    what.add_argument("--infer", action="store_true", help="only inference")
    what.add_argument("--dtype", type=names, help="some of fp32,tf32,fp16,bf16 (default: bf16 on a GPU, else fp32)")
    what.add_argument("--batch", type=positive, help="images (default: 64 or 128 on a GPU, else few)")
    what.add_argument("--px", type=positive, help="height and width of the images (default: the case's own)")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>, vgpu:<target>")
    what.add_argument("--quick", action="store_true", help="a first impression in two minutes of a CPU")
    what.add_argument("--list", action="store_true", help="print every case and contender, and stop")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--rounds", type=positive, help="measured rounds (default: 20 on a GPU, else 7)")
    how.add_argument("--seconds", type=positive, help="begin no round after as many seconds of measuring a comparison")
    how.add_argument("--threads", type=positive, help="CPU threads (PyTorch decides if not given)")
    how.add_argument("--gate-only", action="store_true", help="check the numbers and time nothing")
    out = parser.add_argument_group("where to write")
    out.add_argument("--csv", type=Path, metavar="FILE", help="every row, written as it is finished")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="speed-ups, roofline, memory")
    out.add_argument("--html", type=Path, metavar="FILE.html", help="one page with everything that needs no network")
    out.add_argument("--resume", action="store_true", help="keep the rows of an earlier run's CSV, run what is missing")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extras [cli] and [models].
    from fusedres.bench import session

    given = {name: getattr(options, name) for name in session.BenchOptions.__dataclass_fields__}
    say_whose(options.model)
    return session.run(session.BenchOptions(**given))
