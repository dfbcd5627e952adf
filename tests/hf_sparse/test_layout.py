"""In which layout a patched model stores its down projections, from decoding to training and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hf_sparse
import triton_ops
from support.backends import change_backend
from support.compiler import needs_compiler
from support.peek import down_weight, layouts, sparse_blocks
from support.recorders import Recorder
from triton_ops.backends import REGISTRY
from triton_ops.cpu import products


@pytest.fixture(autouse=True)
def choices_of_this_machine_afterwards():
    yield
    triton_ops.forget()


def multiply_always(monkeypatch, dtype: torch.dtype) -> None:
    """As on a machine whose torch is slower at it, and for blocks of any size."""
    monkeypatch.setattr(products, "has_own", lambda dtype: False)
    limits = replace(REGISTRY["cpp"].defaults[dtype], min_bytes=0, beyond=0.0)
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: True, defaults={dtype: limits})


PRODUCT = torch.ops.hf_sparse.sparse_linear.default


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("family", "activation"), [("llama", "relu"), ("llama", "drelu"), ("gpt_neox", "relu2")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_after_decoding_are_multiplied_in_the_layout_for_decoding(
    tiny_model, monkeypatch, family, activation, dtype
):
    multiply_always(monkeypatch, dtype)
    model = tiny_model(family).to(dtype)
    hf_sparse.patch(model, activation)
    prompt = torch.randint(3, 128, (2, 40))
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        with Recorder() as recorded:
            expected = model(prompt).logits
        assert (recorded.seen.count(PRODUCT), layouts(model)) == (0, {False})
        model(prompt[:1, :1])
        assert layouts(model) == {True}
        with Recorder() as recorded:
            found = model(prompt).logits
        assert (recorded.seen.count(PRODUCT), layouts(model)) == (layers, {True})
        rounding = 16 * torch.finfo(dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() <= rounding
        torch.compiler.reset()
        # The graph is the same for every dtype; what inductor makes of it, one case shows.
        compiler = "inductor" if (activation, dtype) == ("relu", torch.bfloat16) else "aot_eager"
        compiled = torch.compile(model, fullgraph=True, backend=compiler)(prompt).logits
        assert (compiled - expected).abs().max() <= rounding


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_hook_has_kept_is_not_changed_by_such_products(tiny_model, monkeypatch, activation, inplace):
    multiply_always(monkeypatch, torch.float32)
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, activation).blocks
    hf_sparse.prepare(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    if inplace:
        block.module.act_fn = torch.nn.ReLU(inplace=True)  # which changes what the gate has given
    watched = block.module.gate_proj if inplace else block.module.act_fn
    hf_sparse.prepare(model)
    watched.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    with torch.no_grad(), Recorder() as recorded:
        block.module(torch.randn(40, 32))
    ((out, copied),) = kept
    assert recorded.seen.count(PRODUCT) == 1
    assert torch.equal(out, copied.relu())


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_get_the_stock_layout_back_where_torch_would_stall(
    tiny_model, input_ids, monkeypatch, own, dtype, activation
):
    monkeypatch.setattr(products, "has_own", lambda asked: own)
    triton_ops.forget()
    model = tiny_model("llama").to(dtype)
    hf_sparse.patch(model, activation)
    with torch.no_grad(), hf_sparse.backend("cpp"):
        skipped = model(input_ids).logits
    assert layouts(model) == {True}
    with torch.no_grad(), hf_sparse.backend("dense"):
        dense = model(input_ids).logits
    assert layouts(model) == {own}
    torch.testing.assert_close(skipped, dense, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 0.02)


@needs_compiler
def test_training_after_decoding_is_that_of_the_stock_block(tiny_model, monkeypatch):
    """Its dropout comes after the down projection."""
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: True)
    model = tiny_model("starcoder2", residual_dropout=0.5)
    hf_sparse.patch(model, "relu")
    ids, losses = torch.randint(3, 128, (2, 40)), []
    for prepare in (False, True):
        if prepare:
            hf_sparse.prepare(model)
        torch.manual_seed(0)
        with hf_sparse.backend("cpp"):
            losses.append(model.train()(ids, labels=ids).loss)
        with torch.no_grad(), hf_sparse.backend("cpp"):
            torch.manual_seed(0)
            torch.testing.assert_close(model.train()(ids, labels=ids).loss, losses[-1])
    assert layouts(model) == {False}
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_calls_keep_the_layout_in_which_a_model_decodes(tiny_model, input_ids, dtype):
    model = tiny_model("llama").to(dtype)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    with torch.no_grad():
        model(input_ids)
    assert layouts(model) == {True}
    blocks = list(sparse_blocks(model))
    hf_sparse.unpatch(model)
    assert {down_weight(block).is_contiguous() for block in blocks} == {True}
