"""Sparsity by layer as a picture. Imported only when one is asked for, since matplotlib is slow to load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_sparse.metrics.report import SparsityReport

_GREY, _BLUE = "#b0b7c3", "#2563eb"


def draw(report: SparsityReport, path: Path, before: SparsityReport | None) -> Path:
    """Bars of ``report``, beside those of ``before``; see :meth:`SparsityReport.plot`."""
    try:
        # The object interface: no global state, no display, no choice of a backend.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'hf-sparse[plot]'") from error
    if before is not None and len(before.layers) != len(report.layers):
        raise ValueError(
            f"before has {len(before.layers)} MLP blocks and this report {len(report.layers)}; "
            "they must be of the same model."
        )
    series = [("after" if before else "", report, _BLUE)]
    if before is not None:
        series.insert(0, ("before", before, _GREY))

    count = len(report.layers)
    figure = Figure(figsize=(min(16.0, 3.5 + 0.55 * count), 4.0), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for index, (label, one, colour) in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * width
        heights = [100 * layer.sparsity for layer in one.layers]
        overall = f"{100 * one.sparsity:.1f} % overall, perplexity {one.perplexity:.4g}"
        bars = axes.bar(
            [i + shift for i in range(count)],
            heights,
            width,
            color=colour,
            label=f"{label}: {overall}" if label else overall,
        )
        if count <= 12:
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(xlabel="MLP block", ylabel="exact zeros into the down projection, %", ylim=(0, 108))
    axes.set_xticks(range(0, count, max(1, count // 16)))
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, ncols=1, fontsize=9)
    figure.savefig(path)
    return path
