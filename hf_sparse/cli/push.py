"""The command ``hf-sparse push``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import MODEL_HELP, add_model, load


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser, f"a patched model: {MODEL_HELP}")
    parser.add_argument("repo_id", metavar="REPO", help="where to, such as me/llama-relu; made if need be")
    report = "what `hf-sparse measure MODEL --json FILE` wrote, for the card"
    parser.add_argument("--report", metavar="FILE", type=Path, help=report)
    parser.add_argument("--before", metavar="FILE", type=Path, help="the same of the dense model")
    parser.add_argument("--evaluated-on", metavar="TEXT", help="what it was measured on: a Hub id, or words")
    parser.add_argument("--speed", metavar="TEXT", help="what was measured, with the conditions")
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="of the training, YAML")
    parser.add_argument("--base-model", metavar="ID", help="the Hub id of the model it was made from")
    parser.add_argument("--datasets", metavar="ID", nargs="+", help="Hub ids of what it was trained on")
    parser.add_argument("--revision", metavar="BRANCH", help="made if need be; default: the main one")
    parser.add_argument("--private", action="store_true", help="for a repository that is made now")


def run(arguments: argparse.Namespace) -> int:
    """Push the model, with its tokenizer."""
    import hf_sparse

    reports: dict[str, Any] = {
        name: hf_sparse.SparsityReport.from_json(path)
        for name in ("report", "before")
        if (path := getattr(arguments, name)) is not None
    }
    names = ("evaluated_on", "speed", "recipe", "base_model", "datasets", "revision")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    model, tokenizer = load(arguments.model)
    private = True if arguments.private else None
    url = hf_sparse.push_to_hub(
        model, arguments.repo_id, tokenizer=tokenizer, private=private, **reports, **given
    )
    print(f"pushed: {url}")
    return 0


COMMAND = Command(
    text="Push a patched model to the Hub, with a model card of what it is and what was measured.",
    example="hf-sparse push ./llama-relu me/llama-relu --report after.json --before dense.json",
    add_options=add_options,
    run=run,
)
