"""The result of a calibration."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.config import SparsityConfig


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

    @property
    def increase(self) -> float:
        """Of the perplexity, in percent."""
        return 100 * (self.perplexity / self.perplexity_before - 1)

    def __str__(self) -> str:
        return (
            f"{self.method}: sparsity {self.sparsity:.1%}, perplexity {self.perplexity_before:.4g} -> "
            f"{self.perplexity:.4g} ({self.increase:+.1f} %), {self.tokens:,} tokens\n"
            f"sparsity: share of {self.counts}"
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
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text
