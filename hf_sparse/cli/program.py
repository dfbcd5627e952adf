"""``hf-sparse``: its commands, and what a mistake looks like."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_sparse._version import __version__
from hf_sparse.cli import (
    calibrate,
    explain,
    export,
    finetune,
    generate,
    law,
    measure,
    patch,
    push,
    quickstart,
    tune,
)
from hf_sparse.cli.command import Command

_COMMANDS = (patch, calibrate, finetune, measure, explain, tune, law, generate, export, push, quickstart)
"""In the order of the help."""

_DESCRIPTION = """\
Make the MLPs of a language model activation-sparse, finetune it, measure it, and run it faster.

Try `hf-sparse quickstart` first: the whole road on an embedded model, in a few minutes, without a network."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None reads ``sys.argv``); returns the exit status, 2 for a mistake of the user."""
    arguments, rest = _parser().parse_known_args(argv)
    command: Command = arguments.command
    if rest and not command.passes_on:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return command.run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as mistake:
        if os.environ.get("HF_SPARSE_DEBUG"):
            raise
        print(f"hf-sparse: error: {_one_line(mistake)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description=_DESCRIPTION,
        epilog="HF_SPARSE_DEBUG=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-sparse {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        command: Command = module.COMMAND
        own = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=command.text,
            description=command.manual or command.text,
            epilog=f"example:\n  {command.example}",
            add_help=command.manual is None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(command=command)
        command.add_options(own)
    return parser


def _one_line(mistake: BaseException) -> str:
    return " ".join(str(mistake).split()) or type(mistake).__name__
