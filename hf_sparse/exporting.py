"""export: a model for programs without this package, computing the same function or refused."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.checkpoint_block import KEY
from hf_sparse.checks import shown
from hf_sparse.described import in_line
from hf_sparse.errors import PatchError
from hf_sparse.gguf_export import write_gguf
from hf_sparse.model_card import write_model_card
from hf_sparse.patch_report import PatchReport, in_words, parts_in_words
from hf_sparse.patching import inspect, transformers_model

FORMATS = ("dense", "gguf")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Literal["dense", "gguf"] = "dense",
    tokenizer: Any = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model for programs that do not have this package, if they compute the very same function.

    ``"dense"`` writes a folder that transformers loads alone, all neurons computed: what ``save_pretrained``
    writes, without the ``"hf_sparse"`` block. ``"gguf"`` writes a file for llama.cpp, in an architecture that
    runs this activation. What the other program would compute differently is refused. A file or folder is
    there when it is complete.

    Args:
        model: a transformers model, patched or not. Adapters of PEFT are merged in a copy of the model, which
            takes its memory a second time; ``model`` stays as it is.
        path: a folder that is new or empty; of a GGUF file its name, which ends in ``.gguf`` and is new.
        format: ``"dense"`` or ``"gguf"``.
        tokenizer: saved along, if given; or a processor. Without one a GGUF file has no vocabulary, and runs
            on token ids.
        max_shard_size: of the files of a dense checkpoint, as ``save_pretrained`` takes it: ``"5GB"``.

    Returns:
        the folder or file.

    Raises:
        PatchError: what is asked for cannot compute this function; says why.
        ValueError: an argument is not what it should be, or llama.cpp would give other tokens.
        ImportError: the ``gguf`` package is not installed.

    """
    if format not in FORMATS:
        raise ValueError(f"format={shown(format)} is not known; choose one of {', '.join(FORMATS)}.")
    target = _free(path, format)
    sizes: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    base = _merged(model)
    with in_line(base):
        report = inspect(base)
        if format == "gguf":
            with _aside(target) as place:
                write_gguf(base, report, place, tokenizer)
            return target
        for part in report.patched:
            if part.stock_name is None:
                raise PatchError(_reason(part))
        _refuse_quantised(base)
        with _aside(target) as place:
            base.save_pretrained(place, **sizes)
            write_model_card(base, place, plain=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            _take_block_out(place / "config.json")
    return target


def _free(path: str | os.PathLike[str], format: str) -> Path:
    target = Path(path).expanduser().resolve()
    if (target.suffix == ".gguf") != (format == "gguf"):
        what = "a file NAME.gguf" if format == "gguf" else "a folder"
        raise ValueError(f"path={str(path)!r} does not go with format={format!r}, which writes {what}.")
    if target.exists() and (format == "gguf" or not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path={str(path)!r} is there, and is never written over; choose another one.")
    return target


def _merged(model: nn.Module) -> PreTrainedModel:
    """The transformers model that computes what ``model`` does, without adapters of PEFT."""
    base = transformers_model(model)
    layers = _adapter_layers(base)
    if base is model and not layers:
        return base
    merge = None if base is model else getattr(model, "merge_and_unload", None)
    if merge is None:
        raise PatchError(
            "this model has an adapter of PEFT that cannot be merged from here. Give the PeftModel itself, "
            "with an adapter that can be merged: PeftModel.from_pretrained(model, a LoRA)."
        )
    if any(layer.disable_adapters for layer in layers):
        raise PatchError(
            "the adapters of this model are switched off. Switch them on, or give model.unload(), which has "
            "none."
        )
    own: Any = copy.deepcopy(model)
    merged: PreTrainedModel = own.merge_and_unload()
    return merged


def _adapter_layers(base: PreTrainedModel) -> list[Any]:
    if "peft" not in sys.modules:  # then nothing of it is in the model
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in base.modules() if isinstance(module, BaseTunerLayer)]


def _refuse_quantised(base: PreTrainedModel) -> None:
    """Refuse weights that were quantised in memory; transformers saves those that it quantised itself."""
    if getattr(base, "hf_quantizer", None) is not None:
        return
    for name, weight in base.named_parameters():
        if type(weight) is not nn.Parameter:
            raise PatchError(
                f"{name} is a {type(weight).__name__}, quantised or split in memory, and cannot be written "
                "for transformers; export the model before that is done."
            )


def _reason(part: PatchReport) -> str:
    """Why transformers alone cannot compute the part."""
    assert part.config is not None
    words = " and ".join([in_words(part.config), *parts_in_words(part.config)])
    activation = part.config.activation
    if part.config.layers is not None:
        why = f"only {len(part.blocks)} of its MLP blocks have it, and a config names one for all"
    elif activation.mix != 1:
        why = "transformers mixes no activations; finish with set_mix(model, 1)"
    elif part.config.others:
        why = f"transformers has no {', '.join(name for name, _ in part.config.others)}"
    elif activation.name in ("relu", "relu2", "original"):
        why = "its config has no field that sets it in these blocks and nowhere else"
    else:
        why = "transformers has no activation of that kind"
    return (
        f"transformers alone cannot compute this {part.model_class} with {words}: {why}. save_pretrained "
        "saves it for transformers with this package."
    )


def _take_block_out(path: Path) -> None:
    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: without(v) for k, v in value.items() if not (k == KEY and isinstance(v, dict))}

    config = without(json.loads(path.read_text("utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A place in the folder of ``target`` that becomes it at the end, and goes if that is not reached."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        place = Path(folder, target.name)
        yield place
        if target.is_dir():
            target.rmdir()  # it is empty; a rename over it is not possible everywhere
        os.replace(place, target)
