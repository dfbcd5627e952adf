"""What target_sparsity with an L1 penalty measures, wants and adds to the loss, update by update."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import hf_sparse
from hf_sparse import SparsityReport
from hf_sparse.methods import Acting, Training
from hf_sparse.methods.target_sparsity import TargetSparsity
from support.models import untrained_llama


def patched() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = untrained_llama(vocab_size=64, num_hidden_layers=2)
    hf_sparse.patch(model, "relu")
    return model


def update(model: LlamaForCausalLM, acting: Acting, step: int, *batches: dict[str, Tensor]) -> float:
    """The weight of the penalty in an update without an optimizer."""
    acting.before_step(step)
    for batch in batches:
        output = model(**batch, labels=batch["input_ids"])
        (term,) = acting.loss(step, batch, output).values()
    with torch.no_grad():
        acting.after_step(step)
    return term.weight


def reported(loss: float) -> SparsityReport:
    return SparsityReport(layers=(), loss=loss, tokens=1, predicted_tokens=1)


def test_sparsity_and_penalty_are_measured_without_padding_however_an_update_is_cut() -> None:
    model, ids = patched(), torch.randint(0, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 9
    expected = hf_sparse.measure(model, [{"input_ids": ids, "attention_mask": mask}])
    model.train()
    whole = TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, steps=10))
    assert update(model, whole, 1, {"input_ids": ids, "attention_mask": mask}) == 0
    assert whole.values()["training_sparsity"] == pytest.approx(expected.sparsity, rel=1e-6)
    cut = TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, steps=10))
    batches = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)]
    update(model, cut, 1, *batches)
    assert cut.values()["training_sparsity"] == whole.values()["training_sparsity"]
    with hf_sparse.objectives.L1Penalty(model) as l1:
        model(**batches[0])
        model.zero_grad()
        penalty = [float(l1.value().detach())]
        for batch in batches[1:]:
            model(**batch)
            penalty.append(float(l1.value().detach()))
    model.eval()
    with torch.no_grad():
        model(ids)  # an evaluation counts nothing
    model.train()
    rise = math.exp(min(math.log(1e3) / (0.2 * 4), 0.15))  # by=0.4 of 10 updates
    weight = update(model, cut, 2, *batches)
    assert weight == pytest.approx(0.01 / (sum(penalty) / 3) * rise, rel=1e-5)


def test_of_a_partly_patched_model_the_patched_blocks_are_counted() -> None:
    model = untrained_llama(vocab_size=64, num_hidden_layers=2)
    hf_sparse.patch(model, "relu", layers=[1])
    ids = torch.randint(0, 64, (3, 12))
    expected = hf_sparse.measure(model, [{"input_ids": ids}]).layers
    assert expected[0].sparsity == 0 < expected[1].sparsity
    model.train()
    acting = TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, steps=10))
    update(model, acting, 1, {"input_ids": ids})
    assert acting.values()["training_sparsity"] == pytest.approx(expected[1].sparsity, rel=1e-6)


def test_processes_agree_on_their_mean() -> None:
    model, ids = patched(), torch.randint(0, 64, (4, 12))
    shares: list[Tensor] = []

    def other_has(found: Tensor) -> Tensor:
        shares.append(found)
        return (shares[0] + found) / 2  # what the first half of the batch gave, beside this one

    update(
        model,
        TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, 10, mean=other_has)),
        1,
        {"input_ids": ids[:2]},
    )
    second = TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, 10, mean=other_has))
    update(model, second, 1, {"input_ids": ids[2:]})
    expected = hf_sparse.measure(model, [{"input_ids": ids}]).sparsity
    assert second.values()["training_sparsity"] == pytest.approx(expected, rel=1e-6)


def test_it_waits_for_its_start_and_while_activations_are_mixed() -> None:
    model, batch = patched(), {"input_ids": torch.randint(0, 64, (2, 12))}
    acting = TargetSparsity(sparsity=0.9, start=0.2, lever="l1").attach(Training(model, steps=10))
    weights = []
    for step in range(1, 8):
        hf_sparse.set_mix(model, min(step / 4, 1.0))
        weights.append(update(model, acting, step, batch))
    assert weights[:4] == [0, 0, 0, 0]  # 1, 2: start; 3: mixed; 4: the first measurement
    assert 0 < weights[4] < weights[5] < weights[6]


def test_an_update_that_was_skipped_is_forgotten() -> None:
    model, batch = patched(), {"input_ids": torch.randint(0, 64, (2, 12))}
    other = {"input_ids": torch.randint(0, 64, (2, 12))}
    found = []
    for skipped in (False, True):
        acting = TargetSparsity(sparsity=0.9, lever="l1").attach(Training(model, steps=10))
        if skipped:
            acting.before_step(1)
            acting.loss(1, other, model(**other))
        update(model, acting, 1, batch)
        found.append(acting.state_dict())
        acting.detach()
    assert found[0] == found[1]


def test_a_budget_is_spent_only_while_there_is_some() -> None:
    model, batch = patched(), {"input_ids": torch.randint(0, 64, (2, 12))}
    training = Training(model, steps=100, dense_loss=math.log(20.0), eval_every=5)
    acting = TargetSparsity(perplexity=10.0, lever="l1").attach(training)
    limit = math.log(22.0)
    acting.after_evaluation(0, reported(limit + 0.01))
    first = [update(model, acting, step, batch) for step in (1, 2, 3)]
    assert first[0] == 0 < first[1] == first[2]
    acting.after_evaluation(3, reported(limit - 0.01))
    raised = [update(model, acting, step, batch) for step in (4, 5)]
    assert raised[0] == first[2] < raised[1]


@pytest.mark.parametrize(
    ("fields", "training", "message"),
    [
        ({"perplexity": 5.0}, {"eval_every": 10}, "not measured.*give its perplexity as dense_perplexity"),
        (
            {"perplexity": 5.0},
            {"dense_loss": 2.0},
            "eval_every=0 gives fewer than 4.*set eval_every from 1 to 10",
        ),
        (
            {"perplexity": 5.0, "dense_perplexity": 9.0},
            {"eval_every": 11},
            "eval_every=11 gives fewer than 4",
        ),
    ],
)
def test_a_budget_needs_a_dense_model_and_evaluations(fields, training, message) -> None:
    model = patched()
    with pytest.raises(ValueError, match=message):
        TargetSparsity(**fields).attach(Training(model, 100, **training))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"target_sparsity\.sparsity=None.*either that or perplexity"),
        ({"sparsity": 0.9, "perplexity": 5.0}, "either that or perplexity"),
        ({"sparsity": 90.0}, r"sparsity=90\.0.*in \(0, 1\)"),
        ({"sparsity": 0.9, "dense_perplexity": 9.0}, r"dense_perplexity=9\.0.*only with perplexity"),
        ({"perplexity": -1.0}, "positive number of percent"),
        ({"sparsity": 0.9, "start": 0.5, "by": 0.4}, r"by=0\.4.*in \(start, 1\]"),
        ({"sparsity": 0.9, "lever": "l2"}, r"lever=.l2.*one of threshold, l1"),
    ],
)
def test_fields_are_refused_by_name_value_and_mend(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        TargetSparsity(**fields)
    with pytest.raises(ValueError, match="dense baseline"):
        TargetSparsity(sparsity=0.5).check(None)


@pytest.mark.parametrize("goal", [0.9, 0.3])
def test_a_target_that_was_missed_is_told(goal) -> None:
    model, ids = patched(), torch.randint(0, 64, (3, 12))
    acting = TargetSparsity(sparsity=goal, lever="l1").attach(Training(model.train(), steps=10))
    acting.finish()  # nothing is known yet
    for step in range(1, 11):
        update(model, acting, step, {"input_ids": ids})
    found = acting.values()["training_sparsity"]
    assert 0.35 < found < 0.65
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        acting.finish()
    said = [str(one.message) for one in told]
    if goal == 0.9:
        assert len(said) == 1
        assert f"sparsity=0.9 was not reached: it is {found:.3f}" in said[0]
    else:
        assert not said
