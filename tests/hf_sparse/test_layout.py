"""In which layout a patched model stores its down projections, from decoding to training and back."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sparse
import triton_ops
from hf_sparse.adapters import find_blocks
from triton_ops import break_even


def layouts(model) -> set[bool]:
    return {triton_ops.is_neuron_major(block.down_linear.weight) for block in find_blocks(model)[0]}


class CountedProducts(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.hf_sparse.sparse_linear.default
        return func(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.parametrize(
    ("family", "activation"), [("llama", "relu"), ("llama", "drelu"), ("gpt_neox", "relu2")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_calls_after_decoding_multiply_in_the_layout_for_decoding(
    tiny_model, input_ids, monkeypatch, family, activation, dtype
):
    monkeypatch.setattr(break_even, "multiplies", lambda dtype: True)
    model = tiny_model(family).to(dtype)
    hf_sparse.patch(model, activation)
    expected = model(input_ids).logits
    hf_sparse.prepare(model)
    with hf_sparse.backend("cpp"), CountedProducts() as counted:  # with gradient: dense
        found = model(input_ids).logits
    assert counted.calls == len(find_blocks(model)[0])
    assert layouts(model) == {True}
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_the_layout_in_which_they_decode(tiny_model, input_ids, dtype):
    model = tiny_model("llama").to(dtype)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    model(input_ids)
    assert layouts(model) == {True}
    hf_sparse.unpatch(model)
    assert layouts(model) == {False}
