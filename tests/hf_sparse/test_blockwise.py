"""Blocks matched one by one: the formula, what gets a gradient, and that a model learns by it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.errors import PatchError
from hf_sparse.methods import ActingTogether, Training, read_methods
from hf_sparse.metrics import measure
from support.embedded import documentation, embedded_model
from support.models import tiny, tiny_t5, untrained_llama


def matching(student: nn.Module, dense: nn.Module, **fields: Any) -> ActingTogether:
    training = Training(student, 100, dense=lambda: copy.deepcopy(dense))
    return ActingTogether(read_methods({"blockwise": fields}), training)


def patched(dense: nn.Module) -> Any:
    student = copy.deepcopy(dense).train()
    hf_sparse.patch(student, "relu")
    return student


def term(acting: ActingTogether, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    (found,) = acting.loss(1, batch, student(**batch)).values()
    assert found.weight == 1
    return found.value


def inputs_of_blocks(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, ...]]:
    """By hooks that only look, in evaluation mode; those of experts come with their routing."""
    found: list[tuple[Tensor, ...]] = []
    model.eval()
    handles = [
        block.module.register_forward_pre_hook(lambda _, args: found.append(args))
        for block in find_blocks(model)[0]
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    model.train()
    return found


@pytest.mark.parametrize("follow", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox", "mixtral"])
def test_value_and_gradient_are_those_of_the_blocks_alone(kind, follow):
    dense, ids = tiny(kind), torch.randint(3, 128, (2, 9))
    student = patched(dense)
    alone, reference = copy.deepcopy(student), copy.deepcopy(dense)
    acting = matching(student, dense, input=follow)
    value = term(acting, student, {"input_ids": ids})
    value.backward()

    errors = []
    inputs = inputs_of_blocks(alone if follow == "student" else reference, ids)
    for own, other, x in zip(find_blocks(alone)[0], find_blocks(reference)[0], inputs, strict=True):
        target = other.module(*x).detach()
        error = (own.module(*x) - target).square().sum(-1) / target.square().sum(-1)
        errors.append(error.mean())
    expected = torch.stack(errors).mean()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    for (name, p), q in zip(student.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)
    inside = {id(p) for block in find_blocks(student)[0] for p in block.module.parameters()}
    for name, p in student.named_parameters():
        assert p.requires_grad == (id(p) in inside), name
        assert (p.grad is not None) == (id(p) in inside), name
    assert acting.task_weight(1) == 0


def test_the_layers_follow_the_model_that_was_asked_for():
    dense, ids = tiny("llama"), torch.randint(3, 128, (1, 7))
    student = patched(dense)
    student.eval()
    sparse_logits = student(ids).logits.detach()
    student.train()
    assert not torch.allclose(sparse_logits, dense(ids).logits, atol=1e-2)
    for follow, expected in (("student", sparse_logits), ("teacher", dense(ids).logits)):
        acting = matching(student, dense, input=follow)
        torch.testing.assert_close(student(ids).logits, expected)
        student.eval()
        torch.testing.assert_close(student(ids).logits, sparse_logits)  # an evaluation is of the student
        student.train()
        with torch.no_grad():
            torch.testing.assert_close(student(ids).logits, sparse_logits)
        acting.detach()


def test_gradient_checkpointing_changes_nothing():
    dense, ids = untrained_llama(), torch.randint(3, 128, (2, 9))
    found = []
    for checkpointing in (False, True):
        student = patched(dense)
        if checkpointing:
            student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        acting = matching(student, dense)
        for _ in range(2):  # a second forward must not see what the first one's backward recomputed
            student.zero_grad()
            value = term(acting, student, {"input_ids": ids})
            value.backward()
        found.append((value.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    (value, gradients), (value_2, gradients_2) = found
    assert value == pytest.approx(value_2)
    assert gradients.keys() == gradients_2.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], gradients_2[name], msg=name)


def test_reentrant_checkpointing_is_refused_with_the_mend():
    student = patched(untrained_llama())
    acting = matching(student, untrained_llama())
    student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="use_reentrant"):
        acting.loss(1, batch, student(**batch))


def test_padding_does_not_count_and_micro_batches_add_up():
    dense = tiny("llama")
    student = patched(dense)
    acting = matching(student, dense)
    ids = torch.randint(3, 128, (4, 8))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    whole = term(acting, student, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(whole, term(acting, student, {"input_ids": ids[:, :6]}))
    pieces = [
        term(acting, student, {"input_ids": ids[i : i + 1], "attention_mask": mask[:1]}) for i in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(pieces).mean())


def test_encoder_and_decoder_have_padding_of_their_own():
    dense = tiny_t5(feed_forward_proj="gated-gelu")
    student = patched(dense)
    acting = matching(student, dense)
    ids, answer = torch.randint(3, 128, (2, 4, 8))
    masks = torch.ones(2, 4, 8, dtype=torch.int64)
    masks[0, :, 6:], masks[1, :, 5:] = 0, 0
    padded = {"input_ids": ids, "attention_mask": masks[0]}
    padded |= {"decoder_input_ids": answer, "decoder_attention_mask": masks[1]}
    cut = {"input_ids": ids[:, :6], "decoder_input_ids": answer[:, :5]}
    torch.testing.assert_close(term(acting, student, padded), term(acting, student, cut))


def test_detach_leaves_the_model_as_it_was():
    dense = tiny("llama")
    student = patched(dense)
    student.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    matching(student, dense).detach()
    assert {name: p.requires_grad for name, p in student.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_adapters_on_the_mlps_are_what_is_trained():
    peft = pytest.importorskip("peft")
    dense = tiny("llama")
    student = patched(dense)
    adapted = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    acting = matching(adapted, dense)
    term(acting, adapted, {"input_ids": torch.randint(3, 128, (1, 6))}).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 3  # A and B of three layers
    assert all(".mlp.down_proj.lora_" in name for name in trained)

    only_attention = peft.get_peft_model(patched(dense), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(PatchError, match=r"adapters .* on the MLPs"):
        matching(only_attention, dense)


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["student", "teacher"])
def test_a_model_regains_what_the_patch_took_without_a_loss_of_its_task(follow):
    dense, text = embedded_model().eval(), documentation(40, 64)
    held_out = [{"input_ids": text[32:]}]
    student = embedded_model()
    hf_sparse.patch(student, "relu")
    losses = [measure(model, held_out).loss for model in (dense, student)]
    acting = matching(student, dense, input=follow)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 17):
        term(acting, student, {"input_ids": text[step % 4 : 32 : 4]}).backward()
        optimizer.step()
        optimizer.zero_grad()
    acting.detach()
    lost_then, lost_now = losses[1] - losses[0], measure(student, held_out).loss - losses[0]
    assert lost_now < 0.5 * lost_then


def test_what_cannot_be_matched_is_refused_and_left_as_it_was():
    (method,) = read_methods({"blockwise": {}})
    with pytest.raises(ValueError, match=r"methods\.blockwise has no meaning with patch=none"):
        method.check(None)
    with pytest.raises(PatchError, match="Patch the model first"):
        matching(tiny("llama"), tiny("llama"))
    student = patched(tiny("llama"))
    with pytest.raises(ValueError, match=r"methods\.blockwise.*`dense`"):
        method.attach(Training(student, 10))
    with pytest.raises(ValueError, match="3 MLP blocks and the dense one 2"):
        matching(student, tiny("llama", num_hidden_layers=2))
    with pytest.raises(PatchError, match=r"methods\.blockwise needs MLPs that are modules of their own"):
        matching(patched(tiny("opt")), tiny("opt"))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_sharded_model_is_refused():
    """Whose weights are freed after the forward of a layer, and gathered for a backward that never comes."""
    student = patched(tiny("llama"))
    acting = matching(student, tiny("llama"))
    acting.before_step(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.distributed.fsdp.fully_shard(student)
        with pytest.raises(ValueError, match=r"methods\.blockwise cannot train a sharded model"):
            acting.before_step(2)
    finally:
        torch.distributed.destroy_process_group()
