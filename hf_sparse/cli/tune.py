"""The command ``hf-sparse tune``."""

from __future__ import annotations

import argparse
import sys

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, add_text, load, passing, texts


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser, "a patched model: a Hub id or a local folder")
    add_text(parser, "default: none, and the table is for layers of unknown density", 4096)
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    parser.add_argument("--certify", action="store_true", help="measure what certificates add, too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    import hf_sparse

    model, tokenizer = load(arguments.model)
    if arguments.certify:
        hf_sparse.prepare(model, certify=True)
    options = {**passing(arguments), "tokenizer": tokenizer, "progress": sys.stderr.isatty()}
    print(hf_sparse.tune(model, texts(arguments), force=arguments.force, **options))
    return 0


COMMAND = Command(
    text="Measure on this machine when skipping is no slower than dense, and keep it for later runs.",
    example="hf-sparse tune ./llama-relu --dataset allenai/c4",
    add_options=add_options,
    run=run,
)
