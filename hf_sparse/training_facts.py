"""What a training measured, kept beside the model that it made: a push to the Hub brings it along.

It is only believed for the very weights that were measured: the file holds their hash.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.metrics import SparsityReport

FILE = "hf_sparse_training.json"


def write_facts(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    report: SparsityReport,
    before: SparsityReport | None,
    evaluated_on: str,
    recipe: Mapping[str, Any],
    datasets: Sequence[str],
) -> Path:
    """Keep facts in ``folder``, where the model with the weights ``state`` has been saved.

    Args:
        folder: of the model.
        state: the model's state dict.
        report: of this model, as :func:`hf_sparse.push_to_hub` takes it, which the others are for, too.
        before: of the dense model.
        evaluated_on: the text of both.
        recipe: of the training; plain JSON types.
        datasets: Hub ids of what it was trained on.

    """
    facts = {
        "weights_sha256": weights_hash(state),
        "report": report.to_dict(),
        "before": None if before is None else before.to_dict(),
        "evaluated_on": evaluated_on,
        "recipe": dict(recipe),
        "datasets": list(datasets),
    }
    path = folder / FILE
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def with_facts(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, the arguments of a push, where they are None filled from the folder ``model`` came from.

    A measurement that is given takes the place of all that was measured there. Of a folder without facts, or
    a model whose weights have changed since, nothing is taken.

    Raises:
        ValueError: the file of facts cannot be read.

    """
    path = Path(getattr(model, "name_or_path", "") or ".") / FILE
    if not path.is_file():
        return dict(given)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kept = {
            name: None if facts[name] is None else SparsityReport.from_dict(facts[name])
            for name in ("report", "before")
        }
        kept |= {name: facts[name] for name in ("evaluated_on", "recipe")}
        kept["datasets"] = facts["datasets"] or None
        of = facts["weights_sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); take it away, or train again.") from None
    if of != weights_hash(model.state_dict()):
        warnings.warn(
            f"{path} is about other weights than this model has now, so the card has nothing of it. Measure "
            "the model, and give report=.",
            stacklevel=3,
        )
        return dict(given)
    if any(given[name] is not None for name in ("report", "before", "evaluated_on")):
        kept |= dict.fromkeys(("report", "before", "evaluated_on"))
    return {name: kept.get(name) if value is None else value for name, value in given.items()}


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
