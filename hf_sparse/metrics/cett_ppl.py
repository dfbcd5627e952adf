"""CETT-PPL-p %: how sparse a model is if its perplexity may rise by p %, whatever its activation.

Sparsing Law (arXiv 2411.02335). The outer search is the published one; the inner one reads thresholds off
curves that one pass has counted (:mod:`hf_sparse.metrics.cett`), in the place of 65,536 candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from hf_sparse.metrics.cett import CETT
from hf_sparse.metrics.cett_report import CETTReport, LayerTail
from hf_sparse.metrics.sparsity import ZeroCounter
from hf_sparse.metrics.tail import without_tails
from hf_sparse.observing import blocks_of, observe
from hf_sparse.observing.batches import as_batches
from hf_sparse.observing.running import inner_model, without_copies

_NARROWEST = 1e-6
"""Of the interval of CETT, as in the published code."""


def cett_sparsity(
    model: nn.Module,
    data: Iterable[Any],
    p: float = 1.0,
    *,
    tolerance: float = 0.02,
    calibration_tokens: int = 8192,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
) -> CETTReport:
    """How many neurons can be left out, the least ones, until perplexity on ``data`` is ``p`` % higher.

    CETT-PPL-p % (arXiv 2411.02335), which compares models of any activation: ReLU, SiLU, patched or not. In
    each block neurons are left out by what they add to the output, up to a threshold at which the error of
    the output, as a mean over tokens, is the same in all blocks; and that error is chosen by bisection. The
    published choice is 1 %. The model is left as it was, and nothing is kept of the thresholds in it.

    Thresholds come from curves of 257 candidates from 1.5e-5 to 65,536, 9 % apart, between which the error is
    taken for a power of the threshold. Each block's curve is of the model as it is, as published: with the
    tails of the blocks below left out, its error is another one. Perplexity need not rise steadily, above all
    that of a model that was patched and not trained: then this is one of the points where it is ``p`` % up.

    Args:
        model: as :func:`hf_sparse.measure` takes it.
        data: texts, rows with a ``"text"``, or batches; the tokens of all are kept in memory.
        p: rise of perplexity, in percent.
        tolerance: how far the rise may be from ``p``, as a share of it.
        calibration_tokens: the curves are of so many of the first tokens of ``data``, in whole batches. That
            takes several times as long as these tokens take else.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text; None means the model's context, at most 1,024.
        batch_size: windows per forward.
        max_tokens: stop after this many tokens.
        progress: show a progress bar for each pass, of which there are about twelve.

    Raises:
        PatchError: no MLP block of a known shape in ``model``; stacked experts, or a down projection whose
            weight cannot be read (an adapter, quantised, offloaded, split). The message names the block.
        ValueError: no data, or data of another kind; an argument out of range; perplexity is not finite,
            rises less than ``p`` % with all neurons left out, or in steps larger than the tolerance.

    """
    if not 0 < p < math.inf:
        raise ValueError(f"p={p} is no rise of perplexity in percent; use a positive number, such as 1.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} is out of range; it is a share of p, between 0 and 1.")
    if calibration_tokens < 1:
        raise ValueError(f"calibration_tokens={calibration_tokens} is out of range; use 1 or more.")
    blocks = blocks_of(model)
    curves = [CETT(block) for block in blocks]
    batches, window = as_batches(
        inner_model(without_copies(model)),
        data,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    kept: list[Any] = []

    def keeping() -> Iterator[Any]:
        for batch in batches:
            kept.append(batch)
            yield batch

    before = [ZeroCounter(block) for block in blocks]
    dense = observe(model, keeping(), before, max_tokens=max_tokens, progress=progress)
    if not math.isfinite(dense.loss):
        raise ValueError(f"the loss of the model on this data is {dense.loss}; its perplexity cannot rise.")
    observe(model, kept, curves, max_tokens=calibration_tokens, progress=progress)
    found = {i: curve.result() for i, curve in enumerate(curves) if curve.tokens}
    blocks = [blocks[i] for i in found]

    def without(cett: float) -> CETTReport:
        thresholds = [curve.threshold(cett) for curve in found.values()]
        counters = [ZeroCounter(block) for block in blocks]
        with without_tails(blocks, thresholds):
            passed = observe(model, kept, counters, progress=progress)
        layers = (
            LayerTail(
                name=block.name,
                neurons=block.intermediate_size,
                threshold=threshold,
                sparsity=counter.result().sparsity,
                zeros=before[i].result().sparsity,
            )
            for i, block, threshold, counter in zip(found, blocks, thresholds, counters, strict=True)
        )
        return CETTReport(
            layers=tuple(layers),
            p=p,
            cett=cett,
            loss_before=dense.loss,
            loss=passed.loss,
            tokens=passed.tokens,
            predicted_tokens=passed.predicted_tokens,
            sequence_length=window,
        )

    return _bisect(without, p, tolerance)


def _bisect(without: Callable[[float], CETTReport], p: float, tolerance: float) -> CETTReport:
    """The report at a CETT between 0 and 1 whose rise is ``p``, within a share ``tolerance`` of it.

    Raises:
        ValueError: none is.

    """
    low, high = 0.0, 1.0
    below, above = 0.0, math.inf  # the rise there
    tokens = 0
    while high - low > _NARROWEST:
        report = without((low + high) / 2)
        rise, tokens = report.rise, report.tokens
        if abs(rise - p) <= tolerance * p:
            return report
        if rise < p:
            low, below = report.cett, rise
        else:
            high, above = report.cett, rise
    if high == 1:
        raise ValueError(
            f"perplexity rises by {below:.3g} % with nearly all neurons left out, and never by p={p:g} %: on "
            "this data the MLPs of the model are of no use."
        )
    raise ValueError(
        f"at CETT {low:.3g} the rise of perplexity jumps from {below:.3g} % to {above:.3g} %, past p={p:g} % "
        f"with tolerance={tolerance:g}. Give more data than {tokens:,} tokens, or a larger tolerance."
    )
