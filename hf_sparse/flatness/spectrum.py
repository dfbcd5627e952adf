"""Spectral concentration: how close together the singular values of a matrix are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sparse.adapters import Block

LIMIT = 1024
"""The shorter side of the largest matrix that :func:`spectrum` takes by default. Its time grows with the
third power of that: on two cores a second there, 7 at 2,048 and 40 at 4,096."""

_CONCENTRATED = 0.8


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of a matrix (arXiv 2309.03004).

    If they lie close together, ``|Kᵀ η|²``, the squared gradient in the input, is about a constant times
    ``|η|²``: a model that is robust to its hidden features then has small effective gradients. A small
    ``ratio`` is what the papers call spectral concentration.
    """

    rank: int
    """How many are not zero: larger than rounding, to the dtype of the weights or here, could have made."""
    size: int
    """How many there are, the shorter side of the matrix. ``K Kᵀ [F, F]`` has ``F - rank`` eigenvalues of
    zero beside their squares."""
    largest: float
    smallest: float
    """The smallest one that is not zero."""
    ratio_80: float
    """Largest over smallest of the narrowest interval, in logarithms, with 80 % of those that are not zero.
    The released code gives the ratio of the eigenvalues of ``K Kᵀ``, which is its square, and drops those
    below 0.1."""
    norm_squared: float
    """Their squares added up, ``|K|_F² = tr(K Kᵀ)``."""

    @property
    def ratio(self) -> float:
        """Largest over smallest non-zero singular value, at least 1; NaN of a matrix of zeros."""
        return self.largest / self.smallest if self.smallest else math.nan


def spectrum(weight: Tensor, *, limit: int = LIMIT) -> Spectrum | None:
    """That of ``weight`` ``[out, in]``, a floating-point matrix, in float64; None if it is larger.

    On a GPU if the weight is there, else on the CPU.

    Args:
        weight: the matrix.
        limit: the longest that its shorter side may be.

    Raises:
        ValueError: it is no such matrix, or not finite.

    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {list(weight.shape)}; singular values are those of a matrix "
            "of floating-point numbers."
        )
    if min(weight.shape) > limit:
        return None
    matrix = (weight if weight.is_cuda else weight.cpu()).detach().double()
    if not matrix.isfinite().all():
        raise ValueError("weight has values that are not finite, and so no singular values.")
    eps = torch.finfo(torch.float64).eps
    if weight.dtype is torch.float64:
        values, error = torch.linalg.svdvals(matrix), max(matrix.shape) * eps
    else:
        # Much faster. What squaring loses, half of the digits, is about what float32 has rounded away.
        gram = matrix.mT @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.mT
        values, error = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0), 4 * math.sqrt(eps)
    norm_squared = float(matrix.square().sum())
    # Rounding adds a matrix of independent errors of at most eps |K|_F / sqrt(out * in), typically. The
    # largest singular value of such a matrix is that times sqrt(out) + sqrt(in).
    rounding = torch.finfo(weight.dtype).eps * sum(1 / math.sqrt(side) for side in weight.shape)
    nonzero = values[values > max(rounding * math.sqrt(norm_squared), error * float(values[0]))]
    if not len(nonzero):
        return Spectrum(
            rank=0, size=len(values), largest=0.0, smallest=0.0, ratio_80=math.nan, norm_squared=norm_squared
        )
    held = math.ceil(_CONCENTRATED * len(nonzero))
    widths = nonzero[: len(nonzero) - held + 1] / nonzero[held - 1 :]  # they descend
    return Spectrum(
        rank=len(nonzero),
        size=len(values),
        largest=float(nonzero[0]),
        smallest=float(nonzero[-1]),
        ratio_80=float(widths.min()),
        norm_squared=norm_squared,
    )


def spectra(block: Block, limit: int) -> tuple[Spectrum | None, Spectrum | None]:
    """Those of the key and of the value matrix of ``block``.

    None of one that is larger than ``limit``, or whose weights are not there as a matrix: quantised, under an
    adapter, sharded, or offloaded.
    """
    shapes = (block.intermediate_size, block.hidden_size), (block.hidden_size, block.intermediate_size)
    names = block.roles.names[0], block.roles.down
    if not all(_is_there(block.module.get_submodule(name)) for name in names):
        return None, None
    weights = block.weights()
    ends = (weights[0][0], shapes[0]), (weights[-1][0], shapes[1])
    key, value = (
        spectrum(weight, limit=limit) if tuple(weight.shape) == shape else None for weight, shape in ends
    )
    return key, value


def _is_there(linear: nn.Module) -> bool:
    """Whether a linear layer has a weight and perhaps a bias, and nothing else that its output depends on."""
    own = dict(linear.named_parameters())
    weight = own.get("weight")
    return (
        weight is not None
        and own.keys() <= {"weight", "bias"}
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.device.type != "meta"
    )
