"""fit_sparsing_law: a published law of the activation ratio, fitted to runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse.laws.curve import FORMS, Form
from hf_sparse.laws.least_squares import least_squares
from hf_sparse.laws.points import Kind, law_points
from hf_sparse.laws.report import SparsingLaw
from hf_sparse.laws.solve import PARAMETERS, Best, best_curve

_DRAWS = 400
"""Simulated sets of points; the interval is between two quantiles of the curves fitted to them."""
_STEPS = 100
"""Of the fit of one: it starts at the curve."""


def fit_sparsing_law(
    *runs: Any,
    form: Literal["auto", "relu", "silu"] = "auto",
    kind: Kind = "eval",
    where: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> SparsingLaw:
    """Fit how the activation ratio changes with training tokens (Sparsing Law, arXiv 2411.02335).

    With D in billions of tokens, ``"relu"`` is ``A(D) = exp(-c D^alpha + b) + limit``, which falls, and
    ``"silu"`` is ``A(D) = limit - c / D^alpha``, which rises. Least squares of A, all points alike.

    The uncertainty is a parametric bootstrap: points are drawn anew around the curve, with the variance that
    the residuals show, itself drawn from its distribution (chi-squared; degrees of freedom are points less
    constants), so that few points give wide intervals. It holds if the law is right and the errors of points
    are independent. Those of one run seldom are: give several runs where you can, and take the interval of
    one for too narrow.

    Args:
        runs: output folders of the trainer or their ``log.jsonl``, tables of ``docs/results``, or pairs of
            tokens and activation ratio; see :func:`hf_sparse.laws.law_points`. The points of several are
            put together: runs of one model and recipe that differ in seed or length.
        form: of the law; ``"auto"`` fits both and takes the nearer one, ``law.chosen`` says by how much.
        kind: records of logs to take, ``"eval"`` or ``"train"``.
        where: of tables of results, the fields of the runs to take.
        confidence: of the intervals, above 0 and below 1.
        seed: of the bootstrap.

    Raises:
        OSError: a file cannot be read.
        ValueError: too few points; tokens or ratios out of range; points that no such curve fits; an
            argument out of range.

    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"form={form!r} is not known; use auto, {' or '.join(FORMS)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is out of range; use a share above 0 and below 1.")
    points = sorted(point for run in _runs(runs) for point in law_points(run, kind=kind, where=where))
    tokens, ratios = torch.tensor(points, dtype=torch.float64).reshape(-1, 2).unbind(1)
    least = min(PARAMETERS.values()) if form == "auto" else PARAMETERS[form]
    _require_enough(tokens, ratios, least)
    best, chosen = _nearest(tokens, ratios) if form == "auto" else (best_curve(form, tokens, ratios), None)
    return SparsingLaw(
        curve=best.curve,
        points=tuple(points),
        runs=len(runs) if not _is_pairs(runs) else 1,
        residual=(best.squares / len(points)) ** 0.5,
        confidence=confidence,
        power_law=best.power_law,
        chosen=chosen or f"form={form!r} was asked for",
        draws=_bootstrap(best, len(points), seed),
        problem=best.problem,
    )


def _runs(runs: tuple[Any, ...]) -> list[Any]:
    """Each run; pairs may be given as one, or each by itself."""
    if not runs:
        raise ValueError(
            "no run was given; give output folders of the trainer, or pairs of tokens and activation ratio."
        )
    return [runs] if _is_pairs(runs) else list(runs)


def _is_pairs(runs: tuple[Any, ...]) -> bool:
    return all(
        isinstance(run, tuple) and len(run) == 2 and all(isinstance(one, int | float) for one in run)
        for run in runs
    )


def _require_enough(tokens: Tensor, ratios: Tensor, parameters: int) -> None:
    different = len(tokens.unique())
    if different <= parameters:
        raise ValueError(
            f"{different} different token counts are too few for a law of {parameters} constants; give "
            f"{parameters + 1} or more: evaluate more often (eval_every), or take kind='train'."
        )
    if float(ratios.max() - ratios.min()) < 1e-9:
        raise ValueError(
            f"every activation ratio is {float(ratios[0]):g}; no law can be fitted to what does not change."
        )


def _nearest(tokens: Tensor, ratios: Tensor) -> tuple[Best, str]:
    """The form with the smaller residuals, and what to say of the choice."""
    found: dict[Form, Best] = {}
    refused: dict[Form, str] = {}
    for form in FORMS:
        try:
            _require_enough(tokens, ratios, PARAMETERS[form])
            found[form] = best_curve(form, tokens, ratios)
        except ValueError as error:
            refused[form] = str(error)
    if not found:
        raise ValueError("no form fits. " + " ".join(refused.values()))
    form = min(found, key=lambda one: found[one].squares / (len(tokens) - PARAMETERS[one]))
    if refused:
        return found[form], f"the form {form!r} by the fit: {next(iter(refused.values()))}"
    by_form = {one: (of.squares / (len(tokens) - PARAMETERS[one])) ** 0.5 for one, of in found.items()}
    errors = ", ".join(f"{one} {error:.3g}" for one, error in by_form.items())
    return found[form], f"the form {form!r} by the fit: standard error of a point {errors}"


def _bootstrap(best: Best, points: int, seed: int) -> Tensor:
    """Parameters ``[draws, P]`` of curves fitted to points drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    freedom = points - PARAMETERS[best.problem.form]
    normal = torch.randn(_DRAWS, freedom, generator=generator, dtype=torch.float64)
    deviation = (best.squares / normal.square().sum(1)).sqrt()  # squares / chi-squared, of `freedom` degrees
    noise = torch.randn(_DRAWS, points, generator=generator, dtype=torch.float64)
    target = best.values + deviation[:, None] * noise
    start = best.parameters.expand(_DRAWS, -1)
    return least_squares(best.problem, start, target, bounds=best.problem.bounds, steps=_STEPS).parameters
