"""One pass of data through a model, for whatever wants to look at it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.observing import Observer, blocks_of, observe


class Inputs(Observer):
    """Keeps all that it sees and the gradients, which a real one must not."""

    site = "x"

    def __init__(self, block):
        super().__init__(block)
        self.values, self.gradients = [], []

    def update(self, values: Tensor, routed: bool) -> None:
        self.values.append(values)

    def update_gradient(self, values: Tensor, gradient: Tensor, routed: bool) -> None:
        assert torch.equal(values, self.values[-1])
        self.gradients.append(gradient)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    return LlamaForCausalLM(config)


def test_with_grad_observers_get_the_gradient_of_the_summed_loss_and_parameters_none():
    model = tiny().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    ids = torch.randint(0, 40, (3, 7))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    seen = [Inputs(block) for block in blocks_of(model)]
    passed = observe(model, [{"input_ids": ids}], seen, grad=True)

    expected = []

    def keep(module, args):
        args[0].retain_grad()
        expected.append(args[0])

    hooks = [block.module.register_forward_pre_hook(keep) for block in blocks_of(model)]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids).loss * 18
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert abs(passed.loss * 18 - loss.item()) < 1e-3
    for one, x in zip(seen, expected, strict=True):
        torch.testing.assert_close(one.values[0], x.detach().flatten(0, 1))
        torch.testing.assert_close(one.gradients[0], x.grad.flatten(0, 1), rtol=1e-4, atol=1e-6)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert model.training

    model.zero_grad()
    observe(model, [{"input_ids": ids}], seen, grad=True)
    assert all(p.grad is None for p in model.parameters())


def test_padding_reaches_no_observer_and_nothing_is_left_behind():
    model = tiny()
    ids, mask = torch.randint(0, 40, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen = [Inputs(block) for block in blocks_of(model)]
    passed = observe(model, [{"input_ids": ids, "attention_mask": mask}], seen)
    assert passed.tokens == 8
    assert all(len(one.values[0]) == 8 and not one.gradients for one in seen)
    assert all(list(one.lengths) == [3, 5] for one in seen)
    model(input_ids=ids)
    assert all(len(one.values) == 1 for one in seen)
    observe(model, [{"input_ids": ids}], seen)
    assert all(list(one.lengths) == [5, 5] for one in seen)
    assert passed.loss == hf_sparse.measure(model, [{"input_ids": ids, "attention_mask": mask}]).loss
