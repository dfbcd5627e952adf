"""Of an output layer only what greedy decoding looks at: the largest output of each token.

No ``torch.library`` operator: it runs only where nothing would be told of a call, and elsewhere it is the
dense product.
"""

from __future__ import annotations

from torch import Tensor

from triton_ops.certificate import Certificate
from triton_ops.dense_linear import linear, quick
from triton_ops.layout import view_of
from triton_ops.ops import check_certificate


def greedy_linear(x: Tensor, weight: Tensor, bias: Tensor | None, certificate: Certificate) -> Tensor:
    """``x weightᵀ + bias``, where outputs that cannot be the largest of their token may be -infinity instead.

    The others have the very bits of :func:`triton_ops.linear`, and among them are all that are equal to the
    largest: ``argmax`` finds the same one, also where several are. One byte per weight is read, and the rows
    of those others. Where :func:`triton_ops.linear` would not take the kernel, it is the dense product.

    Args:
        x: ``[..., F]``.
        weight: ``[D, F]``.
        bias: ``[D]`` or None.
        certificate: of ``weight`` as it is now (:func:`triton_ops.certify`).

    Raises:
        ValueError: the certificate is of a weight of another shape, or an argument does not fit as for
            :func:`triton_ops.linear`.
        MemoryError: there is no memory for a copy of ``x``.

    """
    check_certificate(certificate, weight.shape, weight, "D")
    backend = quick(x, weight, bias)
    if backend is None or backend.greedy_linear is None:
        return linear(x, weight, bias)
    held = view_of(weight)  # another thread may change the layout meanwhile
    if held.stride(1) != 1 or not all(one.is_contiguous() for one in certificate):
        return linear(x, weight, bias)
    return backend.greedy_linear(x, held, bias, certificate)
