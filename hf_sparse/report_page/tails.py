"""The section on CETT-PPL-p %, from what :func:`hf_sparse.cett_sparsity` found."""

from __future__ import annotations

from hf_sparse.metrics.cett_report import CETTReport
from hf_sparse.report_page.charts import Bars, Series
from hf_sparse.report_page.document import Figure, Section, Table
from hf_sparse.report_page.layers import IN_ORDER
from hf_sparse.report_page.words import in_percent, quality, share


def tails_section(found: CETTReport) -> Section:
    """How many neurons of each block can be left out, beside those that are exactly zero."""
    layers = found.layers
    chart = Bars(
        title="Neurons that can be left out by MLP block",
        y_label="share of the neurons, %",
        x_label="MLP block",
        places=tuple(one.name for one in layers),
        series=(
            Series(name="exact zeros", values=tuple(in_percent(one.zeros) for one in layers), style="other"),
            Series(name="can be left out", values=tuple(in_percent(one.sparsity) for one in layers)),
        ),
        top=100,
    )
    window = f" in windows of {found.sequence_length:,}" if found.sequence_length else " in batches"
    caption = (
        f"{share(found.sparsity)} of the neurons can be left out, those that add least to the output of "
        f"their block, until perplexity is {found.p:g} % higher (CETT-PPL-{found.p:g} %, arXiv 2411.02335): "
        f"{quality(found.perplexity_before)} to {quality(found.perplexity)}, {found.rise:+.3g} %, over "
        f"{found.tokens:,} tokens{window}, with an error of {found.cett:.2%} in each block's output (CETT). "
        f"Exact zeros are among them. {IN_ORDER}"
    )
    rows = [
        (one.name, f"{one.neurons:,}", f"{one.threshold:.3g}", share(one.sparsity), share(one.zeros))
        for one in layers
    ]
    neurons = sum(one.neurons for one in layers)
    rows.append(("all blocks", f"{neurons:,}", "", share(found.sparsity), share(found.zeros)))
    table = Table(
        caption="neurons that can be left out, by block",
        head=("MLP block", "neurons", "threshold", "can be left out", "exact zeros"),
        rows=tuple(rows),
    )
    figure = Figure(chart=chart, caption=caption, table=table)
    return Section(heading=f"Sparsity at a perplexity {found.p:g} % higher", parts=(figure,))
