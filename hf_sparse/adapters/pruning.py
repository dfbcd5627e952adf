"""What a linear layer leaves out of its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pruning:
    """Values of the input of a linear layer that are taken for ``center``, c: those with a small score.

    The layer computes ``W s(x) + b`` with ``s(x)_j = x_j`` where the score of ``x_j`` is above the threshold
    and c elsewhere: ``W (s(x) - c) + b + c W 1``, in which the columns of the others are not read. The score
    is ``|x_j - c|`` (TEAL, arXiv 2408.14690; with a c that is not 0, SCAP, arXiv 2412.07174), and, weighted,
    that times the Euclidean norm of column j of W (WINA, arXiv 2505.19427).
    """

    threshold: float
    center: float = 0.0
    weighted: bool = False

    def score(self, x: Tensor, norms: Tensor | None) -> Tensor:
        """Of ``x [..., F]``; ``norms`` float32 ``[F]``, those of :func:`column_norms`, if it is weighted."""
        distance = ((x - self.center) if self.center else x).abs()
        if not self.weighted:
            return distance
        assert norms is not None
        return distance.float() * norms

    def values(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """``s(x)``, of the shape and dtype of ``x``. NaN stays."""
        return x.masked_fill(self.score(x, norms) <= self.threshold, self.center)

    def deviations(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """``s(x) - c``: exactly 0 where nothing need be read."""
        distance = x - self.center if self.center else x
        return distance.masked_fill(self.score(x, norms) <= self.threshold, 0)


def column_norms(weight: Tensor) -> Tensor:
    """The Euclidean norms of the columns of ``weight [D, F]``: float32 ``[F]``, without gradient."""
    return torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float32)
