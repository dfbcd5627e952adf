"""Options that several commands have, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sparse.texts import EMBEDDED, evaluation_texts, file_texts

MODEL_HELP = f"a Hub id, a local folder, or {EMBEDDED!r}, the model embedded in this package"


def add_model(parser: argparse.ArgumentParser, what: str = MODEL_HELP) -> None:
    """The argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help=what)


def add_text(
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


def passing(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the options of :func:`add_text` say that a text goes through the model."""
    return {name: getattr(arguments, name) for name in ("sequence_length", "batch_size", "max_tokens")}


def texts(arguments: argparse.Namespace, of: Any = evaluation_texts) -> Any:
    """The text that the options of :func:`add_text` chose, None if they chose none."""
    if arguments.text_file is not None:
        return file_texts(arguments.text_file)
    if arguments.dataset is None:
        return None
    return of(arguments.dataset, config=arguments.dataset_config, text_field=arguments.text_field)


def load(name: str) -> tuple[Any, Any]:
    """The model, on the GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_sparse.assets import TINY_MODEL

    quiet()
    source = str(TINY_MODEL) if name == EMBEDDED else name
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"MODEL={name!r} is no folder.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def quiet() -> None:
    """No bar for loading a model: the bars that show are of what takes long."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def require_empty(folder: Path) -> None:
    """Refuse a folder to save in that has something in it.

    Raises:
        ValueError: names it.

    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output={str(folder)!r} is there and not empty; choose another folder.")
