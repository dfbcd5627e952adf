"""What skipping is worth by what :func:`hf_sparse.tune` timed: of the tuned layers alone, not end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_sparse.metrics import SparsityReport
from hf_sparse.tuning import TunedLayer, TuneReport
from triton_ops import break_even
from triton_ops.tune import Measurement


@dataclass(frozen=True, kw_only=True)
class ExpectedTime:
    """Times of all timed layers in a call of so many tokens, added up, in milliseconds."""

    tokens: int
    dense_ms: float
    """As stock modules compute them."""
    expected_ms: float
    """With those that skip, at the density of each."""
    skipping: int
    """How many of the layers skip."""

    @property
    def ratio(self) -> float:
        """How many times faster than dense; below 1 is slower."""
        return self.dense_ms / self.expected_ms


def timed_layers(report: TuneReport) -> tuple[TunedLayer, ...]:
    """The layers that :func:`expected_times` is about: those whose times are in ``report.measurements``."""
    known = {one.problem for one in report.measurements}
    return tuple(one for one in report.layers if one.problems and known.issuperset(one.problems))


def measured_densities(report: TuneReport, measured: SparsityReport) -> dict[str, float]:
    """The densities in ``measured``, by the names that the layers have in ``report``.

    Through a wrapper, such as PEFT's, the same layer has a name that is longer at its front.
    """
    known = {layer.name: layer.density for layer in measured.layers if layer.tokens}
    found = {}
    for layer in report.layers:
        ends = [name for name in known if name == layer.name or name.endswith(f".{layer.name}")]
        if len(ends) == 1:
            found[layer.name] = known[ends[0]]
    return found


def expected_times(
    report: TuneReport, densities: Mapping[str, float] | None = None
) -> tuple[ExpectedTime, ...]:
    """By tokens in a call, what the timed layers take together, dense and as they choose to run.

    A layer that skips takes what was timed at its density, tokens drawing their neurons independently;
    between two densities the time is taken to change linearly, and below the least one it is that of the
    least. A layer of unknown density, or one that does not skip, takes the dense time.

    Args:
        report: with ``measurements`` of the layers (``tune(..., force=True)`` makes them anew).
        densities: by names of layers, 0 to 1; where a name is missing, the density of ``report`` counts.

    """
    measured = {one.problem: one for one in report.measurements}
    layers = timed_layers(report)
    found = []
    for tokens in report.tokens if layers else ():
        dense_ms, expected_ms, skipping = 0.0, 0.0, 0
        for layer in layers:
            density = (densities or {}).get(layer.name, layer.density)
            dense, skipped = _times([measured[one] for one in layer.problems], tokens, density)
            dense_ms += dense
            expected_ms += dense if skipped is None else skipped
            skipping += skipped is not None
        found.append(
            ExpectedTime(tokens=tokens, dense_ms=dense_ms, expected_ms=expected_ms, skipping=skipping)
        )
    return tuple(found)


def _times(measurements: list[Measurement], tokens: int, density: float | None) -> tuple[float, float | None]:
    """Milliseconds of one layer, dense and skipping; None where it does not skip.

    It takes the first way that pays, as blocks do.
    """
    plain = [one for one in measurements if not one.problem.certified]
    dense = plain[0].dense_ms[tokens]
    if density is None or math.isnan(density):
        return dense, None
    for one in measurements:
        if one.problem.certified and tokens == 1 and break_even.pays(one.break_even[0], density):
            return dense, _at(one.sparse_ms[1], density)
    for one in plain:
        if break_even.pays(one.break_even[tokens - 1], density):
            # Where the whole block was timed and this is its down projection, the rest stays dense.
            return dense, dense - one.dense_ms[tokens] + _at(one.sparse_ms[tokens], density)
    return dense, None


def _at(times: Mapping[float, float], density: float) -> float:
    """The time at a density, linear between the two timed ones around it."""
    known = sorted(times)
    if density <= known[0]:
        return times[known[0]]
    above = next((one for one in known if one >= density), known[-1])
    below = max((one for one in known if one < above), default=above)
    if above == below or density >= above:
        return times[above]
    part = (density - below) / (above - below)
    return times[below] + part * (times[above] - times[below])
