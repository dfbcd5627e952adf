"""Fisher SAM: only where the squared gradient of the current batch is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_sparse.sharpness.chosen import matches
from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.masks import Masks, zeros_if_none
from hf_sparse.sharpness.part import Part
from hf_sparse.sharpness.patterns import share_of, unstructured


@dataclass(frozen=True, kw_only=True)
class FisherSamConfig(SharpnessConfig):
    """FSAM (Zhong et al., arXiv 2210.05497): SAM on the entries with most Fisher information.

    That is the squared gradient of the current batch, and the largest over all parameters are taken. The
    released code perturbs biases, embeddings and batch norms whole: ``whole: ["*bias*", "*embed*"]``.
    """

    name = "fisher_sam"

    keep: float = 0.1
    """Share of the entries that is perturbed (published: 0.1)."""

    interval: int = 100
    """Updates between new masks, which are used at once (published: 100 and 1)."""

    whole: list[str] = field(default_factory=list)
    """Patterns of parameters or modules that are perturbed in every entry and do not count in ``keep``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_share("keep")
        self._require_at_least(1, "interval")
        self._require(all(self.whole), "whole", "a pattern cannot be empty")

    def masks(self, parts: Sequence[Part], steps: int | None) -> Masks:
        masked = [not matches(part.name, self.whole) for part in parts]
        for pattern in self.whole:
            ok = any(matches(part.name, [pattern]) for part in parts)
            self._require(ok, "whole", f"{pattern!r} matches none of the parameters that are perturbed")
        kept = share_of([p for p, one in zip(parts, masked, strict=True) if one], self.keep)
        self._require(
            kept > 0 or not any(masked), "keep", "of so few parameters it is not one entry; raise it"
        )
        return _Masks(self, parts, masked)


class _Masks(Masks):
    def __init__(self, config: FisherSamConfig, parts: Sequence[Part], masked: Sequence[bool]) -> None:
        super().__init__(parts)
        self._config, self._masked = config, [i for i, one in enumerate(masked) if one]

    def before(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        made = all(isinstance(self.values[i], Tensor) for i in self._masked)
        if made and (step - 1) % self._config.interval:
            return
        # By the size of a gradient instead of its square, which can underflow; the order is the same.
        parts = [self.parts[i] for i in self._masked]
        sizes = [zeros_if_none(gradients[i], self.parts[i]) for i in self._masked]
        for i, mask in zip(self._masked, unstructured(sizes, self._config.keep, parts), strict=True):
            self.values[i] = mask
