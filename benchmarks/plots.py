"""The figure of an MLP benchmark: speed-up over dense with the byte limit, one panel per shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {"bfloat16": "#1f5fbf", "float16": "#d9730d", "float32": "#2e8b57"}
STYLES = ("o", "s", "^", "D", "v", "P")  # markers of what is compared within one dtype


@dataclass(frozen=True)
class Plot:
    """What of the rows is drawn."""

    x: str
    """The field along the horizontal axis."""
    label: str
    """What the axis says."""
    series: Callable[[dict[str, Any]], str]
    """What is compared within one dtype."""
    title: str
    scale: float = 1.0
    """Of the field, to what the axis says."""
    log: bool = False


def draw(path: Path, rows: Sequence[dict[str, Any]], plot: Plot) -> Path:
    """Write the figure; returns the file.

    Raises:
        SystemExit: matplotlib is not installed.

    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'hf-sparse[plot]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    columns = min(len(shapes), 2)
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.6 * columns, 0.9 + 3.8 * lines), squeeze=False, layout="constrained"
    )
    for panel, shape in zip(axes.flat, shapes, strict=False):
        _panel(panel, [row for row in rows if row["shape"] == shape], plot)
    for unused in axes.flat[len(shapes) :]:
        unused.set_visible(False)
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(plot.title)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4 if len(handles) <= 4 else 3,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _panel(panel: Any, rows: list[dict[str, Any]], plot: Plot) -> None:
    compared = list(dict.fromkeys(plot.series(row) for row in rows))
    limits: list[tuple[list[float], list[float], str]] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for series, marker in zip(compared, STYLES * len(compared), strict=False):
            own = sorted(
                (row for row in rows if row["dtype"] == dtype and plot.series(row) == series),
                key=lambda row: row[plot.x],
            )
            if not own:
                continue
            xs = [row[plot.x] * plot.scale for row in own]
            ys = [row["speedup"] for row in own]
            low, high = zip(*(row["speedup_quartiles"] for row in own), strict=True)
            colour = COLOURS[dtype]
            label = f"{dtype}, {series}" if len(compared) > 1 else dtype
            panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            # Open markers tell the first of the compared from the others.
            face = "white" if marker == STYLES[0] and len(compared) > 1 else colour
            panel.plot(xs, ys, color=colour, marker=marker, markersize=4.5, markerfacecolor=face, label=label)
            limits.append((xs, [row["byte_limit"] for row in own], colour))
    for i, (xs, ys, colour) in enumerate(limits):
        # Dtypes share a limit, but for ties between neurons: one grey line for all of them.
        if not any(_close(ys, other) for _, other, _ in limits[:i]):
            shared = len({c for _, other, c in limits if _close(ys, other)}) > 1
            line = "0.25" if shared else colour
            panel.plot(xs, ys, color=line, linestyle="--", linewidth=1.1, label="byte limit", zorder=1)
    panel.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    if plot.log:
        panel.set_xscale("log", base=2)
    ticks = sorted({round(row[plot.x] * plot.scale) for row in rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    kind = "gated" if rows[0]["gated"] else "plain"
    panel.set_title(f"{rows[0]['shape']}: {rows[0]['hidden']} x {rows[0]['neurons']}, {kind}", fontsize=10)
    panel.set_xlabel(plot.label)
    panel.set_ylabel("times faster than dense, same dtype")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(p - q) <= 0.03 * q for p, q in zip(a, b, strict=True))
