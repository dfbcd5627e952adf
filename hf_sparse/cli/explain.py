"""The command ``hf-sparse explain``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, add_text, load, passing, texts
from hf_sparse.texts import EMBEDDED


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_text(parser, "default: held-out documentation of the running Python", 8192)
    parser.set_defaults(dataset=EMBEDDED)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the account, and write it."""
    import hf_sparse

    model, tokenizer = load(arguments.model)
    options = {**passing(arguments), "tokenizer": tokenizer, "progress": sys.stderr.isatty()}
    report = hf_sparse.explain(model, texts(arguments), **options)
    print(report)
    if arguments.json:
        report.to_json(arguments.json)
    return 0


COMMAND = Command(
    text="Account for the density of each layer: flatness over input norm and activation gradient.",
    example="hf-sparse explain ./llama-relu --dataset allenai/c4",
    add_options=add_options,
    run=run,
)
