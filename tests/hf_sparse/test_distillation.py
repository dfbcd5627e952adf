"""KL from the dense model: the formula, which tokens count, and that a model learns by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_sparse
from hf_sparse.methods import ActingTogether, Training, read_methods
from hf_sparse.objectives import kl, kl_divergence
from support.embedded import documentation, embedded_model
from support.models import tiny, untrained_llama


def distilling(student: nn.Module, teacher: nn.Module, **fields: Any) -> ActingTogether:
    training = Training(student, 100, dense=lambda: copy.deepcopy(teacher))
    return ActingTogether(read_methods({"distillation": fields}), training)


def by_hand(student: Tensor, teacher: Tensor, forward: float, reverse: float, temperature: float) -> Tensor:
    """Of rows that all count."""
    q, p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    one = F.kl_div(q, p, reduction="batchmean", log_target=True)
    other = F.kl_div(p, q, reduction="batchmean", log_target=True)
    return temperature**2 * (forward * one + reverse * other)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(
    ("forward", "reverse", "temperature"), [(0.5, 0.5, 1.0), (1.0, 0.0, 2.0), (0.3, 0.9, 0.7)]
)
def test_value_and_gradient_follow_the_formula(monkeypatch, dtype, tolerance, forward, reverse, temperature):
    monkeypatch.setattr(kl, "_AT_ONCE", 30)  # two rows at a time
    student = torch.randn(3, 5, 11, dtype=dtype).requires_grad_()
    teacher = 2 * torch.randn(3, 5, 11, dtype=dtype)
    counted = torch.rand(3, 5) > 0.3
    settings = {"forward": forward, "reverse": reverse, "temperature": temperature}
    value = kl_divergence(student, teacher, counted, **settings)
    (7 * value).backward()
    assert value.dtype == torch.promote_types(dtype, torch.float32)

    exact = student.detach().double().requires_grad_()
    expected = by_hand(exact[counted], teacher.double()[counted], **settings)
    (7 * expected).backward()
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_tokens_that_do_not_count_may_hold_anything():
    student, teacher = torch.randn(4, 9).requires_grad_(), torch.randn(4, 9)
    counted = torch.tensor([True, False, True, False])
    expected = kl_divergence(student, teacher, counted)
    with torch.no_grad():
        student[1], teacher[3] = torch.nan, torch.inf
    value = kl_divergence(student, teacher, counted)
    assert value == expected
    value.backward()
    assert (student.grad[[1, 3]] == 0).all()
    assert student.grad[[0, 2]].isfinite().all()

    nothing = kl_divergence(student, teacher, torch.zeros(4, dtype=torch.bool))
    assert nothing == 0
    with pytest.raises(ValueError, match=r"\[4, 9\].*\[4, 8\].*one vocabulary"):
        kl_divergence(student, teacher[:, :8], counted)


def test_float32_copies_are_of_a_few_tokens_only(monkeypatch):
    """What is alive at once, beside the gradient in the dtype of the logits."""
    monkeypatch.setattr(kl, "_AT_ONCE", 4 * 64)
    student = torch.randn(512, 64, dtype=torch.bfloat16).requires_grad_()
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    with Sizes():
        kl_divergence(student, torch.randn(512, 64, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bool))
    assert max(sizes) == 4 * 64
    assert sizes.count(4 * 64) > 128  # it was looked at


def test_the_tokens_that_the_task_predicts_are_matched():
    dense = tiny("llama")
    student = copy.deepcopy(dense)
    hf_sparse.patch(student, "relu")
    ids = torch.randint(3, 128, (2, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100  # a prompt
    predicting = [(0, i) for i in (2, 3, 4, 5, 6)] + [(1, i) for i in (3, 4, 5, 6)]
    rows, places = zip(*predicting, strict=True)

    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    output = student(**batch)
    acting = distilling(student, dense, task=0.25, forward_kl=0.2, reverse_kl=0.7, temperature=1.5)
    terms = acting.loss(1, batch, output)
    expected = by_hand(
        output.logits[rows, places], dense(**batch).logits[rows, places].detach(), 0.2, 0.7, 1.5
    )
    assert acting.task_weight(1) == 0.25
    assert (terms["distillation"].weight, len(terms)) == (1.0, 1)
    torch.testing.assert_close(terms["distillation"].value, expected)
    assert expected > 0.1

    everything = acting.loss(1, {"input_ids": ids}, student(ids))["distillation"].value
    expected = by_hand(
        student(ids).logits[:, :-1].flatten(0, 1), dense(ids).logits[:, :-1].flatten(0, 1), 0.2, 0.7, 1.5
    )
    torch.testing.assert_close(everything, expected)


def test_labels_that_are_shifted_already_and_those_of_encoder_decoders_stand_where_they_are_predicted():
    from transformers import T5Config, T5ForConditionalGeneration

    from hf_sparse.methods.distillation import _counted

    logits, shifted = torch.zeros(1, 4, 9), torch.tensor([[-100, 5, 6, -100]])
    found = _counted({"shift_labels": shifted, "input_ids": shifted}, logits, aligned=False)
    assert found.tolist() == [[False, True, True, False]]

    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 64, "d_ff": 32}
    dense = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gelu")
    ).eval()
    student = copy.deepcopy(dense)
    hf_sparse.patch(student, "relu")
    labels = torch.tensor([[5, 6, 7, -100]])
    batch = {"input_ids": torch.tensor([[4, 5, 6, 1, 0, 0]]), "labels": labels}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    output = student(**batch)
    value = distilling(student, dense).loss(1, batch, output)["distillation"].value
    expected = by_hand(output.logits[0, :3], dense(**batch).logits[0, :3].detach(), 0.5, 0.5, 1.0)
    torch.testing.assert_close(value, expected)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_on_text_that_it_has_not_seen():
    dense, text = embedded_model().eval(), documentation(40, 64)
    student, seen, held_out = embedded_model(), text[:32], text[32:]
    hf_sparse.patch(student, "relu")
    acting = distilling(student, dense)

    def distance() -> float:
        with torch.no_grad():
            term = acting.loss(1, {"input_ids": held_out}, student(held_out))["distillation"]
        return term.value.item()

    optimizer, before = torch.optim.AdamW(student.parameters(), lr=5e-4), distance()
    for step in range(1, 17):
        batch = {"input_ids": seen[step % 4 :: 4]}
        acting.loss(step, batch, student(**batch))["distillation"].value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < 0.5 * before


def test_the_teacher_is_frozen_and_only_its_parameters_change_their_dtype():
    dense = untrained_llama()
    student = copy.deepcopy(dense)
    hf_sparse.patch(student, "relu")
    loaded = copy.deepcopy(dense)
    training = Training(student, 10, dense=lambda: loaded)
    ActingTogether(read_methods({"distillation": {"teacher_dtype": "bfloat16"}}), training)
    assert not loaded.training
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.bfloat16, False)}
    # Positions in bfloat16 would be wrong beyond the 256th.
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, r"methods\.distillation\.temperature=0\.0.*positive"),
        ({"forward_kl": 0.0, "reverse_kl": 0.0}, r"forward_kl=0.*reverse_kl must be more than 0"),
        ({"task": -1.0}, r"methods\.distillation\.task=-1\.0.*at least 0"),
        ({"teacher_dtype": "int8"}, r"teacher_dtype='int8'.*float32, bfloat16"),
    ],
)
def test_mistakes_in_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read_methods({"distillation": fields})


def test_what_cannot_be_distilled_is_refused():
    (method,) = read_methods({"distillation": {}})
    with pytest.raises(ValueError, match="its own teacher"):
        method.check(None)
    student = tiny("llama")
    hf_sparse.patch(student, "relu")
    with pytest.raises(ValueError, match=r"methods\.distillation.*`dense`"):
        method.attach(Training(student, 10))
    with pytest.raises(ValueError, match="is patched itself"):
        method.attach(Training(student, 10, dense=lambda: copy.deepcopy(student)))
    acting = distilling(student, tiny("llama"))
    with pytest.raises(ValueError, match="no logits"):
        acting.loss(1, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, {"loss": torch.zeros(())})
