"""The plots of a report. Imported only when they are drawn, since matplotlib is slow to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

_GREY, _LIGHT, _BLUE = "#b0b7c3", "#93b4f5", "#2563eb"


def draw_run(folder: Path, trained: Sequence[Record], evaluated: Sequence[Record]) -> str:
    """Loss and sparsity over the updates, while training and on held-out text; the name of the file."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    loss, sparsity = figure.subplots(1, 2)
    for axes, name, factor in ((loss, "loss", 1), (sparsity, "sparsity", 100)):
        # An infinite perplexity has a loss, and a run of experts may have no sparsity while training.
        for records, colour, label in ((trained, _LIGHT, "training"), (evaluated, _BLUE, "held-out text")):
            points = [(r["step"], factor * r[name]) for r in records if r.get(name) is not None]
            if points:
                mark = "o" if records is evaluated else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=mark, markersize=3)
        axes.set_xlabel("update")
    loss.set_ylabel("loss, nats per token")
    sparsity.set_ylabel("exact zeros into the down projections, %")
    sparsity.set_ylim(0, 103)
    loss.legend(frameon=False)
    return _saved(figure, folder, "report-run.png", loss, sparsity)


def draw_layers(folder: Path, original: Record | None, evaluated: Sequence[Record]) -> str:
    """Sparsity by layer before, patched and at the end; the name of the file."""
    states = [
        ("original", original, _GREY),
        ("patched", evaluated[0], _LIGHT),
        ("final", evaluated[-1], _BLUE),
    ]
    shown = [(name, record["layers"], colour) for name, record, colour in states if record is not None]
    names = list(evaluated[-1]["layers"])
    figure = Figure(figsize=(min(16.0, 3.5 + 0.6 * len(names)), 3.6), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    width = 0.8 / len(shown)
    for place, (label, shares, colour) in enumerate(shown):
        shift = (place - (len(shown) - 1) / 2) * width
        heights = [100 * (shares.get(name) or 0.0) for name in names]
        axes.bar([i + shift for i in range(len(names))], heights, width, color=colour, label=label)
    axes.set(xlabel="MLP block", ylabel="exact zeros, %", ylim=(0, 103))
    axes.set_xticks(range(0, len(names), max(1, len(names) // 16)))
    figure.legend(loc="outside upper left", frameon=False, ncols=3, fontsize=9)
    return _saved(figure, folder, "report-layers.png", axes)


def _saved(figure: Figure, folder: Path, name: str, *all_axes: Axes) -> str:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / name)
    return name
