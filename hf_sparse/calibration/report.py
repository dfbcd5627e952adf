"""The result of a calibration."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_sparse.config import SparsityConfig
from triton_ops.table import table


@dataclass(frozen=True, kw_only=True)
class TriedMethod:
    """What became of one method where ``method="best"`` was asked for."""

    method: str
    sparsity: float | None = None
    """Of what the method prunes, 0 to 1; None if it was left out."""
    unread: float | None = None
    """The share of the weights of the linear layers of attention and MLP that a token does not need, 0 to 1,
    in the layers whose blocks are patched; of experts, those that the token is routed to."""
    perplexity: float | None = None
    """With it, on the data."""
    left_out: str | None = None
    """Why it was left out, if it was."""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What :func:`hf_sparse.calibrate` has made of a model; ``print`` shows it."""

    method: str
    counts: str
    """What the sparsity is a share of."""
    config: SparsityConfig
    """What the model is patched with now."""
    sparsity: float
    """Of the calibrated model on the data, 0 to 1."""
    perplexity_before: float
    """Of the model without thresholds of this method, on the data."""
    perplexity: float
    """Of the calibrated model on the data."""
    tokens: int
    """Tokens of the data."""
    tried: tuple[TriedMethod, ...] = ()
    """Of ``method="best"``, the methods that were tried, the kept one first and those left out last."""

    @property
    def increase(self) -> float:
        """Of the perplexity, in percent."""
        return 100 * (self.perplexity / self.perplexity_before - 1)

    def __str__(self) -> str:
        return (
            f"{self.method}: sparsity {self.sparsity:.1%}, perplexity {self.perplexity_before:.4g} -> "
            f"{self.perplexity:.4g} ({self.increase:+.1f} %), {self.tokens:,} tokens\n"
            f"sparsity: share of {self.counts}"
        ) + (f"\n{self._comparison()}" if self.tried else "")

    def _comparison(self) -> str:
        rows: list[list[str] | None] = [["method", "sparsity", "unread", "perplexity", ""], None]
        for one in self.tried:
            if one.left_out is None:
                numbers = f"{one.sparsity:.1%}", f"{one.unread:.1%}", f"{one.perplexity:.4g}"
                rows.append([one.method, *numbers, "kept" if one.method == self.method else ""])
        return "\n".join(
            [
                table(rows, left=(0, -1)),
                "unread: share of the weights of attention and MLP that a token does not need",
                *(f"left out: {one.method}, {one.left_out}" for one in self.tried if one.left_out),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "method": self.method,
            "counts": self.counts,
            "config": self.config.to_dict(),
            "sparsity": self.sparsity,
            "perplexity_before": self.perplexity_before,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "tried": [asdict(one) for one in self.tried],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text
