"""The `fusedres` command.

Exit status: 0 all is well, 1 a check failed or a package is missing, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from fusedres.bench import command as bench
from fusedres.doctor import add_doctor
from fusedres.explain import command as explain
from fusedres.offline import Unavailable
from fusedres.studies.command import add_study
from fusedres.train.command import add_train, seed

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except ValueError as error:
        print(f"fusedres {options.command}: error: {error}", file=sys.stderr)
        return 2
    except Unavailable as error:
        print(f"fusedres {options.command}: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"fusedres {options.command}: error: {error}", file=sys.stderr)
        print(
            "the command line needs more packages than the library: pip install fusedres[cli,models]",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"fusedres {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedres", description="Residual networks in PyTorch that move fewer bytes.")
    parser.add_argument("--version", action="version", version=f"fusedres {version('fusedres')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on real digits, plain and fused side by side, and check torchvision's resnet50",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_positive, default=16)
    demo.add_argument("--batch", type=_positive, default=64)
    demo.add_argument("--seed", type=seed, default=0)
    demo.add_argument("--out", type=Path, default=Path("fusedres-demo.png"), metavar="FILE.png")
    demo.add_argument("--threads", type=_positive, help="CPU threads (PyTorch decides if not given)")
    demo.add_argument("--px", type=int, default=8, help="height and width the digits are scaled to")
    demo.add_argument("--schedule", default="auto", help="schedule of the fused models")
    demo.add_argument("--min-accuracy", type=_fraction, default=0.97, help="test accuracy below this fails")
    demo.add_argument(
        "--resnet50", action=argparse.BooleanOptionalAction, default=True, help="check torchvision's resnet50"
    )
    demo.set_defaults(run=_demo)

    explain.add_parser(commands)

    compile_ = commands.add_parser(
        "compile",
        help="compile the kernels that models launch, for GPUs that need not be here, and report on the binaries",
        description="Records the kernels that training and inference of the models launch, on every schedule, and "
        "compiles them into Triton's cache. Lists are separated by commas.",
    )
    compile_.add_argument(
        "--report", action="store_true", help="read the binaries, hold them to budgets, print a table"
    )
    compile_.add_argument(
        "--every-tile", action="store_true", help="with every tile that the plan lists, not the default alone"
    )
    compile_.add_argument("--targets", type=_names, help="such as sm_90,gfx942 (default: all)")
    compile_.add_argument("--models", type=_names, help="such as resnet50 (default: all that are known)")
    compile_.add_argument("--dtypes", type=_names, help="some of bf16,fp16,fp32 (default: all)")
    compile_.add_argument("--jobs", type=_positive, help="processes (default: as many as there are cores)")
    compile_.add_argument("--csv", type=Path, metavar="FILE", help="write the report's figures there too")
    compile_.set_defaults(run=_compile)

    bench.add_parser(commands, names=_names, positive=_positive)
    add_train(commands)
    add_study(commands)
    add_doctor(commands)
    return parser


def _demo(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    from fusedres.train import demo

    return demo.run(
        demo.DemoOptions(
            epochs=options.epochs,
            batch=options.batch,
            seed=options.seed,
            out=options.out,
            threads=options.threads,
            px=options.px,
            schedule=options.schedule,
            min_accuracy=options.min_accuracy,
            resnet50=options.resnet50,
        )
    )


def _compile(options: argparse.Namespace) -> int:
    # Imported here, since it needs the packages of the extra [cli].
    from fusedres import compilation

    chosen = {name: getattr(options, name) for name in ("targets", "models", "dtypes", "jobs", "csv")}
    given = {name: value for name, value in chosen.items() if value is not None}
    return compilation.run(compilation.CompileOptions(options.report, options.every_tile, **given))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _positive(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
