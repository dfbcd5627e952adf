"""The command ``hf-sparse finetune``."""

from __future__ import annotations

import argparse
import shlex

from hf_sparse.cli.command import Command

_MANUAL = """\
Finetune a model for activation sparsity: `accelerate launch training/finetune.py …`.

  hf-sparse finetune --config prosparse --model meta-llama/Llama-3.2-1B --dataset allenai/c4
  hf-sparse finetune --launcher "--num_processes 8" --config prosparse --learning-rate 1e-4

--config takes a YAML file or the name of a shipped recipe. All options but --launcher are those of the
training application:"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command; all others are the training application's."""
    parser.add_argument("--launcher", metavar="OPTIONS", help="options of `accelerate launch`, in one string")


def run(arguments: argparse.Namespace) -> int:
    """Start the training application."""
    from hf_sparse.launch import finetune

    rest: list[str] = arguments.rest
    if not rest or {"-h", "--help"}.intersection(rest):
        print(_MANUAL, end="\n\n", flush=True)
        return finetune(["--help"])
    launcher = None if arguments.launcher is None else shlex.split(arguments.launcher)
    return finetune(rest, launcher=launcher)


COMMAND = Command(
    text="Finetune a model for activation sparsity (starts the training application).",
    example="hf-sparse finetune --config prosparse --model meta-llama/Llama-3.2-1B --dataset allenai/c4",
    add_options=add_options,
    run=run,
    passes_on=True,
    manual=_MANUAL,
)
