"""The `fusedres` command: its parser, and what becomes of what a subcommand raises.

Exit status: 0 all is well, 1 a check failed or a package is missing, 2 a wrong argument, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from fusedres_cli import bench, calibrate, compile, coverage, demo, doctor, explain, predict, study, train, tune

COMMANDS = (demo, explain, predict, tune, compile, bench, calibrate, train, study, coverage, doctor)
EPILOG = """examples:
  fusedres demo                           digits, plain and fused side by side
  fusedres explain resnet50 --gpu a100    what a GPU would gain, without one
  fusedres doctor resnet50                what is fused of a model, why not all
  fusedres bench resnet50 --train         is it faster here?

"fusedres COMMAND --help" says more. For completion of commands and options:
eval "$(fusedres --print-completion bash)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    every = parser()
    options, unknown = _parse(every, given)
    if options.command is None:
        every.print_help()
        return 2
    if unknown:
        _commands(every)[options.command].refuse(unknown)
    return _run(options)


def parser() -> Parser:
    """The parser of the whole command."""
    every = Parser(prog="fusedres", description="Residual networks in PyTorch that move fewer bytes.", epilog=EPILOG)
    every.add_argument("--version", action=_Version, nargs=0, help="print the version, and stop")
    every.add_argument(
        "--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), metavar="SHELL",
        help="print what bash, zsh or tcsh is to evaluate to complete commands and options, and stop",
    )  # fmt: skip
    commands = every.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return every


def _parse(every: Parser, given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    names = _commands(every)
    if given and not given[0].startswith("-") and given[0] not in names:
        every.error(f"{given[0]!r} is no command{near(given[0], names)}; those are {', '.join(names)}")
    return every.parse_known_args(given)


def _commands(every: Parser) -> dict[str, Parser]:
    (found,) = (action.choices for action in every._actions if isinstance(action, argparse._SubParsersAction))
    return found


def _run(options: argparse.Namespace) -> int:
    """The command's own status, or that of what it raised."""
    said = f"fusedres {options.command}:"
    try:
        # The first that imports PyTorch.
        return importlib.import_module(f"fusedres.commands.{options.command}").run(options)
    except ValueError as error:
        print(f"{said} error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"{said} error: {error}", file=sys.stderr)
        print("commands need more packages than the library: pip install fusedres[cli,models]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{said} interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from fusedres.compiler.targets import Unavailable

        if not isinstance(error, Unavailable):
            raise
        print(f"{said} error: {error}", file=sys.stderr)
        return 1


def near(word: str, known: Iterable[str]) -> str:
    """``", did you mean ...?"`` where a known word is like the one that was given, else nothing."""
    found = difflib.get_close_matches(word, known, n=2)
    return f", did you mean {' or '.join(found)}?" if found else ""


class Help(argparse.HelpFormatter):
    """Examples as they are written; each default at the end of its option's help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.default not in (None, False, (), []) and action.default is not argparse.SUPPRESS
        if not told or not action.option_strings or "default" in text:
            return text
        default = ",".join(map(str, action.default)) if isinstance(action.default, tuple) else action.default
        return f"{text} (default: {default})".replace("%", "%%").strip()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All names of an option, and its value once, as from Python 3.13 on."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """With one form of help, no abbreviations, and a near miss suggested for an option that is none."""

    def __init__(self, **given: Any) -> None:
        super().__init__(formatter_class=Help, allow_abbrev=False, **given)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with the message on arguments that were left over."""
        word = unknown[0].partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        self.error(f"no argument {word}{near(word, known)}")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"fusedres {version('fusedres')}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, *__: Any) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.exit(1, "fusedres: error: completion needs shtab: pip install fusedres[cli]\n")
        print(shtab.complete(parser, shell))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
