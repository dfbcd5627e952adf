"""Certified skip: proof, from one byte per weight, that a neuron is silent, so that its row need not be read.

The deciding projection of an MLP (the gate, or the up projection of a plain MLP) is all that a skipping
kernel reads of a silent neuron. A certificate keeps, for each row w of it,

- ``q``: w rounded to int8, ``s`` its scale, so that w is near s q;
- ``r``: an upper bound of ``‖w - s q‖₂``;
- ``m``: an upper bound of ``‖w‖₂``.

**The bound.** From above; from below it is that of -x. For an input x and any approximation ``z k`` of it,
with k integer and e = x - z k,

    w · x  =  s z (q · k)  +  s q · e  +  (w - s q) · x
          <=  s z (q · k)  +  (m + r) ‖e‖₂  +  r ‖x‖₂

by Cauchy and Schwarz, since ``‖s q‖ <= ‖w‖ + ‖w - s q‖``. The product ``q · k`` is exact in integers. A
kernel that multiplies q with x itself in floating point has k = x, z = 1, e = 0 and one rounding error more.

**Rounding.** What must not exceed the threshold is the pre-activation that the kernel *would compute*. Its
dot product in float32, over at most n roundings on the way of one product into the sum, is off by at most
``g ‖w‖ ‖x‖`` with ``g = n u / (1 - n u)``, ``u = 2**-24`` (Higham, Accuracy and Stability of Numerical
Algorithms, theorem 3.1, and Cauchy-Schwarz), plus what underflow may take: no more than
``2**-120 D (1 + ‖w‖ + ‖x‖)``, also where subnormal numbers are flushed. No partial sum overflows if
``‖w‖ ‖x‖ < 2**126``; beyond that nothing is certified.

**What follows.** Call B the sum of these terms, evaluated in float64 (on GPUs in float32, with the slack that
takes) and rounded up. The computed dot product is at most B. Adding the bias, rounding to the dtype of the
model and the test "p <= threshold" (for fatrelu "p < threshold", with the neuron's own threshold where each
has one) are monotone, so the same operations done to B decide: if B would be silent, so is the neuron. The
result is therefore *the same bits*, not an approximation. Comparisons are written so that NaN certifies
nothing; rows and inputs with NaN or infinity have r, m or ‖x‖ = infinity or NaN, and are computed in full.

The largest of many products is found in the same way: one whose B, with its bias and rounded, is less than
what another one is at least, cannot be it (:func:`triton_ops.greedy_linear`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # of a weight that are in float64 at once


class Certificate(NamedTuple):
    """What :func:`triton_ops.certify` makes of a weight ``[F, D]``, such as a deciding projection."""

    rows: Tensor
    """q, int8 ``[F, D]``, contiguous, in [-127, 127]."""
    bounds: Tensor
    """s, r and m, float32 ``[F, 3]``, contiguous; r and m are rounded up, infinite for rows not finite."""


def certify_(weight: Tensor, certificate: Certificate) -> None:
    """Write the certificate of ``weight [F, D]``, by torch, on any device and in any floating dtype."""
    neurons, hidden = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(hidden, 1))
    for begin in range(0, neurons, step):
        part = slice(begin, begin + step)
        certificate.rows[part], certificate.bounds[part] = _certify(weight[part].double())


def weight_stamp(weight: Tensor) -> tuple[int, int]:
    """The version counter of ``weight`` and the identity of its storage: one changes when the weight does.

    Not seen are changes in place through ``weight.data``, for which torch counts no version. The identity is
    one only while somebody holds the storage, if weakly, as ``StorageWeakRef`` does.

    Raises:
        RuntimeError: ``weight`` is an inference tensor, which has no version counter.

    """
    return weight._version, weight.untyped_storage()._cdata


def _certify(w: Tensor) -> tuple[Tensor, Tensor]:
    finite = w.isfinite().all(1, keepdim=True)
    w = torch.where(finite, w, 0.0)
    # As float32, which kernels read. Rows of zeros, or with a scale that is subnormal, get s = 0 and q = 0.
    scale = (
        (w.abs().amax(1, keepdim=True) / 127).float().double() if w.shape[1] else w.new_zeros(w.shape[0], 1)
    )
    finite &= scale.isfinite()
    usable = finite & (scale >= torch.finfo(torch.float32).tiny)  # a processor may take smaller ones as zero
    q = torch.where(usable, w / torch.where(usable, scale, 1.0), 0.0).round().clamp(-127, 127)
    scale = torch.where(usable, scale, 0.0)
    residual, norm = (v.norm(dim=1, keepdim=True) for v in (w - scale * q, w))
    # Float64 has rounded the sums by parts in 1e12 at most; then up to the next float32.
    r, m = (_round_up(torch.where(finite, v * (1 + 1e-9), torch.inf)) for v in (residual, norm))
    return q.to(torch.int8), torch.cat([scale.float(), r, m], 1)


def _round_up(v: Tensor) -> Tensor:
    """Float64 to a float32 that is no smaller."""
    return torch.nextafter(v.float(), torch.tensor(torch.inf, dtype=torch.float32, device=v.device))
