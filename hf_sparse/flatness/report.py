"""The result of explain: numbers, a table, JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse.flatness.layer import LayerFlatness
from triton_ops.table import table

IDENTITY = "density = AF_K / (T n C), with C = |x|² · g² · σ'² · coupling"
"""What is exact."""

_MODULES = {"zeroth_bias": "zeroth bias", "restricted_norm": "restricted norm", "jsrelu": "J-SquaredReLU"}


@dataclass(frozen=True, kw_only=True)
class FlatnessReport:
    """What :func:`hf_sparse.explain` found; ``print`` shows it as a table.

    Reports of one model on parts of the data add up, with ``+`` or ``sum``, to the report on all of it.
    """

    layers: tuple[LayerFlatness, ...]
    """The MLP blocks in the order of the model."""
    loss: float
    """Mean cross-entropy of the next token, in nats, over all predicted tokens."""
    tokens: int
    """Tokens that went through the model, without padding; of an encoder-decoder, through both of its stacks.
    """
    predicted_tokens: int
    """Tokens the loss is over."""
    sequence_length: int | None = None
    """Tokens in a window of text; None if the data came in batches."""

    @property
    def density(self) -> float:
        """Share of neurons with ``σ'(p) ≠ 0`` over tokens, neurons and layers, counted."""
        return sum(x.keys.active for x in self.layers) / sum(x.tokens * x.neurons for x in self.layers)

    @property
    def deviation(self) -> float:
        """How far the identity is off at most, relative to the density: by rounding."""
        return max((x for layer in self.layers if math.isfinite(x := deviation(layer))), default=0.0)

    def __add__(self, other: FlatnessReport) -> FlatnessReport:
        """The report over the data of both.

        Raises:
            ValueError: they are of different models, or over windows of different lengths.

        """
        if len(self.layers) != len(other.layers) or self.sequence_length != other.sequence_length:
            raise ValueError(
                f"a report of {len(self.layers)} MLP blocks with sequence_length={self.sequence_length} and "
                f"one of {len(other.layers)} with {other.sequence_length} do not add up; they must be of the "
                "same model and over windows of one length."
            )
        predicted = self.predicted_tokens + other.predicted_tokens
        summed = self.loss * self.predicted_tokens + other.loss * other.predicted_tokens
        return replace(
            self,
            layers=tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)),
            loss=summed / predicted,
            tokens=self.tokens + other.tokens,
            predicted_tokens=predicted,
        )

    def __radd__(self, nothing: int) -> FlatnessReport:
        return self if nothing == 0 else NotImplemented  # sum() begins with 0

    def __str__(self) -> str:
        gated = any(layer.form == "gated" for layer in self.layers)
        spectra = any(layer.key_spectrum is not None for layer in self.layers)
        head = ["MLP block", "density", "AF_K/T", "C", "|x|²/D", "g²", "σ'²", "coupling"]
        head += ["u²"] * gated + ["s₁/sᵣ of K"] * spectra + ["norm", "jsrelu"]
        rows = [tuple(head), None, *(_row(layer, gated, spectra) for layer in self.layers)]
        window = f" in windows of {self.sequence_length:,}" if self.sequence_length else ""
        lines = [
            table(rows),
            f"density: {self.density:.2%} of all neurons have σ'(p) ≠ 0; loss {self.loss:.4f}, "
            f"{self.tokens:,} tokens{window}",
            f"exact: {IDENTITY}; off by {self.deviation:.1g} here",
            self._gradients(),
        ]
        if gated:
            lines.append("gated: g = u · ∂L/∂h, and nothing bounds u, the output of the up projection")
        return "\n".join([*lines, *self._dense(), *self._conjectures()])

    def _gradients(self) -> str:
        pairs = sum(layer.tokens * layer.neurons for layer in self.layers)
        zeros = sum(layer.effective_gradient.zeros for layer in self.layers) / pairs
        shares = sum(layer.effective_gradient.shares * layer.neurons for layer in self.layers) / pairs
        return f"effective gradient ∂L/∂p: {zeros:.2%} exactly zero; on about {shares:.2%} of the neurons"

    def _dense(self) -> Iterator[str]:
        """What can be said of activations that are never silent."""
        dense = [layer for layer in self.layers if not layer.gives_zeros]
        if not dense:
            return
        pairs = sum(layer.tokens * layer.neurons for layer in dense)
        positive = sum(layer.keys.positive for layer in dense) / pairs
        flatness = sum(layer.keys.flatness for layer in dense)
        share = sum(layer.keys.positive_flatness for layer in dense) / flatness if flatness else math.nan
        yield (
            f"dense: the activation of {len(dense)} blocks is not known to give zeros. Where σ' is nowhere 0 "
            "the density is 1,\n  and the identity, AF_K = T n C, says nothing about silence."
        )
        yield (
            f"  p > 0 for {positive:.2%} of their neurons, which have {share:.2%} of AF_K: those ReLU would "
            "keep at these inputs"
        )

    def _conjectures(self) -> Iterator[str]:
        yield (
            "conjecture (arXiv 2605.25612): training keeps AF_K small, so a larger C ends in a lower "
            "density.\n  At the present weights both grow alike and the density stays. Factors of C, now:"
        )
        of = [layer.outlooks for layer in self.layers]
        for index, name in enumerate(_MODULES.values()):
            column = [one[index] for one in of]
            factors = [one.factor for one in column if one.factor is not None and not one.note]
            notes = [one.note for one in column if one.note]
            said = []
            if factors:
                least, most = (f"{end:.3g}" for end in (min(factors), max(factors)))
                said.append(f"{least if least == most else f'{least} to {most}'}")
            if notes:
                blocks = "" if len(notes) == len(column) else f" ({len(notes)} of {len(column)} blocks)"
                said.append("; ".join(dict.fromkeys(notes)) + blocks)
            yield f"  {name} ({column[0].acts_on}): {'; '.join(said) or 'no number'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite is None."""
        return {
            "identity": IDENTITY,
            "density": self.density,
            "deviation": self.deviation,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "tokens": self.tokens,
            "predicted_tokens": self.predicted_tokens,
            "sequence_length": self.sequence_length,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def deviation(layer: LayerFlatness) -> float:
    """How far ``AF_K / (T n C)`` is off the density that was counted, relative to it."""
    return abs(layer.predicted_density / layer.density - 1) if layer.density else math.nan


def _row(layer: LayerFlatness, gated: bool, spectra: bool) -> tuple[str, ...]:
    numbers = [layer.key_flatness, layer.coefficient, layer.input_norm / layer.hidden_size]
    numbers += [layer.activation_gradient, layer.slope, layer.coupling]
    cells = [layer.name, f"{layer.density:.2%}", *(f"{one:.3g}" for one in numbers)]
    if gated:
        cells.append(f"{layer.factor:.3g}" if layer.form == "gated" else "")
    if spectra:
        cells.append("" if layer.key_spectrum is None else f"{layer.key_spectrum.ratio:.3g}")
    cells += ["" if one.factor is None else f"{one.factor:.2f}x" for one in layer.outlooks[1:]]
    return tuple(cells)
