"""What is on the page of a report: the sections, in their order; those without data are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from hf_sparse.metrics.cett_report import CETTReport
from hf_sparse.metrics.report import DEFINITION, SparsityReport
from hf_sparse.report_page.about import about_section, name_of
from hf_sparse.report_page.comparison import comparison_section, same_text
from hf_sparse.report_page.document import Document, Headline, Note, Part, Section, Text
from hf_sparse.report_page.layers import neurons_section, sparsity_section, tokens_section
from hf_sparse.report_page.tails import tails_section
from hf_sparse.report_page.unions import derivative_section, other_sections, union_section
from hf_sparse.report_page.words import counted, nats, quality, share

if TYPE_CHECKING:
    from hf_sparse.tuning import TuneReport


def contents(
    report: SparsityReport,
    *,
    model: nn.Module | None = None,
    model_name: str | None = None,
    data: str | None = None,
    before: SparsityReport | None = None,
    beside: Mapping[str, SparsityReport] | None = None,
    speed: TuneReport | None = None,
    cett: CETTReport | None = None,
) -> Document:
    """The page of ``report``; see :meth:`hf_sparse.SparsityReport.to_html` for the arguments.

    Raises:
        ValueError: ``before`` is of a model with other blocks, or ``model``, ``speed`` or ``cett`` is of
            another one.
        PatchError: ``model`` has no MLP blocks.

    """
    _check(report, before, speed, cett)
    name = model_name or (name_of(model) if model is not None else "a model")
    sections: list[Section | None] = [
        _headline(report, before),
        about_section(report, model, model_name, data),
        sparsity_section(report, before),
        neurons_section(report),
        tokens_section(report),
        union_section(report),
        derivative_section(report),
        *other_sections(report),
    ]
    if cett is not None:
        sections.append(tails_section(cett))
    if beside:
        sections.append(comparison_section(report, name, before, beside))
    if speed is not None:
        from hf_sparse.report_page.speed import speed_section  # tune imports what imports this

        sections.append(speed_section(report, speed))
    return Document(
        title=f"Activation sparsity of {name}",
        summary=(
            f"{share(report.sparsity)} of the values that reach the down projections of its "
            f"{len(report.layers)} MLP blocks are exact zeros, at a perplexity of "
            f"{quality(report.perplexity)}, over {report.tokens:,} tokens."
        ),
        sections=tuple(one for one in sections if one is not None),
        footer="Written by hf_sparse. This page is one file: it loads nothing and runs nothing.",
    )


def _headline(report: SparsityReport, before: SparsityReport | None) -> Section:
    neurons = sum(layer.neurons for layer in report.layers)
    dead = report.dead
    old = ["", "", "", ""]
    if before is not None:
        quality_before = quality(before.perplexity) + _rise(report, before)
        told = (share(before.sparsity), share(before.density), quality_before, nats(before.loss))
        old = [f"before: {one}" for one in told]
    window = f"in windows of {report.sequence_length:,}" if report.sequence_length else "in batches"
    numbers = [
        ("Sparsity", share(report.sparsity), old[0]),
        ("Density", share(report.density), old[1]),
        ("Perplexity", quality(report.perplexity), old[2]),
        ("Loss, nats per token", nats(report.loss), old[3]),
        ("Tokens", f"{report.tokens:,}", window),
    ]
    if dead is not None:
        numbers.append(("Dead neurons", counted(dead), f"of {neurons:,}"))
    parts: list[Part] = [
        Headline(numbers=tuple(numbers)),
        Text(
            f"{DEFINITION[0].upper()}{DEFINITION[1:]}, over tokens, neurons and layers. Density is the rest: "
            "the neurons that have to be computed. Perplexity is the exponential of the mean loss of the "
            "next token."
        ),
    ]
    if before is not None and not same_text(report, before):
        parts.append(
            Note(
                f"Before is over {before.tokens:,} tokens{_window(before)}, this model over "
                f"{report.tokens:,}{_window(report)}: the text was not the same, and the perplexities do "
                "not compare."
            )
        )
    return Section(heading="In short", parts=tuple(parts))


def _rise(report: SparsityReport, before: SparsityReport) -> str:
    change = report.loss - before.loss
    if not same_text(report, before) or not math.isfinite(change) or abs(change) > 100:
        return ""
    return f" ({100 * math.expm1(change):+.1f} %)"


def _window(report: SparsityReport) -> str:
    return f" in windows of {report.sequence_length:,}" if report.sequence_length else " in batches"


def _check(
    report: SparsityReport,
    before: SparsityReport | None,
    speed: TuneReport | None,
    cett: CETTReport | None,
) -> None:
    if before is not None:
        sizes = [[layer.neurons for layer in one.layers] for one in (before, report)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"before has {len(before.layers)} MLP blocks and this report {len(report.layers)}, or their "
                "sizes differ; they must be of the same model."
            )
    if speed is not None:
        from hf_sparse.expected_speed import measured_densities

        if not measured_densities(speed, report):
            raise ValueError(
                "speed is of another model: it has none of the MLP blocks of this report. Give what "
                "hf_sparse.tune found for the model that was measured."
            )
    if cett is not None:
        blocks = {(layer.name, layer.neurons) for layer in report.layers}
        if not {(layer.name, layer.neurons) for layer in cett.layers} <= blocks:
            raise ValueError(
                "cett is of another model: it has MLP blocks that this report does not have. Give what "
                "hf_sparse.cett_sparsity found for the model that was measured."
            )
