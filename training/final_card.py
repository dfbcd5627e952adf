"""The model card of a finished run: what was measured, and the recipe, beside the model."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

from recipe import Recipe
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_sparse
from hf_sparse.documents import is_local
from hf_sparse.hub_card import full_card
from hf_sparse.hub_facts import Facts
from hf_sparse.metrics import SparsityReport
from hf_sparse.training_facts import write_facts

_OF_THIS_MACHINE = ("output_dir", "resume", "tensorboard", "trackers", "progress", "data_workers")


def write_final_card(
    folder: Path,
    named: Path,
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    report: SparsityReport | None,
    before: SparsityReport | None,
) -> None:
    """Write the README of ``folder``, where ``model`` was saved with the weights ``state``, and the facts.

    ``named`` is where the folder will be, as the user calls it. Of a dense model, which no card of hf_sparse
    is about, and without a measurement nothing is written.
    """
    patched = hf_sparse.inspect(model)
    if not patched.patched or report is None:
        return
    told = essential(recipe)
    given: dict[str, Any] = {
        "report": report,
        "before": before,
        "evaluated_on": f"held-out text of {told['dataset']}",
        "recipe": told,
        "datasets": [name for name in trained_on(recipe) if not is_local(name)],
    }
    if not is_local(recipe.dataset):
        given["evaluated_on"] = recipe.dataset
    elif recipe.precision != "fp32":
        given["evaluated_on"] += f", computed in {recipe.precision}"
    write_facts(folder, state, **given)
    facts = Facts.read(model, speed=None, base_model=None, **given)
    path = folder / "README.md"
    card = full_card(
        path.read_text(encoding="utf-8"),
        model,
        patched,
        facts,
        repo_id=f"./{named.name}" if named.is_absolute() else named.as_posix(),
        revision=None,
        tokenizer=tokenizer,
    )
    path.write_text(card, encoding="utf-8")


def trained_on(recipe: Recipe) -> list[str]:
    """The data sets of a recipe."""
    mixed_in = recipe.mixed_in()
    return [recipe.dataset, *([mixed_in.dataset] if mixed_in else [])]


def essential(recipe: Recipe) -> dict[str, Any]:
    """What makes a run what it is: fields that differ from their default, and no paths of this machine."""
    default = Recipe()
    told = {
        f.name: copy.deepcopy(getattr(recipe, f.name))
        for f in fields(recipe)
        if f.name in ("model", "patch", "dataset")
        or (f.name not in _OF_THIS_MACHINE and getattr(recipe, f.name) != getattr(default, f.name))
    }
    for part in (told, told.get("mix_in") or {}):
        for name in ("model", "dataset"):
            if name in part and is_local(part[name]):
                part[name] = Path(part[name]).expanduser().resolve().name
    return told
