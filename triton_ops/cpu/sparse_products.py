"""Products with the pairs of token and active neuron: tensors in, one call of ``mlp.cpp``, tensors out."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_ops.cpu.calls import DTYPES, kernels, pointer, threads
from triton_ops.pairs import MOST, PairProducts, Pairs

_pack_find = struct.Struct("5P2q2i").pack  # struct FindCall
_pack_transpose = struct.Struct("5P2q").pack  # struct TransposeCall
_pack_product = struct.Struct("8P9q2i").pack  # struct SparseProductCall
_pack_sampled = struct.Struct("5P6q2i").pack  # struct SampledProductCall


def find(silent: Tensor, p: Tensor, most: int) -> tuple[Pairs, Tensor] | None:
    """As :class:`PairProducts` says."""
    rows, columns = p.shape
    start = p.new_empty(rows + 1, dtype=torch.int64)
    given, sizes = (silent.data_ptr(), p.data_ptr(), start.data_ptr()), (rows, columns)
    last = DTYPES[p.dtype], threads()
    kernels().hfs_find(_pack_find(*given, 0, 0, *sizes, *last))
    entries = int(start[-1])
    if entries > min(most, MOST):
        return None
    column, kept = p.new_empty(entries, dtype=torch.int32), p.new_empty(entries)
    if entries:
        kernels().hfs_find(_pack_find(*given, column.data_ptr(), kept.data_ptr(), *sizes, *last))
    return Pairs(rows, columns, start, column), kept


def transposed(pairs: Pairs) -> tuple[Pairs, Tensor]:
    """As :class:`PairProducts` says."""
    start = pairs.start.new_empty(pairs.columns + 1)
    row, place = torch.empty_like(pairs.column), torch.empty_like(pairs.column)
    tensors = pairs.start, pairs.column, start, row, place
    kernels().hfs_transpose(_pack_transpose(*[t.data_ptr() for t in tensors], pairs.rows, pairs.columns))
    return Pairs(pairs.columns, pairs.rows, start, row), place


def product(pairs: Pairs, terms: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, y: Tensor) -> Tensor:
    """As :class:`PairProducts` says."""
    values, b = terms[0]
    more, other = terms[1] if len(terms) > 1 else (None, b)
    bias = None if bias is None else bias.contiguous()
    tensors = pairs.start, pairs.column, values, more, b, other, bias, y
    sizes = pairs.rows, pairs.columns, b.shape[1], *b.stride(), *other.stride(), *y.stride()
    call = _pack_product(*map(pointer, tensors), *sizes, DTYPES[b.dtype], threads())
    _require_memory(kernels().hfs_sparse_product(call), pairs)
    return y


def sampled(pairs: Pairs, a: Tensor, b: Tensor) -> Tensor:
    """As :class:`PairProducts` says."""
    a = a if a.stride(1) == 1 else a.contiguous()
    values = a.new_empty(len(pairs.column), dtype=torch.float32)
    tensors = pairs.start, pairs.column, a, b, values
    sizes = pairs.rows, pairs.columns, b.shape[1], a.stride(0), *b.stride()
    call = _pack_sampled(*map(pointer, tensors), *sizes, DTYPES[b.dtype], threads())
    _require_memory(kernels().hfs_sampled_product(call), pairs)
    return values


def _require_memory(failed: int, pairs: Pairs) -> None:
    if failed:
        raise MemoryError(
            f"no memory is left for products with {len(pairs.column)} active pairs; use fewer tokens at once."
        )


PAIRS = PairProducts(find, transposed, product, sampled)
