"""A fitted law as a picture. Imported only when one is asked for, since matplotlib is slow to load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_sparse.laws.report import SparsingLaw

_GREY, _BLUE = "#b0b7c3", "#2563eb"
_STEPS = 200


def draw(law: SparsingLaw, path: Path, tokens: float | None) -> Path:
    """Points, curve and interval over tokens; see :meth:`SparsingLaw.plot`."""
    try:
        # The object interface: no global state, no display, no choice of a backend.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'hf-sparse[plot]'") from error
    first, last = law.points[0][0], law.points[-1][0]
    end = max(10 * last if tokens is None else tokens, last)
    at = [first * (end / first) ** (i / (_STEPS - 1)) for i in range(_STEPS)]
    found = [law.predict(x) for x in at if 0 <= law.curve(x) <= 1]
    x = [one.tokens for one in found]

    figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    low, high = [100 * one.low for one in found], [100 * one.high for one in found]
    axes.fill_between(
        x, low, high, color=_BLUE, alpha=0.15, linewidth=0, label=f"{law.confidence:.0%} interval"
    )
    axes.plot(x, [100 * one.ratio for one in found], color=_BLUE, label=f"{law.curve}, D in 1e9")
    axes.axhline(100 * law.limit, color=_GREY, linestyle="--", linewidth=1, label=f"limit {law.limit:.2%}")
    points = [(a, 100 * b) for a, b in law.points]
    seen, ratios = zip(*points, strict=True)
    axes.scatter(seen, ratios, color="black", s=14, zorder=3, label=f"{len(points)} points")
    axes.set(xscale="log", xlabel="training tokens", ylabel="activation ratio, %")
    axes.set_ylim(bottom=0 if law.form == "relu" else None)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, ncols=2, fontsize=8)
    figure.savefig(path)
    return path
