"""The sections on several tokens at once, on the derivative, and on any other metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_sparse.metrics.derivative import LayerDerivative
from hf_sparse.metrics.metric import MetricReport, ratio
from hf_sparse.metrics.report import SparsityReport
from hf_sparse.metrics.union import BATCHES, CHUNKS
from hf_sparse.report_page.charts import Bars, Lines, Series
from hf_sparse.report_page.document import Figure, Note, Part, Section, Table, Text
from hf_sparse.report_page.layers import IN_ORDER
from hf_sparse.report_page.words import in_percent, share

_OWN = ("density", "union", "derivative")
"""The metrics that have a section of their own."""


def union_section(report: SparsityReport) -> Section | None:
    """Density of the union over several tokens; None if it was not measured."""
    found = report.metrics.get("union")
    if found is None:
        return None
    total = list(found.total().values())
    if any(one is None for one in total[: len(CHUNKS)]):
        told = "Of experts it is not known which neurons of several tokens are the same: there is no union."
        return Section(heading="Several tokens at once", parts=(Note(told),))
    parts: list[Part] = [
        Text(
            "A kernel that takes several tokens in one call reads each neuron that at least one of them "
            "needs: their union."
        ),
        _unions(found, CHUNKS, 0, "consecutive tokens"),
    ]
    if any(not math.isnan(one) for one in total[len(CHUNKS) + 1 :] if one is not None):
        parts.append(_unions(found, BATCHES, len(CHUNKS), "sequences of a batch"))
    return Section(heading="Several tokens at once", parts=tuple(parts))


def derivative_section(report: SparsityReport) -> Section | None:
    """Derivative sparsity beside activation sparsity, by block; None if it was not measured."""
    found = report.metrics.get("derivative")
    if found is None:
        return None
    layers = [one for one in found.layers if isinstance(one, LayerDerivative)]
    shares = [math.nan if one.sparsity is None else one.sparsity for one in layers]
    chart = Bars(
        title="Derivative sparsity by MLP block",
        y_label="exact zeros, %",
        x_label="MLP block",
        places=tuple(one.name for one in layers),
        series=(
            Series(
                name="activation",
                values=tuple(in_percent(one.sparsity) for one in report.layers),
                style="other",
            ),
            Series(name="derivative", values=tuple(in_percent(one) for one in shares)),
        ),
        top=100,
    )
    rows = [
        (one.name, share(own), share(of.sparsity))
        for one, own, of in zip(layers, shares, report.layers, strict=True)
    ]
    total = found.total()["derivative sparsity"]
    table = Table(
        caption="derivative sparsity by block",
        head=("MLP block", "derivative sparsity", "activation sparsity"),
        rows=(*rows, ("all blocks", share(total), share(report.sparsity))),
    )
    caption = f"{found.about[0].upper()}{found.about[1:]}: what a backward pass can leave out. {IN_ORDER}"
    return Section(heading="Derivative", parts=(Figure(chart=chart, caption=caption, table=table),))


def other_sections(report: SparsityReport) -> list[Section]:
    """Of each metric without a section of its own, the table that is printed."""
    return [
        Section(heading=f"Metric: {name}", parts=(_table(found),))
        for name, found in report.metrics.items()
        if name not in _OWN
    ]


def _table(found: MetricReport) -> Table:
    head, *rows = (row for row in found.rows() if row is not None)
    return Table(caption=f"{found.about[0].upper()}{found.about[1:]}", head=head, rows=tuple(rows))


def _unions(found: MetricReport, sizes: Sequence[int], begin: int, unit: str) -> Figure:
    end = begin + len(sizes)
    total = list(found.total().values())[begin:end]
    layers = [
        [None if pair is None else ratio(*pair) for pair in list(one.shares().values())[begin:end]]
        for one in found.layers
    ]
    independent = [
        _independent(found, n) if one is not None and not math.isnan(one) else None
        for n, one in zip(sizes, total, strict=True)
    ]
    blocks = [
        Series(
            name="each block" if i == 0 else "",
            values=tuple(in_percent(one) for one in values),
            style="faint",
        )
        for i, values in enumerate(layers)
    ]
    chart = Lines(
        title=f"Neurons that {unit} need together",
        y_label="active for at least one, %",
        x_label=unit,
        places=tuple(str(n) for n in sizes),
        series=(
            Series(name="all blocks", values=tuple(in_percent(one) for one in total)),
            Series(
                name="were tokens independent",
                values=tuple(in_percent(one) for one in independent),
                style="dashed",
            ),
            *blocks,
        ),
    )
    caption = (
        f"Share of neurons that are not exactly zero for at least one of so many {unit}. Dashed: what it "
        "would be if tokens drew their neurons independently, each neuron of a block being as likely as any "
        "other: 1 - (1 - density)^n, block by block. Distances between the numbers of tokens are those of "
        "their logarithms. "
    )
    caption += (
        "Chunks do not overlap and begin with the first token of a window."
        if begin == 0
        else "Sequences are taken in the order of a batch, at the same position of each."
    )
    rows = [(layer.name, *map(share, values)) for layer, values in zip(found.layers, layers, strict=True)]
    rows += [("all blocks", *map(share, total)), ("were tokens independent", *map(share, independent))]
    table = Table(
        caption=f"density of the union over {unit}",
        head=("MLP block", *map(str, sizes)),
        rows=tuple(rows),
    )
    return Figure(chart=chart, caption=caption, table=table)


def _independent(found: MetricReport, n: int) -> float:
    """Over all blocks, the union of n tokens whose neurons are drawn independently."""
    pairs = [(next(iter(one.shares().values())), one.neurons) for one in found.layers]
    known = [(ratio(*pair), neurons) for pair, neurons in pairs if pair is not None and pair[1]]
    return ratio(
        sum(neurons * (1 - (1 - density) ** n) for density, neurons in known),
        sum(neurons for _, neurons in known),
    )
