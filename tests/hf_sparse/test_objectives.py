from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

import hf_sparse
from hf_sparse.objectives import L1Penalty
from support.models import untrained_llama


def llama() -> LlamaForCausalLM:
    return untrained_llama(vocab_size=64)


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 8))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def penalty_by_hand(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The definition, computed from the inputs of the blocks instead of by hooks on the down projections."""
    inputs = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    total = torch.zeros(())
    for layer, x in zip(model.model.layers, inputs, strict=True):
        h = torch.relu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        total = total + h.abs().mean()
    return total


def test_value_and_gradient_follow_the_definition():
    model, tokens = llama(), ids()
    hf_sparse.patch(model, "relu")
    expected = penalty_by_hand(model, tokens)
    expected.backward()
    by_hand = gradients(model)
    model.zero_grad()

    with L1Penalty(model) as l1:
        model(tokens)
        value = l1.value()
        value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    assert value > 0
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, by_hand.get(name, torch.zeros_like(gradient)), msg=name)


def test_gradient_checkpointing_changes_nothing():
    model, tokens = llama(), ids()
    hf_sparse.patch(model, "relu")
    recomputing = copy.deepcopy(model)
    recomputing.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for m in (model, recomputing):
        m.train()
        with L1Penalty(m) as l1:
            for _ in range(2):  # a second forward must not see what the first one's backward recomputed
                m.zero_grad()
                loss = m(tokens, labels=tokens).loss + 10 * l1.value()
                loss.backward()
            found.append((loss.detach(), l1.value().detach(), gradients(m)))
    (loss, value, gradient), (loss_2, value_2, gradient_2) = found
    torch.testing.assert_close(loss, loss_2)
    torch.testing.assert_close(value, value_2)
    for name in gradient:
        torch.testing.assert_close(gradient[name], gradient_2[name], msg=name)


def test_reentrant_checkpointing_is_refused_with_the_mend():
    model = llama()
    hf_sparse.patch(model, "relu")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with L1Penalty(model) as l1:
        model(ids())
        with pytest.raises(RuntimeError, match="use_reentrant"):
            l1.value()


def test_each_forward_starts_anew():
    model = llama()
    a, b = ids(), ids()
    with L1Penalty(model) as l1:
        model(a)
        first = l1.value()
        model(b)
        second = l1.value()
        model(a)
        assert l1.value() == first
        assert second != first


def test_a_failed_forward_leaves_nothing_behind():
    model, tokens = llama(), ids()
    with L1Penalty(model) as l1:
        model(tokens)
        expected = l1.value()
        with pytest.raises(IndexError):
            model(tokens + 1000)
        model(tokens)
        assert l1.value() == expected


def test_bfloat16_activations_are_averaged_in_float32():
    model, tokens = llama().to(torch.bfloat16), ids()
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with L1Penalty(model) as l1:
        model(tokens)
        value = l1.value()
    assert value.dtype == torch.float32
    expected = sum(h.double().abs().mean() for h in seen)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


def test_plain_blocks_too():
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="relu",
    )
    model = GPTNeoXForCausalLM(config)
    seen = []
    for layer in model.gpt_neox.layers:
        layer.mlp.dense_4h_to_h.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with L1Penalty(model) as l1:
        model(ids())
        torch.testing.assert_close(l1.value().detach(), sum(h.abs().mean() for h in seen))


def test_remove_leaves_no_hooks():
    model = llama()
    with L1Penalty(model) as l1:
        assert any(m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="no forward"):
        l1.value()


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential"):
        L1Penalty(nn.Sequential(nn.Linear(2, 2)))
