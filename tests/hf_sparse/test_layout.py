"""In which layout a patched model stores its down projections, from decoding to training and back."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler

import hf_sparse
import triton_ops
from hf_sparse.adapters import find_blocks
from triton_ops import break_even


def layouts(model) -> set[bool]:
    return {triton_ops.is_neuron_major(block.down_linear.weight) for block in find_blocks(model)[0]}


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize("own", [True, False])
def test_float16_gets_the_stock_layout_back_where_torch_would_stall(
    tiny_model, input_ids, monkeypatch, own, activation
):
    monkeypatch.setattr(break_even, "has_own_float16", lambda: own)
    model = tiny_model("llama").half()
    hf_sparse.patch(model, activation)
    with torch.no_grad(), hf_sparse.backend("cpp"):
        skipped = model(input_ids).logits
    assert layouts(model) == {True}
    dense = model(input_ids).logits  # with gradient
    assert layouts(model) == {own}
    torch.testing.assert_close(skipped, dense, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_the_layout_in_which_they_decode(tiny_model, input_ids, dtype):
    model = tiny_model("llama").to(dtype)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    model(input_ids)
    assert layouts(model) == {True}
    hf_sparse.unpatch(model)
    assert layouts(model) == {False}
