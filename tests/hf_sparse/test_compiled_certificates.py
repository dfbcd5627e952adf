"""Certificates in a compiled step: the same tokens, whatever is done to the weights between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    StoppingCriteriaList,
)

import hf_sparse
import triton_ops
from hf_sparse import PatchError, compiled_step
from hf_sparse.run_certificates import Memory, RunCertificates
from support.compiler import needs_compiler
from triton_ops.cpu import backend as cpu

pytestmark = needs_compiler
IDS = torch.tensor([[5, 9, 7]])
LONG = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STEPS = 38
"""After that of the prompt and the first of the graph, in which all logits are computed."""


@dataclass
class Uses:
    graphs: list[int] = field(default_factory=list)
    mlps: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def clear(self) -> None:
        for one in (self.graphs, self.mlps, self.outputs):
            one.clear()


@pytest.fixture
def uses(monkeypatch) -> Iterator[Uses]:
    """The graphs, by a compiler that does nothing to them, and calls of kernels with certificates."""
    found, greedy, mlp = Uses(), cpu.BACKEND.greedy_linear, cpu.BACKEND.mlp

    def backend(graph, inputs, **_):
        found.graphs.append(len(graph.graph.nodes))
        return graph.forward

    def greedy_linear(*args):
        y = greedy(*args)
        found.outputs.append(int((y == -torch.inf).sum()))
        return y

    def whole_mlp(x, weights):
        if weights.certificate is not None:
            found.mlps.append(x.numel() // x.shape[-1])
        return mlp(x, weights)

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_step, "BACKEND", backend)
    # Frozen, as everything that a backend says of itself.
    for name, function in (("greedy_linear", greedy_linear), ("mlp", whole_mlp)):
        monkeypatch.setitem(vars(cpu.BACKEND), name, function)
    with hf_sparse.backend("cpp"):
        yield found


def prepared(model: PreTrainedModel, **options: bool) -> PreTrainedModel:
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True, **(options or {"certify": True, "greedy_output": True}))
    return model


def plainly(model: PreTrainedModel, ids: Tensor = IDS, **options: object) -> Tensor:
    """What it generates by a compiled step without certificates."""
    other = copy.deepcopy(model)
    hf_sparse.prepare(other, compile=True)
    return other.generate(ids, **{**LONG, **options})


@pytest.fixture
def llama(tiny_model) -> PreTrainedModel:
    return prepared(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_llama_generates_the_same(assets, uses, dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K", dtype=dtype).eval()
    expected = plainly(prepared(model))
    uses.clear()
    for _ in range(2):
        assert torch.equal(model.generate(IDS, **LONG), expected)
    assert len(uses.graphs) == 1
    assert len(uses.outputs) == 2 * STEPS
    assert sum(uses.outputs) > 0.9 * len(uses.outputs) * model.config.vocab_size
    assert len(uses.mlps) == 2 * (STEPS + 1) * model.config.num_hidden_layers


def test_each_may_go_alone(tiny_model, uses) -> None:
    for option, other in (("certify", uses.outputs), ("greedy_output", uses.mlps)):
        model = prepared(tiny_model("llama"), **{option: True})
        expected = plainly(model)
        uses.clear()
        assert torch.equal(model.generate(IDS, **LONG), expected)
        assert other == []
        assert uses.outputs or uses.mlps


def test_a_batch_has_its_logits_certified_and_its_mlps_not(llama, uses) -> None:
    two = torch.cat([IDS, IDS + 1])
    assert torch.equal(llama.generate(two, **LONG), plainly(llama, two))
    assert uses.outputs
    assert uses.mlps == []


@pytest.mark.parametrize("where", ["in place", "data"])
def test_weights_that_change_between_two_calls_count(llama, uses, where) -> None:
    before = llama.generate(IDS, **LONG)
    for weight in (llama.lm_head.weight, llama.model.layers[0].mlp.gate_proj.weight):
        with torch.no_grad():
            (weight if where == "in place" else weight.data).copy_(torch.randn_like(weight))
    uses.clear()
    after = llama.generate(IDS, **LONG)
    assert not torch.equal(before, after)
    assert uses.outputs
    assert uses.mlps
    assert torch.equal(after, plainly(llama))


@pytest.mark.parametrize("moved", [False, True])
def test_weights_that_change_meanwhile_count(llama, uses, moved) -> None:
    def change(model: PreTrainedModel) -> StoppingCriteriaList:
        weights = [model.lm_head.weight, model.model.layers[1].mlp.gate_proj.weight]

        def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
            for weight in weights:
                with torch.no_grad():
                    if moved:
                        weight.data = weight.roll(1, 0)
                    else:
                        weight.copy_(weight.roll(1, 0))
            return torch.zeros(len(ids), dtype=torch.bool)

        return StoppingCriteriaList([criterion])

    other = copy.deepcopy(llama)
    hf_sparse.prepare(other, compile=True)
    expected = other.generate(IDS, stopping_criteria=change(other), **LONG)
    uses.clear()
    assert torch.equal(llama.generate(IDS, stopping_criteria=change(llama), **LONG), expected)
    assert uses.outputs


def test_logits_that_are_scaled_are_all_computed(uses) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = prepared(GraniteForCausalLM(GraniteConfig(**sizes, **heads, logits_scaling=4.0)).eval())
    assert torch.equal(model.generate(IDS, **LONG), plainly(model))
    assert uses.outputs == []
    assert uses.mlps


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"repetition_penalty": 1.2}, {"max_new_tokens": 20}]
)
def test_who_looks_at_more_gets_all(llama, uses, options) -> None:
    torch.manual_seed(0)
    expected = plainly(llama, **options)
    uses.clear()
    torch.manual_seed(0)
    assert torch.equal(llama.generate(IDS, **{**LONG, **options}), expected)
    assert uses.outputs == []
    assert uses.mlps


def test_a_lens_that_comes_meanwhile_sees_all_logits(llama, uses) -> None:
    handles, seen = [], []

    def look(module: nn.Module, args: object, output: Tensor) -> None:
        seen.append(llama.lm_head(llama.model.norm(output)))

    def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
        if ids.shape[1] == 10:
            handles.append(llama.model.layers[0].register_forward_hook(look))
        return torch.zeros(len(ids), dtype=torch.bool)

    tokens = llama.generate(IDS, stopping_criteria=StoppingCriteriaList([criterion]), **LONG)
    assert seen
    assert all(logits.isfinite().all() for logits in seen)
    handles[0].remove()
    assert torch.equal(tokens, plainly(llama))
    assert torch.equal(llama.generate(IDS, **LONG), tokens)


def test_other_calls_meanwhile_get_all(llama, uses) -> None:
    seen: list[Tensor] = []

    def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
        with hf_sparse.backend("cpp"):
            seen.append(llama(IDS[:, :1]).logits)
        return torch.zeros(len(ids), dtype=torch.bool)

    tokens = llama.generate(IDS, stopping_criteria=StoppingCriteriaList([criterion]), **LONG)
    assert all(logits.isfinite().all() for logits in seen)
    assert torch.equal(tokens, plainly(llama))


def test_inference_mode(llama, uses) -> None:
    with torch.inference_mode():
        tokens = llama.generate(IDS, **LONG)
    assert torch.equal(tokens, plainly(llama))


def test_a_copy_has_its_own(llama, uses) -> None:
    expected = llama.generate(IDS, **LONG)
    twin = copy.deepcopy(llama)
    for weight in (twin.lm_head.weight, twin.model.layers[0].mlp.gate_proj.weight):
        torch.nn.init.normal_(weight)
    uses.clear()
    assert torch.equal(twin.generate(IDS, **LONG), plainly(twin))
    assert uses.outputs
    assert uses.mlps
    assert torch.equal(llama.generate(IDS, **LONG), expected)


@pytest.mark.parametrize("end", [{}, {"compile": True}, {"certify": True}])
def test_it_ends(llama, uses, end) -> None:
    llama.generate(IDS, **LONG)
    hf_sparse.prepare(llama, **end)
    uses.clear()
    llama.generate(IDS, **LONG)
    assert uses.outputs == []
    assert not uses.mlps or "certify" in end


def test_a_prepare_after_compiling_still_stores_for_skipping(llama, uses) -> None:
    """Dynamo leaves what it has looked at in cycles."""
    llama.generate(IDS, **LONG)
    llama.state_dict()
    hf_sparse.prepare(llama, compile=True)
    layers = llama.model._modules["layers"]._modules.values()  # asked otherwise, they would be given back
    downs = [layer._modules["mlp"]._modules["down_proj"]._parameters["weight"] for layer in layers]
    assert all(map(triton_ops.is_neuron_major, downs))


def test_an_output_layer_of_other_strides_is_computed_in_full(llama, uses) -> None:
    weight = llama.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert torch.equal(llama.generate(IDS, **LONG), plainly(llama))
    assert uses.outputs == []
    assert uses.mlps


def test_on_another_device_it_is_an_error(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.to("meta")
    before = vars(model).copy()
    with pytest.raises(
        PatchError, match="certify=True and compile=True go together on the CPU, and this model is"
    ):
        hf_sparse.prepare(model, certify=True, compile=True)
    assert vars(model) == before


def test_memory_is_used_again() -> None:
    weight, other, memory = torch.randn(6, 4), torch.randn(6, 4), Memory()
    first = RunCertificates(memory)
    held = first.of(weight)
    assert first.of(weight) is held
    rows = held.rows.clone()
    first.end()
    second = RunCertificates(memory)
    again = second.of(other)
    assert again.rows.data_ptr() == held.rows.data_ptr()
    assert not torch.equal(again.rows, rows)
    assert second.of(weight).rows.data_ptr() != again.rows.data_ptr()
    assert copy.deepcopy(memory).take(weight) is None
    second.end()
    shape = torch.randn(4, 6)
    assert RunCertificates(memory).of(shape).rows.shape == shape.shape


def stepwise(change: Callable[[Tensor], None]) -> bool:
    """Whether a certificate is another one after a change."""
    weight, held = torch.randn(6, 4), RunCertificates(Memory())
    before = [one.clone() for one in held.of(weight)]
    change(weight)
    return not all(map(torch.equal, before, held.of(weight)))


def test_changes_that_are_counted_or_move_a_weight_are_noticed() -> None:
    assert stepwise(lambda weight: weight.neg_())
    assert stepwise(lambda weight: setattr(weight, "data", torch.randn(6, 4)))
    assert not stepwise(lambda weight: None)
