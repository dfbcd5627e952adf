"""Which method of calibration is best for a model: each is tried on the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_sparse.calibration.report import TriedMethod
from hf_sparse.calibration.search import Aim, Found, OutOfReach, Run, method_on, search
from hf_sparse.calibration.state import put
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.metrics.report import perplexity

BEST = "best"
MISSED = 0.02
"""How far from a target a sparsity may be without that being told."""


def best(
    names: Sequence[str], model: PreTrainedModel, start: SparsityConfig | None, run: Run, aim: Aim
) -> tuple[Found, tuple[TriedMethod, ...]]:
    """What was found for the best of the methods ``names``, and what became of each of them, best first.

    With a target the best one has the least perplexity, with a budget it leaves most weights unread. The
    model is left patched with any of the configs that were tried.

    Raises:
        PatchError: none suits the model, or it has thresholds already.
        ValueError: none of those that suit it has the sparsity.

    """
    if start is not None and _has_thresholds(start):
        raise PatchError(
            f"method={BEST!r} compares methods, and of the thresholds that the model has already some would "
            "be replaced and some stay, by method; hf_sparse.unpatch(model) first, or name one method."
        )
    kept: Found | None = None  # one alone: what a method has seen takes megabytes for each layer
    tried: list[tuple[float, TriedMethod]] = []
    unsuited: dict[str, str] = {}
    missed: dict[str, str] = {}
    for name in names:
        put(model, start)
        try:
            found = search(method_on(name, model, start), run, aim)
        except PatchError as error:
            unsuited[name] = str(error)
            continue
        except OutOfReach as error:
            has = f"{error.low:.1%} to {error.high:.1%}"
            missed[name] = f"it would need a sparsity of {error.sparsity:.1%}, and has {has}"
            continue
        if aim.sparsity is not None and abs(found.unread - aim.sparsity) > MISSED:
            missed[name] = f"{found.unread:.1%} of the weights is the nearest that was found"
            continue
        demerit = -found.unread if aim.sparsity is None else found.after.loss
        if math.isnan(demerit):
            demerit = math.inf
        if all(demerit < other for other, _ in tried):
            kept = found
        row = TriedMethod(
            method=name,
            sparsity=found.sparsity,
            unread=found.unread,
            perplexity=perplexity(found.after.loss),
        )
        tried.append((demerit, row))
    left_out = [TriedMethod(method=name, left_out=why) for name, why in (missed | unsuited).items()]
    if kept is None:
        reasons = "".join(f"\n{one.method}: {one.left_out}" for one in left_out)
        if not missed:
            raise PatchError(f"no method of calibration suits the model.{reasons}")
        raise ValueError(
            f"target_sparsity={aim.sparsity} is, with method={BEST!r}, a share of the weights of attention "
            f"and MLP, and no method that suits the model leaves that share unread.{reasons}"
        )
    tried.sort(key=lambda one: one[0])
    return kept, (*(row for _, row in tried), *left_out)


def _has_thresholds(config: SparsityConfig) -> bool:
    threshold = getattr(config.activation, "threshold", 0.0)
    return "inputs" in config.parts or any(threshold if isinstance(threshold, tuple) else (threshold,))
