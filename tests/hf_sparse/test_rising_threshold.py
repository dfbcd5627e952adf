"""What target_sparsity with thresholds measures and moves, update by update."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, SparsityReport
from hf_sparse.activations import FATReLU
from hf_sparse.adapters import require_blocks
from hf_sparse.levers import ByPenalty, ByThreshold, rising_threshold
from hf_sparse.methods import Acting, ActingTogether, Training, read_methods
from hf_sparse.methods.target_sparsity import TargetSparsity
from hf_sparse.methods.threshold_shift import ThresholdShift
from support.composites import composite
from support.models import tiny, untrained_llama

IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill_(1, torch.arange(17, 24), 0)
MASK[2:] = 1
PADDED = {"input_ids": IDS, "attention_mask": MASK}


def patched(patch: str | dict = "relu", **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = untrained_llama(vocab_size=64, num_hidden_layers=2)
    hf_sparse.patch(model, SparsityConfig(**patch) if isinstance(patch, dict) else patch, **options)
    return model.train()


def update(model: PreTrainedModel, acting: Acting, step: int, *batches: dict[str, Tensor]) -> None:
    """An update without an optimizer."""
    acting.before_step(step)
    for batch in batches:
        assert acting.loss(step, batch, model(**batch)) == {}
    with torch.no_grad():
        acting.after_step(step)


def thresholds(model: PreTrainedModel) -> list[float]:
    return [block.activation.threshold for block in require_blocks(model)[0] if block.is_patched]


def pre_activations(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of each block: ``[batch, tokens, F]``."""
    found: list[Tensor] = []
    handles = [block.watch("p", lambda p, _: found.append(p.detach())) for block in require_blocks(model)[0]]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_a_first_update_goes_a_part_of_the_way_to_the_quantile_of_text_however_it_is_cut() -> None:
    expected = [torch.relu(p[MASK.bool()]).flatten() for p in pre_activations(patched(), PADDED)]
    natural = sum(float((p == 0).float().mean()) for p in expected) / 2
    wanted = 1 - (1 - natural) * (0.1 / (1 - natural)) ** (
        1 / 4
    )  # the ramp is 4 updates, even in ln(density)
    assert max(float((p == 0).float().mean()) for p in expected) < wanted
    rows = [{name: value[i : i + 1] for name, value in PADDED.items()} for i in range(4)]
    for batches in ([PADDED], rows):
        model = patched()
        acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
        update(model, acting, 1, *batches)
        for found, p in zip(thresholds(model), expected, strict=True):
            assert found == pytest.approx(0.3 * float(torch.quantile(p, wanted)), rel=0.01)
        assert acting.values()["wanted_sparsity"] == pytest.approx(wanted, rel=1e-5)
        assert acting.values()["training_sparsity"] == pytest.approx(natural, rel=1e-5)


@pytest.mark.parametrize("patch", ["relu", "cats_silu", "fatrelu"])
def test_a_sparsity_is_reached_when_it_was_to_be_and_kept_in_the_model(patch, tmp_path) -> None:
    model = patched(patch)
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=60))
    for step in range(1, 61):
        update(model, acting, step, PADDED)
        if step == 12:  # half of the way, in ln(density)
            half = acting.values()["training_sparsity"]
    acting.finish()
    acting.detach()
    assert (0.55 if patch != "cats_silu" else 0.3) < half < 0.85
    assert acting.values()["training_sparsity"] == pytest.approx(0.9, abs=0.005)
    report = hf_sparse.measure(model, [PADDED])
    assert report.sparsity == pytest.approx(0.9, abs=0.005)
    assert [layer.sparsity for layer in report.layers] == pytest.approx([0.9, 0.9], abs=0.005)
    assert not any(module._forward_pre_hooks for module in model.modules())
    config = hf_sparse.inspect(model).config
    assert config.activation.name == ("cats_silu" if patch == "cats_silu" else "fatrelu")
    assert list(config.activation.threshold) == thresholds(model)
    model.eval().save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**PADDED).logits, model(**PADDED).logits)


