"""The arguments of ``fusedres bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres_cli import options
from fusedres_cli.values import dtypes, names, positive

DESCRIPTION = """Correctness gate first, then times: every contender is held against fp64 before it is measured, and
one that is wrong has no figures. Contenders take turns; medians with 20 % and 80 % quantiles are
shown. Lists are separated by commas."""
EXAMPLES = """examples:
  fusedres bench --quick                   a first impression in two minutes
  fusedres bench resnet50 --train -b 256 --contenders eager,compile,fused
  fusedres bench --block all --infer --html bench.html
  fusedres bench resnet50 --contenders eager,fused --compare HEAD~1
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``fusedres``."""
    parser = commands.add_parser(
        "bench",
        help="correctness first, then throughput and memory of eager, torch.compile, fused: table, CSV, pictures",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what to run")
    options.models(what)
    what.add_argument("--block", type=names, default=(), help="blocks by stage, such as bottleneck2_down; or all")
    what.add_argument("--op", type=names, default=(), help="ops by stage, such as block_end.stage2; or all")
    what.add_argument("--contenders", type=names, help="such as eager,compile,fused; all; or ladder, for every rung")
    what.add_argument("--train", action="store_true", help="only the training step (default: both)")
    options.infer(what, "only inference")
    what.add_argument(
        "--dtype", "--amp-dtype", type=dtypes, help="some of fp32,tf32,fp16,bf16 (default: bf16 on a GPU, else fp32)"
    )
    options.batch(what, help="images (default: 64 or 128 on a GPU, else few)")
    options.px(what, help="of the images (default: the case's own)")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>, vgpu:<target>")
    what.add_argument("--quick", action="store_true", help="a first impression in two minutes of a CPU")
    what.add_argument("--list", action="store_true", help="print every case and contender, and stop")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--rounds", type=positive, metavar="N", help="measured rounds (default: 20 on a GPU, else 7)")
    how.add_argument(
        "--seconds", type=positive, metavar="N", help="begin no round after as many seconds of measuring a comparison"
    )
    options.threads(how)
    how.add_argument("--compare", metavar="COMMIT", help="this source tree beside another commit of it, in turns")
    how.add_argument("--gate-only", action="store_true", help="check the numbers and time nothing")
    out = parser.add_argument_group("where to write")
    out.add_argument("--csv", type=Path, metavar="FILE.csv", help="every row, written as it is finished")
    options.picture(out, help="speed-ups, roofline, memory")
    out.add_argument("--html", type=Path, metavar="FILE.html", help="one page with everything that needs no network")
    out.add_argument("--resume", action="store_true", help="keep the rows of an earlier run's CSV, run what is missing")
