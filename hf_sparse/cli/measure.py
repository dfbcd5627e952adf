"""The command ``hf-sparse measure``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, add_text, load, passing, texts
from hf_sparse.texts import EMBEDDED

_WRITTEN = ("json", "plot", "html", "markdown")
_TIMED_TOKENS = 4096
"""At most so many tokens for the densities of linear layers with thresholds."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_text(parser, "default: held-out documentation of the running Python", 32_768)
    parser.set_defaults(dataset=EMBEDDED)
    also = "what else to count, such as density and union: see docs/measuring.md"
    parser.add_argument("--metrics", metavar="NAME", nargs="+", default=(), help=also)
    cett = "also find how many neurons can be left out until perplexity is P %% higher (CETT-PPL-P %%)"
    parser.add_argument("--cett-ppl", metavar="P", type=float, help=cett)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report as JSON")
    plot = "also draw sparsity by layer (png, svg, pdf)"
    parser.add_argument("--plot", metavar="FILE", type=Path, help=plot)
    html = "also write a page with charts, one file that loads nothing"
    parser.add_argument("--html", metavar="FILE", type=Path, help=html)
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write that page as Markdown")
    before = "JSON of an earlier measurement, as of the dense model, for the pages and the plot"
    parser.add_argument("--before", metavar="FILE", type=Path, help=before)
    beside = "JSON of other measurements, for the pages' plot of sparsity against perplexity"
    parser.add_argument("--beside", metavar="FILE", type=Path, nargs="+", default=(), help=beside)
    speed = "time MLP blocks on this machine as hf-sparse tune does, and put it on the pages"
    parser.add_argument("--speed", action="store_true", help=speed)


def run(arguments: argparse.Namespace) -> int:
    """Measure the model, and write what is asked for."""
    import hf_sparse

    _check(arguments)
    before = None if arguments.before is None else hf_sparse.SparsityReport.from_json(arguments.before)
    beside = {
        name: hf_sparse.SparsityReport.from_json(path)
        for name, path in zip(names_of(arguments.beside), arguments.beside, strict=True)
    }
    model, tokenizer = load(arguments.model)
    if arguments.speed and hf_sparse.inspect(model).config is None:
        raise ValueError(
            "--speed is for a patched model, and MODEL is not patched: leave it out, or patch first."
        )
    options = {**passing(arguments), "tokenizer": tokenizer, "progress": sys.stderr.isatty()}
    report = hf_sparse.measure(model, texts(arguments), metrics=arguments.metrics, **options)
    print(report)
    if arguments.json:
        report.to_json(arguments.json)  # before the search, which may fail on this text
    cett = None
    if arguments.cett_ppl is not None:
        cett = hf_sparse.cett_sparsity(model, texts(arguments), arguments.cett_ppl, **options)
        print(f"\n{cett}")
        if arguments.json:
            told = {**report.to_dict(), "cett_ppl": cett.to_dict()}
            arguments.json.write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.plot:
        report.plot(arguments.plot, before=before)
    page: dict[str, Any] = {
        "model": model,
        "model_name": _name(arguments.model),
        "data": _data(arguments),
        "before": before,
        "beside": beside,
        "cett": cett,
    }
    if arguments.speed:
        options["max_tokens"] = min(_TIMED_TOKENS, options["max_tokens"])
        page["speed"] = hf_sparse.tune(model, texts(arguments), force=True, **options)
        print(f"\n{page['speed']}")
    if arguments.html:
        report.to_html(arguments.html, **page)
    if arguments.markdown:
        report.to_markdown(arguments.markdown, **page)
    return 0


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each file: the end of its path, as short as tells it from the others.

    Raises:
        ValueError: a file is given twice.

    """
    parts = [path.with_suffix("").absolute().parts for path in paths]
    for i, one in enumerate(parts):
        if one in parts[:i]:
            raise ValueError(f"--beside has {str(paths[i])!r} twice, or with two endings; give each once.")
    length = 1
    while len({one[-length:] for one in parts}) < len(parts):
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would fail after the measurement, which takes long."""
    for name in _WRITTEN:
        path = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name}={str(path)!r}: {str(path.parent)!r} is no folder.")
        if path is not None and path.is_dir():
            raise ValueError(f"--{name}={str(path)!r} is a folder; give a file.")
    if arguments.cett_ppl is not None and not 0 < arguments.cett_ppl < math.inf:
        raise ValueError(
            f"--cett-ppl={arguments.cett_ppl:g} is no rise of perplexity in percent; use 1, or more."
        )
    pages = arguments.html is not None or arguments.markdown is not None
    wanted = [name for name in ("before", "beside", "speed") if getattr(arguments, name)]
    useless = [name for name in wanted if not (pages or (name == "before" and arguments.plot is not None))]
    if useless:
        raise ValueError(f"--{useless[0]} is for a page; give --html FILE or --markdown FILE as well.")


def _name(model: str) -> str:
    """Of a folder its last part: where a user keeps files is nobody's business."""
    return Path(model).expanduser().absolute().name if Path(model).expanduser().is_dir() else model


def _data(arguments: argparse.Namespace) -> str:
    if arguments.text_file is not None:
        return f"the file {arguments.text_file.name}"
    if arguments.dataset == EMBEDDED:
        return "held-out documentation of the running Python"
    local = Path(arguments.dataset).expanduser().exists()
    name = Path(arguments.dataset).name if local else arguments.dataset
    return name + (f", {arguments.dataset_config}" if arguments.dataset_config else "")


COMMAND = Command(
    text="Measure activation sparsity by layer, and perplexity, on text.",
    example="hf-sparse measure ./llama-relu --dataset allenai/c4 --max-tokens 100000 --html report.html",
    add_options=add_options,
    run=run,
)
