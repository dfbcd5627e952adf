"""The operators in Triton: tensors in, three launches on a static grid, tensors out.

First h (gate, activation test, up rows of active neurons), then the two of :mod:`triton_ops.gpu.down`.
There are no atomics, no host synchronisation and no sizes that depend on data, so the result is deterministic
and can be captured in a CUDA graph.

The boundary between the two kernels for h is at two tokens. One token needs no more than a product and a sum
per weight (:mod:`triton_ops.gpu.one_token`). For several (:mod:`triton_ops.gpu.several_tokens`) tensor cores
pad to 16 and are still idle most of the time, since memory is the limit, and their loads are pipelined; the
same on ordinary cores would need tiles of tokens, rows and columns, whose layouts are converted through
shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_ops.gpu import one_token, several_tokens
from triton_ops.gpu.down import down
from triton_ops.layout import as_tokens
from triton_ops.mlp import MLP


def mlp(x: Tensor, mlp: MLP) -> Tensor:
    """The block of ``mlp`` for ``x [..., D]`` of any strides, at least one token; the result is contiguous.

    The certificate counts for one token; with several the union of active neurons is too large for it to pay.
    ``mlp.down`` is neuron-major. A gate or up projection whose rows are not contiguous is copied at every
    call.
    """
    with torch.cuda.device_of(x):
        block = mlp._replace(
            first=_with_rows(mlp.first),
            up=None if mlp.up is None else _with_rows(mlp.up),
            first_bias=_contiguous(mlp.first_bias),
            up_bias=_contiguous(mlp.up_bias),
            threshold=mlp.threshold.contiguous() if isinstance(mlp.threshold, Tensor) else mlp.threshold,
        )
        rows = as_tokens(x).contiguous()
        h = (one_token if rows.shape[0] == 1 else several_tokens).hidden(rows, block)
        return down(h, mlp.down, _contiguous(mlp.down_bias)).view(x.shape)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [..., F]`` to ``[..., D]``, at least one token; ``weight [D, F]`` neuron-major."""
    with torch.cuda.device_of(h):
        return down(as_tokens(h).contiguous(), weight, _contiguous(bias)).view(*h.shape[:-1], weight.shape[0])


def _with_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
