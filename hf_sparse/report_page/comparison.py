"""The section that puts several reports side by side: sparsity against perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_sparse.metrics.report import SparsityReport
from hf_sparse.report_page.axes import around
from hf_sparse.report_page.charts import Point, Points
from hf_sparse.report_page.document import Figure, Note, Part, Section, Table
from hf_sparse.report_page.words import quality, share


def same_text(a: SparsityReport, b: SparsityReport) -> bool:
    """Whether both may be over the same text: as many tokens, in the same windows."""
    return (a.tokens, a.predicted_tokens, a.sequence_length) == (
        b.tokens,
        b.predicted_tokens,
        b.sequence_length,
    )


def comparison_section(
    report: SparsityReport,
    name: str,
    before: SparsityReport | None,
    beside: Mapping[str, SparsityReport],
) -> Section:
    """The Pareto plot of ``report``, ``before`` and ``beside``."""
    named = [(name, report)]
    if before is not None:
        named.append(("before", before))
    named += beside.items()
    points, rows, missing = [], [], []
    for number, (one, found) in enumerate(named, 1):
        fits = same_text(report, found) and math.isfinite(found.perplexity)
        if fits:
            point = Point(
                label=str(number),
                name=one,
                x=100 * found.sparsity,
                y=found.perplexity,
                main=found is report,
            )
            points.append(point)
        else:
            missing.append(str(number))
        rows.append((number, one, found, fits))
    best = front(points)
    on_front = {point.label for point in best}
    table = Table(
        caption="the reports of the plot",
        head=("report", "number", "sparsity", "density", "perplexity", "tokens", "on the front"),
        rows=tuple(
            (
                one,
                str(number),
                share(found.sparsity),
                share(found.density),
                quality(found.perplexity),
                f"{found.tokens:,}",
                ("yes" if str(number) in on_front else "no") if fits else "not drawn",
            )
            for number, one, found, fits in rows
        ),
    )
    chart = Points(
        title="Sparsity against perplexity",
        y_label="perplexity, lower is better",
        x_label="sparsity, %",
        points=tuple(points),
        front=best if len(best) > 1 else (),
    )
    caption = (
        "Each number is a report; the table has their names. Lower and further to the right is better. The "
        "line joins those that no other beats in both; between its ends nothing was measured. Axes need not "
        "begin at zero. All were measured over equal numbers of tokens and windows; that the text was the "
        "same, reports do not tell."
    )
    if points and around([one.y for one in points], least=0.0).log:
        caption += " The axis of perplexity is logarithmic."
    parts: list[Part] = [Figure(chart=chart, caption=caption, table=table) if points else table]
    if missing:
        parts.append(
            Note(
                f"Not drawn: {', '.join(missing)}. Their perplexity is not finite, or is over another number "
                "of tokens or other windows, and does not compare."
            )
        )
    return Section(heading="Beside other reports", parts=tuple(parts))


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """By sparsity, the points that no other beats: none is at least as good in both and better in one."""

    def beaten(one: Point) -> bool:
        return any(
            other.x >= one.x and other.y <= one.y and (other.x > one.x or other.y < one.y) for other in points
        )

    return tuple(sorted((one for one in points if not beaten(one)), key=lambda one: (one.x, one.y)))