def test_of_long_sequences_tokens_at_even_distances_are_counted_however_they_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(rising_threshold, "_MOST", 6 * 88)  # of 24 tokens every fourth, from the third on
    rows = [{name: value[i : i + 1] for name, value in PADDED.items()} for i in range(4)]
    found = []
    for batches in ([PADDED], rows):
        model = patched()
        acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
        update(model, acting, 1, *batches)
        found.append((acting.values()["training_sparsity"], *thresholds(model)))
    assert found[0] == found[1]
    mask = MASK.bool()[:, 2::4]
    zeros = []
    for p in pre_activations(patched(), PADDED):
        zeros.append(float((p[:, 2::4][mask] <= 0).float().mean()))
    assert found[0][0] == pytest.approx(sum(zeros) / 2, rel=1e-5)


def test_what_a_block_has_by_itself_is_counted_and_left() -> None:
    model = patched()
    with torch.no_grad():
        require_blocks(model)[0][0].module.gate_proj.weight[4:].fill_(
            0.0
        )  # most are silent without a threshold
    acting = TargetSparsity(sparsity=0.75).attach(Training(model, steps=40))
    for step in range(1, 41):
        update(model, acting, step, PADDED)
    layers = [layer.sparsity for layer in hf_sparse.measure(model, [PADDED]).layers]
    assert layers[0] > 0.85
    assert thresholds(model)[0] == 0 < thresholds(model)[1]
    assert sum(layers) / 2 == pytest.approx(0.75, abs=0.005)


def test_blocks_that_are_not_patched_stay_dense_and_do_not_count() -> None:
    model = patched(include="model.layers.1.mlp")
    acting = TargetSparsity(sparsity=0.8).attach(Training(model, steps=40))
    for step in range(1, 41):
        update(model, acting, step, PADDED)
    assert acting.values()["training_sparsity"] == pytest.approx(0.8, abs=0.005)
    first, second = require_blocks(model)[0]
    assert not first.is_patched
    assert isinstance(second.activation, FATReLU)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).train()
    hf_sparse.patch(model, "relu")
    return model


def test_experts_have_one_threshold_for_those_of_a_layer() -> None:
    model = mixtral()
    acting = TargetSparsity(sparsity=0.85).attach(Training(model, steps=40))
    for step in range(1, 41):
        update(model, acting, step, {"input_ids": IDS})
    acting.detach()
    assert hf_sparse.measure(model, [{"input_ids": IDS}]).sparsity == pytest.approx(0.85, abs=0.01)


def test_it_waits_for_its_start_and_while_activations_are_mixed() -> None:
    model = patched()
    acting = TargetSparsity(sparsity=0.9, start=0.2).attach(Training(model, steps=10))
    found = []
    for step in range(1, 7):
        hf_sparse.set_mix(model, min(step / 4, 1.0))
        update(model, acting, step, PADDED)
        found.append(acting.values()["target_threshold"])
    assert found[:3] == [0, 0, 0]  # 1, 2: start; 3: mixed
    assert all(a < b for a, b in pairwise(found[2:]))


def test_an_evaluation_and_recomputation_count_nothing() -> None:
    states = []
    for more in (False, True):
        model = patched()
        if more:
            model.gradient_checkpointing_enable()
        acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
        acting.before_step(1)
        model(**PADDED, labels=IDS).loss.backward()
        if more:
            with torch.no_grad():
                model(IDS.flip(0))
        with torch.no_grad():
            acting.after_step(1)
        states.append(acting.state_dict())
    assert states[0] == states[1]


def test_a_resumed_run_has_the_thresholds_of_the_one_before() -> None:
    model, other = patched(), patched()
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=20))
    for step in range(1, 6):
        update(model, acting, step, PADDED)
    resumed = TargetSparsity(sparsity=0.9).attach(Training(other, steps=20))
    resumed.load_state_dict(acting.state_dict())
    assert thresholds(other) == thresholds(model)
    for one, its in ((model, acting), (other, resumed)):
        update(one, its, 6, PADDED)
    assert resumed.state_dict() == acting.state_dict()


