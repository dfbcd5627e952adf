"""The command ``hf-sparse``: patch, calibrate, finetune, measure, explain, tune, law, generate, and more."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse import cli_calibrate, cli_export, cli_law, cli_measure, cli_push
from hf_sparse._version import __version__
from hf_sparse.activations.config import ACTIVATIONS
from hf_sparse.config import SparsityConfig
from hf_sparse.texts import EMBEDDED, evaluation_texts, file_texts, training_texts
from triton_ops import AUTO, BACKENDS

_MODEL_HELP = f"a Hub id, a local folder, or {EMBEDDED!r}, the model embedded in this package"

_DESCRIPTION = """\
Make the MLPs of a language model activation-sparse, finetune it, measure it, and run it faster.

Try `hf-sparse quickstart` first: the whole road on an embedded model, in a few minutes, without a network."""

_FINETUNE = """\
Finetune a model for activation sparsity: `accelerate launch training/finetune.py …`.

  hf-sparse finetune --config prosparse --model meta-llama/Llama-3.2-1B --dataset allenai/c4
  hf-sparse finetune --launcher "--num_processes 8" --config prosparse --learning-rate 1e-4

--config takes a YAML file or the name of a shipped recipe. All options but --launcher are those of the
training application:"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None reads ``sys.argv``); returns the exit status, 2 for a mistake of the user."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.command not in (_finetune, _quickstart):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.command(arguments, rest)
    except (ValueError, OSError, ImportError, RuntimeError) as mistake:
        if os.environ.get("HF_SPARSE_DEBUG"):
            raise
        print(f"hf-sparse: error: {_one_line(mistake)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description=_DESCRIPTION,
        epilog="HF_SPARSE_DEBUG=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-sparse {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_patch(commands)
    _add_calibrate(commands)
    _add_finetune(commands)
    _add_measure(commands)
    _add_explain(commands)
    _add_tune(commands)
    _add_law(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_push(commands)
    _add_quickstart(commands)
    return parser


def _add(commands: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    return parser


# ---- patch


def _add_patch(commands: Any) -> None:
    parser = _add(
        commands,
        "patch",
        _patch,
        "Replace the activation of a model's MLP blocks and save the patched model.",
        "hf-sparse patch meta-llama/Llama-3.2-1B --activation relu --output ./llama-relu",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
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


def _patch(arguments: argparse.Namespace, _: list[str]) -> int:
    import hf_sparse

    given = {"threshold": arguments.threshold, "shift": arguments.shift, "layers": arguments.layers}
    fields = {name: value for name, value in given.items() if value is not None}
    config = SparsityConfig.read(arguments.activation, **fields)
    if arguments.output is not None:
        _require_empty(arguments.output)
    model, tokenizer = _load(arguments.model)
    chosen = {name: getattr(arguments, name) for name in ("part", "include", "exclude")}
    print(hf_sparse.patch(model, config, **chosen))
    if arguments.output is None:
        print("nothing was saved; give --output DIR")
        return 0
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")
    return 0


# ---- calibrate


def _add_calibrate(commands: Any) -> None:
    parser = _add(
        commands,
        "calibrate",
        _calibrate,
        "Make a model sparse without training: thresholds on its activations, chosen on a text.",
        "hf-sparse calibrate meta-llama/Llama-3.2-1B --target-sparsity 0.5 --dataset allenai/c4 "
        "--dataset-config en --output ./llama-teal",
    )
    cli_calibrate.add_options(parser, _MODEL_HELP)
    _add_text(parser, "default: documentation of the running Python", 65_536, split="training")
    parser.set_defaults(dataset=EMBEDDED)


def _calibrate(arguments: argparse.Namespace, _: list[str]) -> int:
    if arguments.output is not None:
        _require_empty(arguments.output)
    model, tokenizer = _load(arguments.model)
    return cli_calibrate.run(arguments, model, tokenizer, _texts(arguments, of=training_texts))


# ---- finetune


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="Finetune a model for activation sparsity (starts the training application).",
        description=_FINETUNE,
        add_help=False,  # --help is the training application's
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--launcher", metavar="OPTIONS", help="options of `accelerate launch`, in one string")
    parser.set_defaults(command=_finetune)


def _finetune(arguments: argparse.Namespace, rest: list[str]) -> int:
    import shlex

    from hf_sparse.launch import finetune

    if not rest or {"-h", "--help"}.intersection(rest):
        print(_FINETUNE, end="\n\n", flush=True)
        return finetune(["--help"])
    launcher = None if arguments.launcher is None else shlex.split(arguments.launcher)
    return finetune(rest, launcher=launcher)


# ---- measure


def _add_measure(commands: Any) -> None:
    parser = _add(
        commands,
        "measure",
        _measure,
        "Measure activation sparsity by layer, and perplexity, on text.",
        "hf-sparse measure ./llama-relu --dataset allenai/c4 --max-tokens 100000 --html report.html",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_text(parser, "default: held-out documentation of the running Python", 32_768)
    parser.set_defaults(dataset=EMBEDDED)
    cli_measure.add_options(parser)


def _measure(arguments: argparse.Namespace, _: list[str]) -> int:
    return cli_measure.run(arguments, _load, lambda: _texts(arguments), _passing(arguments))


# ---- explain


def _add_explain(commands: Any) -> None:
    parser = _add(
        commands,
        "explain",
        _explain,
        "Account for the density of each layer: flatness over input norm and activation gradient.",
        "hf-sparse explain ./llama-relu --dataset allenai/c4",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_text(parser, "default: held-out documentation of the running Python", 8192)
    parser.set_defaults(dataset=EMBEDDED)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report as JSON")


def _explain(arguments: argparse.Namespace, _: list[str]) -> int:
    import hf_sparse

    model, tokenizer = _load(arguments.model)
    report = hf_sparse.explain(
        model,
        _texts(arguments),
        tokenizer=tokenizer,
        **_passing(arguments),
        progress=sys.stderr.isatty(),
    )
    print(report)
    if arguments.json:
        report.to_json(arguments.json)
    return 0


# ---- tune


def _add_tune(commands: Any) -> None:
    parser = _add(
        commands,
        "tune",
        _tune,
        "Measure on this machine when skipping is no slower than dense, and keep it for later runs.",
        "hf-sparse tune ./llama-relu --dataset allenai/c4",
    )
    parser.add_argument("model", metavar="MODEL", help="a patched model: a Hub id or a local folder")
    _add_text(parser, "default: none, and the table is for layers of unknown density", 4096)
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    parser.add_argument("--certify", action="store_true", help="measure what certificates add, too")


def _tune(arguments: argparse.Namespace, _: list[str]) -> int:
    import hf_sparse

    model, tokenizer = _load(arguments.model)
    if arguments.certify:
        hf_sparse.prepare(model, certify=True)
    report = hf_sparse.tune(
        model,
        _texts(arguments),
        tokenizer=tokenizer,
        **_passing(arguments),
        force=arguments.force,
        progress=sys.stderr.isatty(),
    )
    print(report)
    return 0


# ---- law


def _add_law(commands: Any) -> None:
    text = "Fit how sparsity changes with training tokens, and predict it for longer runs."
    example = "hf-sparse law runs/llama-relu --tokens 1e10 --plot law.svg"
    parser = _add(commands, "law", lambda arguments, _: cli_law.run(arguments), text, example)
    cli_law.add_options(parser)


# ---- generate


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        _generate,
        "Continue a prompt; a patched model skips its silent neurons.",
        'hf-sparse generate ./llama-relu --prompt "The capital of France" --backend auto',
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0, the default, is greedy; 1 samples as is",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: 0")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=AUTO,
        help="auto, the default, skips neurons where that was measured to be faster; dense never skips",
    )
    parser.add_argument(
        "--certify",
        action="store_true",
        help="one byte more per gate weight proves which neurons are silent: the same text, less to read",
    )


def _generate(arguments: argparse.Namespace, _: list[str]) -> int:
    import torch
    from transformers import TextStreamer

    import hf_sparse

    for name, low in (("max_new_tokens", 1), ("temperature", 0)):
        if getattr(arguments, name) < low:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(arguments, name)} is below {low}.")
    model, tokenizer = _load(arguments.model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("--prompt has no tokens; give some text.")
    if arguments.certify:
        hf_sparse.prepare(model, certify=True)
    torch.manual_seed(arguments.seed)
    sampling = {"temperature": arguments.temperature} if arguments.temperature else {}
    begin = time.perf_counter()
    with hf_sparse.backend(arguments.backend):
        ids = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=bool(sampling),
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - begin
    count = ids.shape[1] - length
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


# ---- export


def _add_export(commands: Any) -> None:
    text = "Write a model for programs without this package: transformers alone, or llama.cpp."
    example = "hf-sparse export ./llama-relu --format gguf --output llama-relu.gguf"
    parser = _add(commands, "export", lambda arguments, _: cli_export.run(arguments, _load), text, example)
    cli_export.add_options(parser, _MODEL_HELP)


# ---- push


def _add_push(commands: Any) -> None:
    text = "Push a patched model to the Hub, with a model card of what it is and what was measured."
    example = "hf-sparse push ./llama-relu me/llama-relu --report after.json --before dense.json"
    parser = _add(commands, "push", lambda arguments, _: cli_push.run(arguments, _load), text, example)
    cli_push.add_options(parser, _MODEL_HELP)


# ---- quickstart


def _add_quickstart(commands: Any) -> None:
    parser = _add(
        commands,
        "quickstart",
        _quickstart,
        "The whole road: measure, patch, finetune, save, reload, measure and time.",
        "hf-sparse quickstart\n"
        "  hf-sparse quickstart --model HuggingFaceTB/SmolLM2-135M --dataset ./my-texts --max-steps 100\n\n"
        "Options that are not listed go to the training application (hf-sparse finetune --help).",
    )
    parser.add_argument("--model", metavar="MODEL", default=EMBEDDED, help=f"{_MODEL_HELP} (the default)")
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


def _quickstart(arguments: argparse.Namespace, rest: list[str]) -> int:
    _quiet()
    from hf_sparse.quickstart import quickstart

    quickstart(model=arguments.model, dataset=arguments.dataset, output=arguments.output, training=rest)
    return 0


# ---- shared


def _add_text(
    parser: argparse.ArgumentParser, default: str, max_tokens: int, *, split: str = "validation"
) -> None:
    """The options that choose a text and say how it goes through the model."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        metavar="ID",
        help=f"the {split} split, or all where there is none, of a Hub data set or of a local file or "
        f"folder (json, jsonl, parquet, txt); {default}",
    )
    source.add_argument("--text-file", metavar="FILE", type=Path, help="a text file, all of it")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set, such as en")
    parser.add_argument("--text-field", metavar="NAME", default="text", help="its column; default: text")
    length = "tokens per window; default: the context, at most 1024"
    parser.add_argument("--sequence-length", type=int, metavar="N", help=length)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows at once; default: 4")
    most = f"stop after as many; default: {max_tokens}"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=most)


def _passing(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the options of :func:`_add_text` say that a text goes through the model."""
    return {name: getattr(arguments, name) for name in ("sequence_length", "batch_size", "max_tokens")}


def _texts(arguments: argparse.Namespace, of: Any = evaluation_texts) -> Any:
    """The text that the options of :func:`_add_text` chose, None if they chose none."""
    if arguments.text_file is not None:
        return file_texts(arguments.text_file)
    if arguments.dataset is None:
        return None
    return of(arguments.dataset, config=arguments.dataset_config, text_field=arguments.text_field)


def _load(name: str) -> tuple[Any, Any]:
    """The model, on the GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_sparse.assets import TINY_MODEL

    _quiet()
    source = str(TINY_MODEL) if name == EMBEDDED else name
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"MODEL={name!r} is no folder.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _quiet() -> None:
    """No bar for loading a model: the bars that show are of what takes long."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output={str(folder)!r} is there and not empty; choose another folder.")


def _one_line(mistake: BaseException) -> str:
    return " ".join(str(mistake).split()) or type(mistake).__name__


if __name__ == "__main__":
    sys.exit(main())
