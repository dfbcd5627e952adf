"""What a linear layer leaves out of its input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.errors import PatchError


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
        """Of ``x [..., F]``; ``norms [F]``, those of :func:`column_norms`, if it is weighted."""
        distance = self._from_center(x).abs()
        if not self.weighted:
            return distance
        assert norms is not None
        return distance.to(norms.dtype) * norms

    def values(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """``s(x)``, of the shape and dtype of ``x``. NaN stays."""
        if not (self.center or self.weighted):
            return F.hardshrink(x, self.threshold)  # the same in one pass
        return x.masked_fill(self.score(x, norms) <= self.threshold, self.center_in(x.dtype))

    def deviations(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """``s(x) - c``, rounded to the dtype of ``x``: exactly 0 where nothing need be read."""
        return self._from_center(self.values(x, norms))

    def center_in(self, dtype: torch.dtype) -> float:
        """The center as ``dtype`` can hold it.

        Raises:
            PatchError: it is too large.

        """
        return _rounded(self.center, dtype)

    def _from_center(self, x: Tensor) -> Tensor:
        return x - self.center_in(x.dtype) if self.center else x


def column_norms(weight: Tensor) -> Tensor:
    """The Euclidean norms of the columns of ``weight [D, F]``: ``[F]``, float32 or more, without gradient."""
    return torch.linalg.vector_norm(weight.detach(), dim=0, dtype=wide(weight.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over weights of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=1024)
def _rounded(center: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    if abs(center) > info.max:
        raise PatchError(
            f"center={center} of inputs is beyond what {dtype} can hold, which the model runs in; use "
            "another center, or another dtype."
        )
    return float(torch.tensor(center, dtype=torch.float64, device="cpu").to(dtype))
