"""The command ``hf-sparse export``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_sparse.exporting import FORMATS


def add_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help=model_help)
    where = "a new or empty folder, or, of a GGUF file, its name"
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help=where)
    what = "dense, the default, is a checkpoint for transformers alone; gguf a file for llama.cpp"
    parser.add_argument("--format", choices=FORMATS, default="dense", help=what)
    ids = "write a GGUF file without a vocabulary, which runs on token ids"
    parser.add_argument("--no-vocabulary", action="store_true", help=ids)


def run(arguments: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> int:
    """Export what ``load`` gives for the model, with its tokenizer."""
    import hf_sparse

    if arguments.no_vocabulary and arguments.format != "gguf":
        raise ValueError(f"--no-vocabulary has no meaning with --format {arguments.format}.")
    model, tokenizer = load(arguments.model)
    tokenizer = None if arguments.no_vocabulary else tokenizer
    print(
        f"saved in {hf_sparse.export(model, arguments.output, format=arguments.format, tokenizer=tokenizer)}"
    )
    return 0
