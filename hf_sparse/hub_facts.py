"""What the author of a model says of it, for its card: checked against the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from hf_sparse.card_marks import MARK
from hf_sparse.checks import shown
from hf_sparse.composite import parts_of
from hf_sparse.metrics import SparsityReport
from hf_sparse.tuning import TuneReport
from triton_ops.processor import processor_name


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the author says of a model, checked against it; see :func:`hf_sparse.push_to_hub`."""

    report: SparsityReport | None
    before: SparsityReport | None
    evaluated_on: str | None
    speed: str | None
    recipe: str | None
    base_model: str | None
    datasets: tuple[str, ...]
    given: tuple[str, ...]
    """Keys of the metadata that were named by the author, and not found out here."""

    @classmethod
    def read(
        cls,
        model: PreTrainedModel,
        *,
        report: SparsityReport | None,
        before: SparsityReport | None,
        evaluated_on: str | None,
        speed: str | TuneReport | None,
        recipe: Mapping[str, Any] | str | os.PathLike[str] | None,
        base_model: str | None,
        datasets: str | Sequence[str] | None,
    ) -> Facts:
        """The arguments of ``push_to_hub``.

        Raises:
            ValueError: one is not what it should be, or is about another model.
            OSError: the recipe cannot be read.

        """
        # Unpatched ones are measured, too.
        sizes = {
            block.place: block.intermediate_size for part in parts_of(model) for block in part.all_blocks
        }
        for name, measured in (("report", report), ("before", before)):
            _require_of_model(name, measured, model, sizes)
        if report is None and (before is not None or evaluated_on is not None):
            which = "before" if before is not None else "evaluated_on"
            raise ValueError(
                f"{which}= needs report=, what hf_sparse.measure gives for the model to be pushed."
            )
        if report is not None and before is not None and report.sequence_length != before.sequence_length:
            raise ValueError(
                f"report has sequence_length={report.sequence_length} and before {before.sequence_length}: "
                "perplexity depends on it. Measure both with the same."
            )
        text, values = _recipe(recipe)
        given = [name for name, value in (("base_model", base_model), ("datasets", datasets)) if value]
        if base_model is None:
            # What is trained from scratch has the sizes of that model, and nothing else of it.
            of = None if values.get("from_scratch") else values.get("model")
            base_model = _found_id(of) or _loaded_from(model)
        elif not is_id(base_model):
            raise ValueError(f"base_model={shown(base_model)} is not the Hub id of a model, owner/name.")
        if datasets is None:
            datasets = found if (found := _found_id(values.get("dataset"))) else ()
        datasets = (datasets,) if isinstance(datasets, str) else tuple(datasets)
        for one in datasets:
            if not is_id(one):
                raise ValueError(
                    f"datasets={shown(one)} is not the Hub id of a data set; say what else it was trained on "
                    "in the README."
                )
        return cls(
            report=report,
            before=before,
            evaluated_on=None if evaluated_on is None else _plain("evaluated_on", evaluated_on),
            speed=None if speed is None else _plain("speed", _speed(speed, model), lines=True),
            recipe=text,
            base_model=base_model,
            datasets=datasets,
            given=tuple(given),
        )


def is_id(value: str) -> bool:
    """Whether ``value`` has the form of an id on the Hub."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _require_of_model(
    name: str, report: SparsityReport | None, model: nn.Module, sizes: Mapping[str, int]
) -> None:
    if report is None:
        return
    if not isinstance(report, SparsityReport):
        raise ValueError(f"{name}={shown(report)} is no SparsityReport, which hf_sparse.measure gives.")
    for layer in report.layers:
        if sizes.get(layer.name) != layer.neurons:
            raise ValueError(
                f"{name} is about another model: this {type(model).__name__} has no MLP block "
                f"{layer.name} of {layer.neurons} neurons."
            )


def _recipe(
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None,
) -> tuple[str | None, Mapping[str, Any]]:
    """As text, and as values."""
    if recipe is None:
        return None, {}
    if isinstance(recipe, Mapping):
        try:
            text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ValueError(f"recipe has a value that is no plain one: {error}") from None
        return _plain("recipe", text, lines=True), recipe
    text = Path(recipe).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe={shown(str(recipe))} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe={shown(str(recipe))} is no YAML file of fields and values.")
    return _plain("recipe", text, lines=True), values


def _speed(speed: str | TuneReport, model: nn.Module) -> str:
    if not isinstance(speed, TuneReport):
        return str(speed)
    # A report of tune does not leave the process, so it was this machine.
    on_gpu = next(model.parameters()).device.type == "cuda"
    cpu = f"{processor_name()}, {torch.get_num_threads()} threads"
    return f"{speed}\nmeasured on {torch.cuda.get_device_name() if on_gpu else cpu}"


def _plain(field: str, text: str, *, lines: bool = False) -> str:
    """``text`` that cannot end the section it stands in."""
    if MARK in text:
        raise ValueError(f"{field} contains {MARK!r}, which marks sections of the README; take it out.")
    return text.strip() if lines else " ".join(text.split())


def _found_id(value: object) -> str | None:
    """``value`` if it is an id on the Hub by its form, and nothing here that has that name."""
    if not isinstance(value, str) or "/" not in value or not is_id(value) or Path(value).exists():
        return None
    return value


def _loaded_from(model: PreTrainedModel) -> str | None:
    # A name alone may be a folder elsewhere; what came from the Hub has left its config in the cache.
    name = str(model.name_or_path or "")
    if not is_id(name) or Path(name).exists():
        return None
    return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
