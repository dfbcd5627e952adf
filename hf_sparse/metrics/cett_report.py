"""The result of a search for CETT-PPL-p %: numbers and a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from triton_ops.table import table


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


def _rise(loss: float, before: float) -> float:
    """Of perplexity, in percent."""
    try:
        return 100 * math.expm1(loss - before)
    except OverflowError:
        return math.inf


def _mean(layers: tuple[LayerTail, ...], name: str) -> float:
    """Over blocks, weighted by their neurons."""
    return sum(getattr(one, name) * one.neurons for one in layers) / sum(one.neurons for one in layers)
