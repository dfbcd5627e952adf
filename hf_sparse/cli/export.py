"""The command ``hf-sparse export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, load
from hf_sparse.exporting import FORMATS


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    where = "a new or empty folder, or, of a GGUF file, its name"
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help=where)
    what = "dense, the default, is a checkpoint for transformers alone; gguf a file for llama.cpp"
    parser.add_argument("--format", choices=FORMATS, default="dense", help=what)
    ids = "write a GGUF file without a vocabulary, which runs on token ids"
    parser.add_argument("--no-vocabulary", action="store_true", help=ids)


def run(arguments: argparse.Namespace) -> int:
    """Export the model, with its tokenizer."""
    import hf_sparse

    if arguments.no_vocabulary and arguments.format != "gguf":
        raise ValueError(f"--no-vocabulary has no meaning with --format {arguments.format}.")
    model, tokenizer = load(arguments.model)
    tokenizer = None if arguments.no_vocabulary else tokenizer
    path = hf_sparse.export(model, arguments.output, format=arguments.format, tokenizer=tokenizer)
    print(f"saved in {path}")
    return 0


COMMAND = Command(
    text="Write a model for programs without this package: transformers alone, or llama.cpp.",
    example="hf-sparse export ./llama-relu --format gguf --output llama-relu.gguf",
    add_options=add_options,
    run=run,
)
