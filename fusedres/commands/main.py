"""The `fusedres` command.

Exit status: 0 all is well, 1 a check failed or a package is missing, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from fusedres.commands import bench, calibrate, compile, coverage, demo, doctor, explain, predict, study, train, tune
from fusedres.compiler.targets import Unavailable


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

    for command in (demo, explain, predict, tune, compile, bench, calibrate, train, study, coverage, doctor):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
