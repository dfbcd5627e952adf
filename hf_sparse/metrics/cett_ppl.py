"""CETT-PPL-p %: how sparse a model is if its perplexity may rise by p %, whatever its activation.

Sparsing Law (arXiv 2411.02335). The outer search is the published one; the inner one reads thresholds off
curves that one pass has counted (:mod:`hf_sparse.metrics.cett`), in the place of 65,536 candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_sparse.metrics.cett import CETT
from hf_sparse.metrics.sparsity import ZeroCounter
from hf_sparse.metrics.tail import without_tails
from hf_sparse.observing import Pass, blocks_of, observe
from hf_sparse.observing.batches import as_batches
from hf_sparse.observing.running import inner_model, without_copies
from triton_ops.table import table

_NARROWEST = 1e-6
"""Of the interval of CETT, as in the published code."""


@dataclass(frozen=True, kw_only=True)
class LayerTail:
    """One MLP block without its tail, over all tokens."""

    name: str
    """Qualified name of the block, as in ``model.get_submodule(name)``."""
    neurons: int
    """Intermediate size F."""
    threshold: float
    """Neuron j is left out where ``|h_j| * |W_down[:, j]|``, in the units of the output, is at most this."""
    sparsity: float
    """Share of neurons left out, 0 to 1, those of h = 0 among them."""
    zeros: float
    """Share of neurons with h = 0 in the model as it is."""


@dataclass(frozen=True, kw_only=True)
class CETTReport:
    """What :func:`hf_sparse.cett_sparsity` found; ``print`` shows it as a table."""

    layers: tuple[LayerTail, ...]
    """The MLP blocks in the order of the model, without those that no token reached."""
    p: float
    """The rise of perplexity that was asked for, in percent."""
    cett: float
    """The error that all blocks share: mean over tokens, a share of the norm of their outputs."""
    loss_before: float
    """Mean cross-entropy of the model as it is, in nats."""
    loss: float
    """The same without the tails."""
    tokens: int
    """Tokens that both are over, without padding."""
    predicted_tokens: int
    sequence_length: int | None
    """Tokens in a window of text; None if the data came in batches."""

    @property
    def sparsity(self) -> float:
        """Share of neurons left out over all blocks, 0 to 1: CETT-PPL-p %."""
        return _mean(self.layers, "sparsity")

    @property
    def density(self) -> float:
        """``1 - sparsity``."""
        return 1 - self.sparsity

    @property
    def zeros(self) -> float:
        """Share of neurons with h = 0 in the model as it is, over all blocks."""
        return _mean(self.layers, "zeros")

    @property
    def perplexity_before(self) -> float:
        """``exp(loss_before)``."""
        return math.exp(self.loss_before)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)

    @property
    def rise(self) -> float:
        """By how much perplexity rose, in percent; ``p`` within the tolerance."""
        return _rise(self.loss, self.loss_before)

    def __str__(self) -> str:
        def row(name: str, neurons: int, threshold: str, of: LayerTail | CETTReport) -> tuple[str, ...]:
            return name, f"{neurons:,}", threshold, f"{of.sparsity:.2%}", f"{of.zeros:.2%}"

        rows = [
            ("MLP block", "neurons", "threshold", "sparsity", "exact zeros"),
            None,
            *(row(one.name, one.neurons, f"{one.threshold:.3g}", one) for one in self.layers),
            None,
            row("all layers", sum(one.neurons for one in self.layers), "", self),
        ]
        window = f" in windows of {self.sequence_length:,}" if self.sequence_length else ""
        return (
            f"{table(rows)}\n"
            f"perplexity {self.perplexity_before:.4g} -> {self.perplexity:.4g} (+{self.rise:.3g} %), "
            f"CETT {self.cett:.4g}, {self.tokens:,} tokens{window}\n"
            f"sparsity: share of neurons that may be left out for a perplexity {self.p:g} % higher "
            f"(CETT-PPL-{self.p:g} %, arXiv 2411.02335)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = asdict(self)
        names = ("sparsity", "density", "zeros", "perplexity_before", "perplexity", "rise")
        shares = {name: getattr(self, name) for name in names}
        return {**found, **shares, "layers": [asdict(layer) for layer in self.layers]}


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

    Thresholds come from curves of 161 candidates from 6e-8 to 65,536, 19 % apart, between which the error is
    taken for a power of the threshold. Each block's curve is of the model as it is, as published: with the
    tails of the blocks below left out, its error is another one. Perplexity need not rise steadily, above all
    that of a model that was patched and not trained: then this is one of the points where it is ``p`` % up.

    Args:
        model: as :func:`hf_sparse.measure` takes it.
        data: texts, rows with a ``"text"``, or batches; the tokens of all are kept in memory.
        p: rise of perplexity, in percent.
        tolerance: how far the rise may be from ``p``, as a share of it.
        calibration_tokens: the curves are of so many of the first tokens of ``data``, in whole batches. They
            take longest: up to a hundred products with the down projections.
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

    def run(cett: float) -> tuple[Pass, tuple[LayerTail, ...]]:
        thresholds = [curve.threshold(cett) for curve in found.values()]
        counters = [ZeroCounter(block) for block in blocks]
        with without_tails(blocks, thresholds):
            passed = observe(model, kept, counters, progress=progress)
        layers = tuple(
            LayerTail(
                name=block.name,
                neurons=block.intermediate_size,
                threshold=threshold,
                sparsity=counter.result().sparsity,
                zeros=before[i].result().sparsity,
            )
            for i, block, threshold, counter in zip(found, blocks, thresholds, counters, strict=True)
        )
        return passed, layers

    low, high = 0.0, 1.0
    rises = {low: 0.0, high: math.inf}
    while high - low > _NARROWEST:
        cett = (low + high) / 2
        passed, layers = run(cett)
        rises[cett] = rise = _rise(passed.loss, dense.loss)
        if abs(rise - p) <= tolerance * p:
            return CETTReport(
                layers=layers,
                p=p,
                cett=cett,
                loss_before=dense.loss,
                loss=passed.loss,
                tokens=passed.tokens,
                predicted_tokens=passed.predicted_tokens,
                sequence_length=window,
            )
        low, high = (cett, high) if rise < p else (low, cett)
    if high == 1:
        raise ValueError(
            f"perplexity rises by {rises[low]:.3g} % with nearly all neurons left out, and never by p={p:g} "
            "%: on this data the MLPs of the model are of no use."
        )
    raise ValueError(
        f"at CETT {low:.3g} the rise of perplexity jumps from {rises[low]:.3g} % to {rises[high]:.3g} %, past "
        f"p={p:g} % with tolerance={tolerance:g}. Give more data than {dense.tokens:,} tokens, or a larger "
        "tolerance."
    )


def _rise(loss: float, before: float) -> float:
    """Of perplexity, in percent."""
    try:
        return 100 * math.expm1(loss - before)
    except OverflowError:
        return math.inf


def _mean(layers: tuple[LayerTail, ...], name: str) -> float:
    """Over blocks, weighted by their neurons."""
    return sum(getattr(one, name) * one.neurons for one in layers) / sum(one.neurons for one in layers)
