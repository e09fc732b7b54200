"""The arguments of ``fusedres doctor``."""

from __future__ import annotations

from typing import Any

from fusedres_cli import options

DESCRIPTION = """Says what is installed and what runs fused blocks on each device, and holds a fused block against
fp64 there. With MODEL it also says which of its blocks are fused, and why not the others."""
EXAMPLES = """examples:
  fusedres doctor
  fusedres doctor timm.resnet50d           what is fused of a model
  fusedres doctor --kernels                every kernel by itself, on a GPU
"""


def add_parser(commands: Any) -> None:
    """Add the command ``doctor`` to the subcommands of a parser."""
    parser = commands.add_parser(
        "doctor",
        help="versions and devices, what runs fused blocks on them and why, and whether it computes what it should",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    options.model(parser)
    parser.add_argument("--kernels", action="store_true", help="check every kernel by itself, too: a minute of a GPU")
    options.device(parser, "check this one alone: cpu, cuda, cuda:<index>, or vgpu:<target>")
