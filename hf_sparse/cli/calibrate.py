"""The command ``hf-sparse calibrate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_sparse.calibration.best import BEST
from hf_sparse.calibration.search import methods
from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, add_text, load, passing, require_empty, texts
from hf_sparse.texts import EMBEDDED, training_texts

_CHARACTERS = 8
"""Of text for a token, which is plenty."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_text(parser, "default: documentation of the running Python", 65_536, split="training")
    parser.set_defaults(dataset=EMBEDDED)
    parser.add_argument(
        "--method",
        choices=(*methods(), BEST),
        default="teal",
        help=f"default: teal; {BEST}: each that suits the model is tried",
    )
    parser.add_argument(
        "--allocation", choices=("uniform", "greedy"), default="uniform", help="of teal and wina"
    )
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument(
        "--target-sparsity",
        type=float,
        metavar="S",
        help=f"a share, as 0.5, of what the method prunes; with {BEST} of the weights",
    )
    aim.add_argument(
        "--max-perplexity-increase", type=float, metavar="P", help="in percent: as sparse as that allows"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to save; without it nothing is saved"
    )


def run(arguments: argparse.Namespace) -> int:
    """Calibrate the model and save it."""
    import hf_sparse

    if arguments.output is not None:
        require_empty(arguments.output)
    model, tokenizer = load(arguments.model)
    report = hf_sparse.calibrate(
        model,
        _enough(texts(arguments, of=training_texts), arguments.max_tokens),
        method=arguments.method,
        allocation=arguments.allocation,
        target_sparsity=arguments.target_sparsity,
        max_perplexity_increase=arguments.max_perplexity_increase,
        tokenizer=tokenizer,
        **passing(arguments),
    )
    print(report)
    if arguments.json is not None:
        report.to_json(arguments.json)
    if arguments.output is None:
        print("nothing was saved; give --output DIR", file=sys.stderr)
        return 0
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")
    return 0


def _enough(found: Iterable[Any], tokens: int) -> list[Any]:
    """As many of the texts as ``tokens`` can be made of: a data set may be streamed, and has no end."""
    kept: list[Any] = []
    size = 0
    for text in found:
        kept.append(text)
        size += len((text.get("text") if isinstance(text, dict) else text) or "")
        if size >= _CHARACTERS * tokens:
            break
    return kept


COMMAND = Command(
    text="Make a model sparse without training: thresholds on its activations, chosen on a text.",
    example="hf-sparse calibrate meta-llama/Llama-3.2-1B --target-sparsity 0.5 --dataset allenai/c4 "
    "--dataset-config en --output ./llama-teal",
    add_options=add_options,
    run=run,
)
