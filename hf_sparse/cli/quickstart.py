"""The command ``hf-sparse quickstart``."""

from __future__ import annotations

import argparse

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import MODEL_HELP, quiet
from hf_sparse.texts import EMBEDDED


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command; all others are the training application's."""
    parser.add_argument("--model", metavar="MODEL", default=EMBEDDED, help=f"{MODEL_HELP} (the default)")
    parser.add_argument(
        "--dataset",
        metavar="ID",
        help="text: a Hub id, a local file or folder, or 'tiny', the documentation of the running Python; "
        "default: tiny for the embedded model, allenai/c4 for others",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="a new or empty folder; default: runs/quickstart, or runs/quickstart-2, ... if it is there",
    )


def run(arguments: argparse.Namespace) -> int:
    """Go the whole road."""
    quiet()
    from hf_sparse.quickstart import quickstart

    given = {name: getattr(arguments, name) for name in ("model", "dataset", "output")}
    quickstart(**given, training=arguments.rest)
    return 0


COMMAND = Command(
    text="The whole road: measure, patch, finetune, save, reload, measure and time.",
    example="hf-sparse quickstart\n"
    "  hf-sparse quickstart --model HuggingFaceTB/SmolLM2-135M --dataset ./my-texts --max-steps 100\n\n"
    "Options that are not listed go to the training application (hf-sparse finetune --help).",
    add_options=add_options,
    run=run,
    passes_on=True,
)
