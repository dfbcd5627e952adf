"""The section on break-even and expected speed, from what :func:`hf_sparse.tune` timed on this machine."""

from __future__ import annotations

from collections import Counter

from hf_sparse.expected_speed import expected_times, measured_densities, timed_layers
from hf_sparse.metrics.report import SparsityReport
from hf_sparse.report_page.about import machine_in_words
from hf_sparse.report_page.charts import Bars, Lines, Series, Style
from hf_sparse.report_page.document import Figure, Note, Part, Section, Table, Text
from hf_sparse.report_page.words import milliseconds, share
from hf_sparse.tuning import TunedLayer, TuneReport
from triton_ops.tune import NO_SLOWER

_NOT_COUNTED = (
    "Not in it: attention, norms, embeddings, the output layer, and the program around them. It was not "
    "measured end to end, and a whole model gains less."
)


def speed_section(report: SparsityReport, tuned: TuneReport) -> Section:
    """When skipping pays here, and what it is worth at the densities of ``report``."""
    parts: list[Part] = [
        Text(
            f"Timed on {machine_in_words()}: MLP blocks of this model's shapes with random weights, which "
            "cycle past the caches; medians of several runs. What else ran on the machine is in the times."
        )
    ]
    expected = _expected(report, tuned)
    if expected is not None:
        parts.append(expected)
    timed = {layer.name for layer in timed_layers(tuned)}
    reasons = Counter(_reason(layer) for layer in tuned.layers if layer.name not in timed)
    parts += [
        Note(f"{count} {'layer is' if count == 1 else 'layers are'} not in the expected speed: {why}.")
        for why, count in reasons.items()
    ]
    parts.append(_break_even(report, tuned))
    return Section(heading="Expected speed on this machine", parts=tuple(parts))


def _reason(layer: TunedLayer) -> str:
    if layer.obstacle is not None:
        return layer.obstacle
    if layer.int8:
        return "its weights are int8, with which kernels skip on a CPU, and that was not timed"
    if not layer.problems:
        return "the tokens of a call are divided among experts, which was not timed"
    return "it was timed before, and the times were not kept; force=True times it again"


def _expected(report: SparsityReport, tuned: TuneReport) -> Figure | None:
    densities = measured_densities(tuned, report)
    times = expected_times(tuned, densities)
    if not times:
        return None
    layers = timed_layers(tuned)
    chart = Bars(
        title="MLP blocks: times faster than dense",
        y_label="times faster; 1 is as fast as dense",
        x_label="tokens in a call",
        places=tuple(str(one.tokens) for one in times),
        series=(Series(name="", values=tuple(one.ratio for one in times)),),
        numbered=False,
        reference=1.0,
    )
    linears = sum(layer.name not in densities for layer in layers)
    what = f"{len(layers) - linears} of the {len(report.layers)} MLP blocks"
    if linears:
        what += f" and {linears} linear layers with thresholds"
    caption = (
        f"Expected of {what} alone, each at the density that was measured of it, for so many tokens in a "
        "call: sequences times positions; 1 is a single sequence that is generated. Tokens are taken to draw "
        "their neurons independently. A layer where skipping does not pay counts with its dense time. "
        f"{_NOT_COUNTED}"
    )
    rows = tuple(
        (
            str(one.tokens),
            milliseconds(one.dense_ms),
            milliseconds(one.expected_ms),
            f"{one.ratio:.2f}",
            f"{one.skipping} of {len(layers)}",
        )
        for one in times
    )
    table = Table(
        caption="expected times of all these layers together",
        head=("tokens in a call", "dense, ms", "expected, ms", "times faster", "layers that skip"),
        rows=rows,
    )
    return Figure(chart=chart, caption=caption, table=table)


def _break_even(report: SparsityReport, tuned: TuneReport) -> Figure:
    groups: dict[tuple[str, tuple[float, ...], str], int] = Counter(
        (layer.shape, _limits(layer, tuned), layer.obstacle or "") for layer in tuned.layers
    )
    styles: tuple[Style, ...] = ("main", "other", "faint")  # thin lines look alike: the table tells them
    series = [
        Series(
            name=shape if i < 2 else "more shapes, see the table" if i == 2 else "",
            values=tuple(100 * one for one in limits),
            style=styles[min(i, 2)],
        )
        for i, (shape, limits, _) in enumerate(groups)
    ]
    own = Series(
        name="density of this model", values=(100 * report.density,) * len(tuned.tokens), style="dashed"
    )
    chart = Lines(
        title="Up to which density skipping pays",
        y_label="break-even density, %",
        x_label="tokens in a call",
        places=tuple(map(str, tuned.tokens)),
        series=(*series, own),
    )
    rows = tuple(
        (shape, str(count), *(f"{one:.0%}" if one else "never" for one in limits), why)
        for (shape, limits, why), count in groups.items()
    )
    table = Table(
        caption="break-even densities by tokens in a call",
        head=("shape", "layers", *map(str, tuned.tokens), "runs dense, for"),
        rows=(*rows, ("density of this model", "", *[share(report.density)] * len(tuned.tokens), "")),
    )
    caption = (
        "The largest of the timed densities at which, and below which, skipping is no slower than dense; "
        f"times up to {1 / NO_SLOWER - 1:.0%} longer count as no slower. A layer below the line of its shape "
        "skips. 0 says that it never pays."
    )
    return Figure(chart=chart, caption=caption, table=table)


def _limits(layer: TunedLayer, tuned: TuneReport) -> tuple[float, ...]:
    return tuple(layer.break_even[n - 1] if n <= len(layer.break_even) else 0.0 for n in tuned.tokens)
