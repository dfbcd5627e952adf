"""The command ``hf-sparse patch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse.activations.config import ACTIVATIONS
from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, load, require_empty
from hf_sparse.config import SparsityConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="default: relu")
    parser.add_argument("--threshold", type=float, metavar="T", help="of fatrelu and cats_..., at least 0")
    parser.add_argument("--shift", type=float, metavar="B", help="of shifted_relu")
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="blocks to patch; default: all")
    parser.add_argument("--include", nargs="+", metavar="P", help='the same by name, as "*.layers.[0-3].*"')
    parser.add_argument(
        "--exclude", nargs="+", metavar="P", help="patterns on names of blocks to leave as is"
    )
    named = "of a model made of several, such as vision; default: text"
    parser.add_argument("--part", default="text", metavar="NAME", help=named)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to save; without it nothing is saved"
    )


def run(arguments: argparse.Namespace) -> int:
    """Patch the model and save it."""
    import hf_sparse

    given = {"threshold": arguments.threshold, "shift": arguments.shift, "layers": arguments.layers}
    fields = {name: value for name, value in given.items() if value is not None}
    config = SparsityConfig.read(arguments.activation, **fields)
    if arguments.output is not None:
        require_empty(arguments.output)
    model, tokenizer = load(arguments.model)
    chosen = {name: getattr(arguments, name) for name in ("part", "include", "exclude")}
    print(hf_sparse.patch(model, config, **chosen))
    if arguments.output is None:
        print("nothing was saved; give --output DIR")
        return 0
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")
    return 0


COMMAND = Command(
    text="Replace the activation of a model's MLP blocks and save the patched model.",
    example="hf-sparse patch meta-llama/Llama-3.2-1B --activation relu --output ./llama-relu",
    add_options=add_options,
    run=run,
)
