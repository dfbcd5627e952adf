"""The command ``hf-sparse law``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse.cli.command import Command


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    what = "output folder of a run, its log.jsonl, or a .json of docs/results"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=what)
    form = "of the law: relu falls, silu rises; auto, the default, takes the nearer one"
    parser.add_argument("--form", choices=("auto", "relu", "silu"), default="auto", help=form)
    kind = "records of a log to take; default: eval, on held-out text"
    parser.add_argument("--kind", choices=("eval", "train"), default="eval", help=kind)
    where = "runs of a .json to take, such as variant=relu"
    parser.add_argument("--where", metavar="FIELD=VALUE", nargs="+", default=(), help=where)
    tokens = "also predict the activation ratio after so many training tokens, such as 1e10"
    parser.add_argument("--tokens", type=float, metavar="N", nargs="+", default=(), help=tokens)
    share = "of the intervals; default: 0.95"
    parser.add_argument("--confidence", type=float, default=0.95, metavar="S", help=share)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the law as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw it (png, svg, pdf)")


def run(arguments: argparse.Namespace) -> int:
    """Fit a law to the runs and print it."""
    from hf_sparse.laws import fit_sparsing_law

    law = fit_sparsing_law(
        *map(Path, arguments.runs),
        form=arguments.form,
        kind=arguments.kind,
        where=dict(map(_condition, arguments.where)) or None,
        confidence=arguments.confidence,
    )
    predictions = [law.predict(tokens) for tokens in arguments.tokens]
    print(law)
    for prediction in predictions:
        print(prediction)
    if arguments.json:
        law.to_json(arguments.json)
    if arguments.plot:
        law.plot(arguments.plot, tokens=max(arguments.tokens, default=None))
    return 0


def _condition(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--where {text!r} is no FIELD=VALUE.")
    return name, int(value) if value.isdecimal() else value


COMMAND = Command(
    text="Fit how sparsity changes with training tokens, and predict it for longer runs.",
    example="hf-sparse law runs/llama-relu --tokens 1e10 --plot law.svg",
    add_options=add_options,
    run=run,
)
