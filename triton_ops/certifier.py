"""Making certificates: by a backend that does so at the speed of memory, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_ops import choice
from triton_ops.certificate import Certificate, certify_
from triton_ops.unobserved import is_plain_cpu


@torch.no_grad()
def certify(weight: Tensor, into: Certificate | None = None) -> Certificate:
    """The certificate of ``weight [F, D]``, any floating dtype, on its device; valid while that is unchanged.

    It costs one byte per weight and 12 per row.

    Args:
        weight: ``[F, D]``, of any strides.
        into: a certificate of a weight of this shape on this device, whose memory is written to.

    Raises:
        ValueError: ``weight`` is not two-dimensional or not floating, or ``into`` is of another shape or
            device.

    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {list(weight.shape)}; expected floating, [neurons, hidden]."
        )
    if into is None:
        rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        into = Certificate(rows, torch.empty(len(rows), 3, dtype=torch.float32, device=weight.device))
    else:
        _check(into, weight)
    rows_lie = is_plain_cpu(weight) and weight.numel() and weight.stride(1) == 1
    backend = choice.backend_with("certify", weight.dtype, choice.forced_backend()) if rows_lie else None
    if backend is None or backend.certify is None or not all(map(is_plain_cpu, into)):
        certify_(weight, into)
    else:
        backend.certify(weight, *into)
    return into


def _check(into: Certificate, weight: Tensor) -> None:
    rows, bounds = into
    if rows.shape != weight.shape or rows.device != weight.device:
        raise ValueError(
            f"into is the certificate of a weight of shape {list(rows.shape)} on {rows.device}, "
            f"and weight is of shape {list(weight.shape)} on {weight.device}."
        )
    right = rows.dtype == torch.int8 and bounds.dtype == torch.float32 and bounds.shape == (len(rows), 3)
    if not (right and rows.is_contiguous() and bounds.is_contiguous() and bounds.device == rows.device):
        raise ValueError("into is not as triton_ops.certify makes it: int8 and float32, contiguous.")
