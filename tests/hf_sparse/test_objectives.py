from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sparse
from hf_sparse.objectives import L1Penalty
from support.models import untrained_llama
from support.twins import stock


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


def test_of_a_partly_patched_model_the_patched_blocks_are_penalised():
    model, tokens = llama(), ids()
    hf_sparse.patch(model, "relu", layers=[1])
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with L1Penalty(model) as l1:
        model(tokens)
        assert len(seen) > 1
        torch.testing.assert_close(l1.value(), seen[1].abs().mean())


@pytest.mark.parametrize("normalisation", ["prosparse", "sakana_paper", "sakana_code"])
def test_each_normalisation_is_its_formula_and_converts_exactly(normalisation):
    model, tokens = llama(), ids()
    hf_sparse.patch(model, "relu")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with L1Penalty(model, normalisation) as l1, L1Penalty(model) as prosparse:
        model(tokens)
        value, ours = l1.value().double(), prosparse.value().double()
    (blocks, neurons), count = (len(seen), seen[0].shape[-1]), tokens.numel()
    total = sum(h.abs().sum() for h in seen)
    expected, factor = {
        "prosparse": (total / (count * neurons), 1),
        "sakana_paper": (total / (blocks * count * neurons), 1 / blocks),
        "sakana_code": (total / (blocks * count), neurons / blocks),
    }[normalisation]
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(value, factor * ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_counts_nowhere(side, positional):
    model, tokens = llama(), torch.randint(0, 64, (2, 5))
    hf_sparse.patch(model, "relu")
    with L1Penalty(model) as l1:
        model(tokens[:1])
        model.zero_grad()
        first = l1.value()
        first.backward()
        expected = gradients(model)
        model.zero_grad()
        padded = torch.zeros(2, 9, dtype=torch.long)
        padded[1] = 7  # a sequence of padding only
        mask = torch.zeros_like(padded)
        text = slice(4, 9) if side == "left" else slice(0, 5)
        padded[0, text], mask[0, text] = tokens[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if positional:
            model(padded, mask, positions)
        else:
            model(input_ids=padded, attention_mask=mask, position_ids=positions, labels=padded)
        l1.value().backward()
        torch.testing.assert_close(l1.value(), first)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_padding_of_experts_counts_nowhere():
    model = stock("mixtral").train()
    hf_sparse.patch(model, "relu")
    tokens = torch.randint(3, 60, (1, 6))
    padded, mask = torch.cat([tokens, tokens[:, :3]], 1), torch.tensor([[1] * 6 + [0] * 3])
    with L1Penalty(model) as l1:
        model(tokens)
        expected = l1.value()
        model(padded, attention_mask=mask)
        torch.testing.assert_close(l1.value(), expected)


def test_a_decoder_after_an_encoder_has_a_mask_of_its_own():
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0)).train()
    hf_sparse.patch(model, "relu")
    ids, own = torch.randint(3, 60, (1, 9)), torch.randint(3, 60, (1, 9))
    mask, own_mask = torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
    mask[:, 6:], own_mask[:, 4:] = 0, 0
    with L1Penalty(model) as l1:
        model(input_ids=ids[:, :6], decoder_input_ids=own[:, :4])
        expected = l1.value().detach()
        masks = {"attention_mask": mask, "decoder_attention_mask": own_mask}
        model(input_ids=ids, decoder_input_ids=own, **masks)
        torch.testing.assert_close(l1.value().detach(), expected)
        model(input_ids=ids, decoder_input_ids=own, attention_mask=mask)
        assert l1.value() != expected


def test_all_ones_are_no_padding_and_gradient_checkpointing_knows_the_mask():
    model, tokens = llama(), ids()
    hf_sparse.patch(model, "relu")
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    found = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train().zero_grad()
        with L1Penalty(model) as l1:
            model(tokens, attention_mask=torch.ones_like(mask))
            whole = l1.value()
            model(tokens)
            torch.testing.assert_close(l1.value(), whole)
            model(tokens, attention_mask=mask)
            l1.value().backward()
            assert l1.value() != whole
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_mask_that_does_not_fit_is_refused_in_training_only():
    model, tokens = llama(), ids()
    with (
        L1Penalty(model),
        pytest.raises(ValueError, match=r"received 16 tokens, and attention_mask is of 20"),
    ):
        model(tokens, attention_mask=torch.ones(2, 10, dtype=torch.long))
    with L1Penalty(model):
        model.eval().generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)


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