def test_processes_agree_on_their_mean() -> None:
    halves = [{name: value[rows] for name, value in PADDED.items()} for rows in (slice(2), slice(2, 4))]
    counts: list[Tensor] = []

    def other_has(found: Tensor) -> Tensor:
        counts.append(found)
        return (counts[0] + found) / 2

    model = patched()
    update(model, TargetSparsity(sparsity=0.9).attach(Training(model, 10, mean=other_has)), 1, halves[0])
    model = patched()
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, 10, mean=other_has))
    update(model, acting, 1, halves[1])
    whole = patched()
    update(whole, TargetSparsity(sparsity=0.9).attach(Training(whole, 10)), 1, PADDED)
    assert thresholds(model) == pytest.approx(thresholds(whole), rel=1e-5)


def test_thresholds_rise_with_what_is_left_of_a_budget_and_fall_if_it_is_overdrawn() -> None:
    def reported(loss: float) -> SparsityReport:
        return SparsityReport(layers=(), loss=loss, tokens=1, predicted_tokens=1)

    def after(slack: float, steps: range) -> list[float]:
        acting.after_evaluation(steps[0] - 1, reported(limit - slack))
        found = []
        for step in steps:
            update(model, acting, step, PADDED)
            found.append(acting.values()["target_threshold"])
        return found

    model = patched()
    training = Training(model, steps=400, dense_loss=math.log(20.0), eval_every=5)
    acting = TargetSparsity(perplexity=10.0).attach(training)
    limit = math.log(20.0) + 0.9 * math.log(1.1)
    update(model, acting, 1, PADDED)
    assert acting.values()["target_threshold"] == 0
    assert after(-0.01, range(2, 6)) == [0, 0, 0, 0]
    risen = after(0.05, range(6, 30))
    assert all(a < b for a, b in pairwise(risen))
    fallen = after(-0.01, range(30, 60))
    assert fallen[-1] < 0.2 * max(fallen)
    assert min(fallen) >= 0


@pytest.mark.parametrize(
    ("patch", "lever"),
    [
        ("relu", ByThreshold),
        ("cats_silu", ByThreshold),
        ("drelu", ByPenalty),
        ("jsrelu", ByPenalty),
        ({"activation": "relu", "topk": {"share": 0.5}}, ByPenalty),
        ({"activation": "relu", "statistical_topk": {"sparsity": 0.5}}, ByPenalty),
        ({"activation": "relu", "inputs": {"mlp.down_proj": 0.01}}, ByPenalty),
    ],
)
def test_models_without_thresholds_get_a_penalty(patch, lever) -> None:
    model = patched(patch)
    assert type(TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))) is lever


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ("drelu", "patch=drelu"),
        ("original", "patch=original"),
        ({"activation": "relu", "topk": {"share": 0.5}}, "there is topk"),
    ],
)
def test_thresholds_are_refused_where_they_alone_do_not_decide(patch, why) -> None:
    method = TargetSparsity(sparsity=0.9, lever="threshold")
    config = SparsityConfig.read(patch)
    with pytest.raises(ValueError, match=f'{why}; use lever="l1"'):
        method.check(config)


def test_the_gradient_is_that_of_what_is_left() -> None:
    p = torch.tensor([-1.0, 0.2, 0.5, 2.0], requires_grad=True)
    act = FATReLU(0.5)
    act(p).sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [0, 0, 1, 1]
    assert act.compared(p).tolist() == F.relu(p).tolist()


