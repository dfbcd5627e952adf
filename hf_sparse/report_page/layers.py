"""The sections on single blocks: sparsity, dead and always-on neurons, and density by token."""

from __future__ import annotations

import math

from hf_sparse.metrics.density import ALWAYS_ON, QUANTILES, LayerDensity
from hf_sparse.metrics.report import DEFINITION, LayerSparsity, SparsityReport
from hf_sparse.report_page.charts import Bars, Ranges, Series
from hf_sparse.report_page.document import Figure, Section, Table, Text
from hf_sparse.report_page.words import counted, in_percent, share

IN_ORDER = "Blocks are counted from 0 in the order of the model; the table has their names."


def sparsity_section(report: SparsityReport, before: SparsityReport | None) -> Section:
    """Sparsity by block, with what it was before."""
    names = tuple(layer.name for layer in report.layers)
    series = [Series(name="this model", values=_shares(report))]
    if before is not None:
        series.insert(0, Series(name="before", values=_shares(before), style="other"))
    chart = Bars(
        title="Sparsity by MLP block",
        y_label="exact zeros, %",
        x_label="MLP block",
        places=names,
        series=tuple(series),
        top=100,
    )
    caption = f"{DEFINITION[0].upper()}{DEFINITION[1:]}, over {report.tokens:,} tokens. {IN_ORDER}"
    if any(not layer.tokens for layer in report.layers):
        caption += " A block without a bar was reached by no token."
    rows = [
        _row(layer, None if before is None else before.layers[i]) for i, layer in enumerate(report.layers)
    ]
    of_all = ("all blocks", f"{sum(x.neurons for x in report.layers):,}", "")
    shares = [share(report.sparsity), share(report.density)]
    if before is not None:
        shares.append(share(before.sparsity))
    head = ("MLP block", "neurons", "tokens", "sparsity", "density", *(["sparsity before"] if before else []))
    table = Table(caption="sparsity by block", head=head, rows=(*rows, (*of_all, *shares)))
    return Section(heading="Sparsity by layer", parts=(Figure(chart=chart, caption=caption, table=table),))


def neurons_section(report: SparsityReport) -> Section | None:
    """Dead and always-on neurons by block; None if neither is known of any."""
    density = _density(report)
    always: list[int | None] = [None] * len(report.layers)
    if density is not None:
        always = [one.always_on for one in density]
    dead = [layer.dead for layer in report.layers]
    if density is not None:
        dead = [a if a is not None else b.dead for a, b in zip(dead, density, strict=True)]
    if not any(one is not None for one in (*dead, *always)):
        return None
    neurons = [layer.neurons for layer in report.layers]
    series = [Series(name="dead", values=_of(dead, neurons))]
    if density is not None:
        series.append(Series(name="always on", values=_of(always, neurons), style="other"))
    chart = Bars(
        title="Neurons that are never or always active" if density is not None else "Never active neurons",
        y_label="share of the neurons, %",
        x_label="MLP block",
        places=tuple(layer.name for layer in report.layers),
        series=tuple(series),
    )
    caption = (
        f"Dead: exactly zero for each of the {report.tokens:,} tokens that were measured; on more text some "
        "of them may be active. "
    )
    if density is not None:
        caption += f"Always on: not zero for more than {ALWAYS_ON:.0%} of the tokens. "
    rows = []
    for i, layer in enumerate(report.layers):
        row = (layer.name, f"{layer.neurons:,}", counted(dead[i]))
        rows.append((*row, *([counted(always[i])] if density is not None else [])))
    totals = [_total(dead), *([_total(always)] if density is not None else [])]
    rows.append(("all blocks", f"{sum(neurons):,}", *map(counted, totals)))
    head = ("MLP block", "neurons", "dead", *(["always on"] if density is not None else []))
    table = Table(caption="neurons that are dead, or always on", head=head, rows=tuple(rows))
    heading = "Dead and always-on neurons" if density is not None else "Dead neurons"
    if not any((*dead, *always)):  # a chart of nothing
        where = "" if None not in (*dead, *(always if density is not None else ())) else " where it is known"
        return Section(heading=heading, parts=(Text(f"There are none{where}. {caption}"), table))
    figure = Figure(chart=chart, caption=caption + IN_ORDER, table=table)
    return Section(heading=heading, parts=(figure,))


def tokens_section(report: SparsityReport) -> Section | None:
    """How the density differs between tokens, by block; None if it was not measured."""
    layers = _density(report)
    if layers is None or "density" not in report.metrics:
        return None
    chart = Ranges(
        title="Density of single tokens",
        y_label="active neurons of a token, %",
        x_label="MLP block",
        places=tuple(one.name for one in layers),
        values=tuple(_range(one) for one in layers),
    )
    caption = (
        "A token's density is the share of neurons that are not exactly zero for it. The dot is the median "
        f"token; nine tokens in ten lie on the line, from the 5th to the 95th percentile. {IN_ORDER}"
    )
    rows = [(one.name, share(_mean(one)), *map(share, one.others().values())) for one in layers]
    total = report.metrics["density"].total()["density"]
    rows.append(("all blocks", share(total), *[""] * len(QUANTILES)))
    head = ("MLP block", "mean", *QUANTILES)
    table = Table(caption="densities that so many of the tokens do not exceed", head=head, rows=tuple(rows))
    return Section(heading="From token to token", parts=(Figure(chart=chart, caption=caption, table=table),))


def _row(layer: LayerSparsity, before: LayerSparsity | None) -> tuple[str, ...]:
    cells = [
        layer.name,
        f"{layer.neurons:,}",
        f"{layer.tokens:,}",
        share(layer.sparsity),
        share(layer.density),
    ]
    return (*cells, *([] if before is None else [share(before.sparsity)]))


def _shares(report: SparsityReport) -> tuple[float | None, ...]:
    return tuple(in_percent(layer.sparsity) for layer in report.layers)


def _density(report: SparsityReport) -> list[LayerDensity] | None:
    found = report.metrics.get("density")
    return None if found is None else [one for one in found.layers if isinstance(one, LayerDensity)]


def _mean(one: LayerDensity) -> float:
    return one.active / (one.tokens * one.neurons) if one.tokens else math.nan


def _range(one: LayerDensity) -> tuple[float, float, float] | None:
    low, middle, high = (100 * one.quantile(q) for q in QUANTILES.values())
    return (low, middle, high) if one.tokens else None


def _of(counts: list[int | None], neurons: list[int]) -> tuple[float | None, ...]:
    return tuple(None if n is None else 100 * n / all_ for n, all_ in zip(counts, neurons, strict=True))


def _total(counts: list[int | None]) -> int | None:
    known = [one for one in counts if one is not None]
    return sum(known) if len(known) == len(counts) else None