@pytest.mark.parametrize("lever", ["threshold", "l1"])
def test_forwards_at_perturbed_weights_do_not_count(lever) -> None:
    states = []
    for more in (False, True):
        model = patched()
        acting = TargetSparsity(sparsity=0.9, lever=lever).attach(Training(model, steps=10))
        acting.before_step(1)
        acting.loss(1, PADDED, model(**PADDED))
        if more:
            acting.before_perturbed(1)
            for block in require_blocks(model)[0]:
                block.module.gate_proj.weight.data.neg_()
            acting.loss(1, PADDED, model(**PADDED))
        with torch.no_grad():
            acting.after_step(1)
        states.append(acting.state_dict())
    assert states[0] == states[1]


def test_a_ramp_begins_where_counting_does_and_thresholds_that_there_are_stay() -> None:
    model = patched()
    both = {"target_sparsity": {"sparsity": 0.9, "by": 0.5}, "mixing": {"until": 0.25}}
    acting = ActingTogether(read_methods(both), Training(model, steps=40))
    wanted = []
    for step in range(1, 25):
        update(model, acting, step, PADDED)
        wanted.append(acting.values().get("wanted_sparsity"))
    assert wanted[:9] == [None] * 9  # mixed
    natural = acting.state_dict()["target_sparsity"]["begin"]
    assert natural[0] == 9
    steps = [math.log((1 - a) / (1 - b)) for a, b in pairwise(wanted[9:20])]
    assert steps == pytest.approx([steps[0]] * 10, rel=1e-4)
    assert wanted[19] == pytest.approx(0.9)
    acting.detach()
    again = TargetSparsity(sparsity=0.9).attach(Training(model, steps=40))
    found = []
    for step in range(1, 20):
        update(model, again, step, PADDED)
        found.append(again.values()["training_sparsity"])
    assert found == pytest.approx([0.9] * 19, abs=0.02)


@pytest.mark.parametrize("lever", ["threshold", "l1"])
@pytest.mark.parametrize("order", [1, -1])
def test_with_mixing_a_resumed_run_is_the_same_in_any_order_of_methods(lever, order) -> None:
    given = {"target_sparsity": {"sparsity": 0.9, "lever": lever}, "mixing": {"until": 0.4}}
    methods = read_methods(dict(list(given.items())[::order]))
    model, other = patched(), patched()
    acting = ActingTogether(methods, Training(model, steps=20))
    running = [(model, acting)]
    for step in range(1, 13):
        if step == 5:
            resumed = ActingTogether(methods, Training(other, steps=20))
            resumed.load_state_dict(acting.state_dict())
            running.append((other, resumed))
        for one, its in running:
            its.before_step(step)
            its.loss(step, PADDED, one(**PADDED))
            with torch.no_grad():
                its.after_step(step)
        if step < 8:
            assert acting.values().get("target_threshold", 0.0) == 0
    assert resumed.state_dict() == acting.state_dict()


def test_each_part_of_a_model_gets_thresholds_for_the_activation_that_it_has() -> None:
    model = composite("llava").train()
    hf_sparse.patch(model, "cats_silu", threshold=0.2, part="text")
    hf_sparse.patch(model, "relu", part="vision")
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
    acting.before_step(1)
    text = hf_sparse.inspect(model)
    assert text.config == SparsityConfig.read("cats_silu", threshold=0.2)
    assert text.others[0].config == SparsityConfig.read("fatrelu", threshold=0.0)
    acting.detach()
    hf_sparse.patch(model, "jsrelu", part="vision")
    with pytest.raises(ValueError, match='in all of their parts; use lever="l1"'):
        TargetSparsity(sparsity=0.9, lever="threshold").attach(Training(model, steps=10))
    assert type(TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))) is ByPenalty


def test_blocks_that_cannot_be_watched_do_not_matter_if_they_are_not_patched() -> None:
    model = tiny("lfm2").train()  # its stock MLPs have the activation written in
    hf_sparse.patch(model, "relu", include="*.0.*")
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=40))
    for step in range(1, 31):
        update(model, acting, step, {"input_ids": IDS})
    acting.detach()
    assert acting.values()["training_sparsity"] == pytest.approx(0.9, abs=0.01)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_is_as_it_was_until_the_first_update() -> None:
    model = patched()
    TargetSparsity(sparsity=0.9).attach(Training(model, steps=10)).detach()
    assert hf_sparse.inspect(model).config == SparsityConfig.read("relu")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_of_experts_the_same_tokens_are_counted_however_they_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(rising_threshold, "_MOST", 6 * 48)
    rows = [{"input_ids": IDS[i : i + 1]} for i in range(4)]
    found = []
    for batches in ([{"input_ids": IDS}], rows):
        model = mixtral()
        acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
        update(model, acting, 1, *batches)
        found.append((acting.values()["training_sparsity"], *thresholds(model)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_what_is_never_counted_or_missed_is_told() -> None:
    model = patched()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        update(model, acting, 1, PADDED)
    model = patched()
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
    with pytest.warns(UserWarning, match=r"sparsity=0\.9 was not reached: none was counted"):
        acting.finish()
    update(model, acting, 1, PADDED)
    with pytest.warns(UserWarning, match=r"sparsity=0\.9 was not reached: it is 0\.\d+ in the end"):
        acting.finish()


def test_another_lever_or_model_does_not_go_on_with_a_state() -> None:
    one, other = (
        TargetSparsity(sparsity=0.9, lever=lever).attach(Training(patched(), steps=10))
        for lever in ("threshold", "l1")
    )
    with pytest.raises(ValueError, match="lever=threshold, and now it is l1"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="lever=l1, and now it is threshold"):
        one.load_state_dict(other.state_dict())
    small = patched(include="model.layers.1.mlp")
    with pytest.raises(ValueError, match="2 thresholds, and the model 1 patched"):
        TargetSparsity(sparsity=0.9).attach(Training(small, steps=10)).load_state_dict(one.state_dict())
    assert hf_sparse.inspect(small).config.activation.name == "relu"


def test_values_that_are_no_numbers_and_blocks_without_tokens_leave_thresholds_finite() -> None:
    model = patched()
    acting = TargetSparsity(sparsity=0.9).attach(Training(model, steps=10))
    acting.before_step(1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = math.nan
    first, second = (layer.mlp for layer in model.model.layers)

    def no_tokens(*_: object) -> None:
        second(torch.zeros(1, 0, 32))

    handle = first.register_forward_hook(no_tokens)
    model(input_ids=IDS)
    handle.remove()
    with torch.no_grad():
        acting.after_step(1)
    assert all(math.isfinite(one) for one in thresholds(model))


def test_methods_that_exclude_each_other_do_so_however_they_are_given() -> None:
    both = [TargetSparsity(sparsity=0.9), ThresholdShift(threshold=0.01)]
    with pytest.raises(ValueError, match="cannot act together so"):
        ActingTogether(both, Training(patched(), steps=10))


def test_the_config_says_the_thresholds_whenever_the_state_is_taken() -> None:
    model = patched()
    acting = ActingTogether(read_methods({"target_sparsity": {"sparsity": 0.9}}), Training(model, steps=20))
    for step in range(1, 21):
        update(model, acting, step, PADDED)
        if step == 10:
            acting.state_dict()
            assert model.config.hf_sparse["activation"]["threshold"] == thresholds(model)
    acting.finish()
    acting.detach()
    assert model.config.hf_sparse["activation"] == {"name": "fatrelu", "threshold": thresholds(model)}
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**PADDED).logits, model(**PADDED).logits)


def test_less_than_the_activation_gives_by_itself_is_told() -> None:
    model = patched()
    acting = TargetSparsity(sparsity=0.2).attach(Training(model, steps=4))
    for step in range(1, 5):
        update(model, acting, step, PADDED)
    with pytest.warns(UserWarning, match=r"sparsity=0\.2 is less than the 0\.\d+ that the activation gives"):
        acting.finish()
    assert thresholds(model) == [0.0, 0.0]
