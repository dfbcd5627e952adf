"""Stacked experts: found by what they compute, patched, measured, trained, saved, and run sparse."""

from __future__ import annotations

import copy
import inspect

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.shapes import recognise
from hf_sparse.modules import SparseExperts
from hf_sparse.objectives import L1Penalty
from support.activations import FIELDS, own_field
from support.compiler import CPP
from support.models import tiny
from support.peek import layouts
from support.skips import CountSkips
from triton_ops.activations import TABLE

SMALL = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MOE: dict[str, dict[str, object]] = {
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "olmoe": {},
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
    "deepseek_v4": {},  # a clamp between the first projection and h
    "longcat_flash": {  # experts that give a token back as it is
        "num_layers": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 40,
        "moe_topk": 3,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
    "nemotron_h": {"moe_intermediate_size": 24},  # plain experts
}
IDS = torch.arange(3, 35).view(2, 16)


def moe(model_type: str = "mixtral", **changes: object):
    torch.manual_seed(0)
    model = tiny(model_type, **(SMALL | MOE[model_type] | changes))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model) -> list[SparseExperts]:
    return [module for module in model.modules() if isinstance(module, SparseExperts)]


def swapped_by_hand(model, activation):
    """A stock model with another activation in every block."""
    other = copy.deepcopy(model)
    for block in find_blocks(other)[0]:
        block.module._modules[block.roles.act] = activation
    return other


def logits(model):
    """Without a graph, which would hold the weights."""
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=MOE)
def moe_type(request) -> str:
    return request.param


@pytest.mark.parametrize("backend", [CPP])
def test_patched_experts_compute_what_they_should(moe_type, backend) -> None:
    model = moe(moe_type)
    by_hand = logits(swapped_by_hand(model, nn.ReLU()))
    expected = logits(model)
    assert any(isinstance(block.roles, Experts) for block in find_blocks(model)[0])
    hf_sparse.patch(model, "original")
    assert torch.equal(logits(model), expected)
    hf_sparse.patch(model, "relu")
    assert torch.equal(logits(model), by_hand)
    assert not torch.allclose(by_hand, expected, atol=1e-2)
    with torch.no_grad(), hf_sparse.backend(backend), CountSkips() as skips:
        torch.testing.assert_close(model(IDS).logits, by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(IDS[:1, :1]).logits, by_hand[:1, :1], rtol=1e-4, atol=1e-5)
    assert skips.count >= 2 * len(hf_sparse.inspect(model).blocks)
    hf_sparse.unpatch(model)
    assert not experts_of(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("backend", [CPP])
def test_every_implementation_of_transformers_stays_and_may_follow_skipping(implementation, backend) -> None:
    model = moe("mixtral", experts_implementation=implementation)
    by_hand = logits(swapped_by_hand(model, nn.ReLU()))
    hf_sparse.patch(model, "relu")
    assert torch.equal(logits(model), by_hand)
    with torch.no_grad(), hf_sparse.backend(backend):
        model(IDS[:, :1])
    assert layouts(model) == {True}
    with torch.no_grad(), hf_sparse.backend("dense"):
        torch.testing.assert_close(model(IDS).logits, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", TABLE)
@pytest.mark.parametrize("backend", [CPP])
def test_every_activation_is_that_of_the_formula(activation, backend) -> None:
    model = moe("olmoe", **own_field(activation))
    row, value = TABLE[activation], sum(FIELDS[activation].values())
    hf_sparse.patch(model, activation, **FIELDS[activation])
    block = hf_sparse.inspect(model).blocks[0]
    (gate, _), (up, _), (down, _) = block.weights()
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 1], [3, 0], [2, 2], [1, 3], [3, 1]])
    weights = torch.rand(5, 2)
    expected = torch.zeros(5, 32)
    for t, slot in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        e = chosen[t, slot]
        u = F.linear(x[t], up[e])
        h = row.value(F.linear(x[t], gate[e]), value) * (u.relu() if row.relu_up else u)
        expected[t] += weights[t, slot] * F.linear(h, down[e])
    for way in ("dense", backend):
        with torch.no_grad(), hf_sparse.backend(way):
            torch.testing.assert_close(block.module(x, chosen, weights), expected, rtol=1e-4, atol=1e-5)
            named = {"top_k_weights": weights, "top_k_index": chosen}
            torch.testing.assert_close(block.module(x, **named), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.module(x, chosen, weights), expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(moe_type, tmp_path) -> None:
    model = moe(moe_type)
    report = hf_sparse.patch(model, "fatrelu", threshold=0.05)
    expected = model(IDS).logits
    with torch.no_grad(), hf_sparse.backend("torch"):
        model(IDS[:, :1])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(hf_sparse.inspect(loaded).blocks) == len(report.blocks)
    assert torch.equal(loaded(IDS).logits, expected)


def test_what_is_measured_is_what_reaches_the_down_projections(moe_type) -> None:
    """By the experts that tokens are routed to; the same on the stock model, and without the padding."""
    model = moe(moe_type)
    by_hand = swapped_by_hand(model, nn.ReLU())
    hf_sparse.patch(model, "relu")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    batches = [{"input_ids": IDS, "attention_mask": mask}]
    ours, theirs = (hf_sparse.measure(one, batches).layers for one in (model, by_hand))
    assert [(a.zeros, a.tokens, a.neurons) for a in ours] == [(b.zeros, b.tokens, b.neurons) for b in theirs]
    assert all(0.2 < layer.sparsity < 0.8 for layer in ours)
    routed = [layer for layer, block in zip(ours, find_blocks(model)[0], strict=True) if routes(block)]
    assert routed
    assert all(layer.dead is None for layer in routed)  # which expert a zero is of is not counted
    if moe_type != "longcat_flash":  # identities have no neurons
        assert {layer.tokens for layer in routed} == {2 * int(mask.sum())}


def watched(model, block) -> dict[str, tuple]:
    seen: dict[str, tuple] = {}
    handles = [
        block.watch(site, lambda value, tokens, site=site: seen.__setitem__(site, (value, tokens)))
        for site in ("x", "p", "a", "h", "y")
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def routes(block) -> bool:
    return isinstance(block.roles, Experts)


def test_sites_of_experts_say_which_token_a_row_is_of(moe_type) -> None:
    model = moe(moe_type)
    hf_sparse.patch(model, "relu")
    for block in filter(routes, find_blocks(model)[0]):
        seen = watched(model, block)
        assert seen["x"][1] is None
        assert seen["y"][0].shape == seen["x"][0].shape
        for site in ("p", "a", "h"):
            value, tokens = seen[site]
            assert value.shape == (len(tokens), block.intermediate_size)
            assert torch.equal(tokens, seen["h"][1])
        assert torch.equal(seen["a"][0], seen["p"][0].relu())
        assert not seen["h"][0][seen["a"][0] == 0].any()
        if block.form == "gated" and not block.roles.own_gate:
            (gate, _), *_ = block.weights()
            x = seen["x"][0][seen["p"][1]]
            pre = torch.stack([F.linear(x, one) for one in gate[: block.roles.count(block.module)]])
            assert torch.isclose(pre, seen["p"][0], atol=1e-5).all(-1).any(0).all()  # of one of the experts


def test_the_penalty_is_the_mean_over_routed_tokens_and_trains_the_experts() -> None:
    model = moe("mixtral").train()
    hf_sparse.patch(model, "relu")
    stock = swapped_by_hand(moe("mixtral").train(), nn.ReLU())
    values, gradients = [], []
    for one in (model, stock):
        one.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with L1Penalty(one) as l1:
            one(IDS)
            values.append(l1.value())
            values[-1].backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*values)
    assert values[0] > 0
    assert any("gate_up_proj" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def skip(model) -> None:
    with torch.no_grad(), hf_sparse.backend("torch"):
        training = model.training
        model.eval()(IDS[:1, :1], use_cache=False)
        model.train(training)


LOOKS = {
    "parameters": lambda model: list(model.parameters()),
    "own parameters": lambda model: [list(one.parameters(recurse=False)) for one in model.modules()],
    "an attribute": lambda model: [layer.mlp.experts.down_proj for layer in model.model.layers],
    "get_parameter": lambda model: (
        model.get_parameter("model.layers.0.mlp.experts.down_proj")
        is model.get_parameter("model.layers.1.mlp.experts.down_proj")
    ),
    "a state dict": lambda model: model.state_dict(),
    "a copy": lambda model: copy.deepcopy(model),
    "a dtype": lambda model: model.double().float(),
    "a gradient": lambda model: model(IDS).logits.sum(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_the_parameters_finds_the_stock_layout(look) -> None:
    model = moe("mixtral", num_hidden_layers=2)
    hf_sparse.patch(model, "relu")
    skip(model)
    assert layouts(model) == {True}
    LOOKS[look](model)
    assert layouts(model) == {False}
    skip(model)
    assert layouts(model) == {True}


@pytest.mark.parametrize("holder", ["optimizer", "list", "state dict", "the stock block"])
def test_held_experts_run_dense(holder) -> None:
    model = moe("mixtral", num_hidden_layers=2)
    hf_sparse.patch(model, "relu")
    held = {
        "optimizer": lambda: torch.optim.AdamW(model.parameters()),
        "list": lambda: list(model.parameters()),
        "state dict": lambda: model.state_dict(),
        "the stock block": lambda: [one.stock for one in experts_of(model)],
    }[holder]()
    skip(model)
    assert layouts(model) == {False}
    with pytest.warns(UserWarning, match="2 of 2 MLP blocks run dense for now"):
        hf_sparse.prepare(model)
    del held
    skip(model)
    assert layouts(model) == {True}


def test_training_after_skipping_is_that_of_a_run_that_never_skips() -> None:
    models = [moe("mixtral"), moe("mixtral")]
    for model, skips in zip(models, (False, True), strict=True):
        hf_sparse.patch(model, "relu")
        for _ in range(2):
            if skips:
                skip(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            for _ in range(2):
                model.train()(IDS, labels=IDS).loss.backward()
                if skips:
                    skip(model)
                optimizer.step()
                optimizer.zero_grad()
            del optimizer
    torch.testing.assert_close(*(dict(one.state_dict()) for one in models), rtol=1e-4, atol=1e-5)


def test_a_state_dict_can_be_saved_after_skipping(tmp_path) -> None:
    model = moe("mixtral", tie_word_embeddings=False)
    hf_sparse.patch(model, "relu")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    skip(model)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "saved.safetensors")
    found = safetensors.torch.load_file(tmp_path / "saved.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_parameter_under_another_tool_is_computed_by_that() -> None:
    """As PEFT's ``target_parameters`` does it."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = moe("mixtral")
    hf_sparse.patch(model, "relu")
    stock = swapped_by_hand(moe("mixtral"), nn.ReLU())
    for one in (model, stock):
        for layer in one.model.layers:
            nn.utils.parametrize.register_parametrization(layer.mlp.experts, "down_proj", Doubled())
    with torch.no_grad(), hf_sparse.backend("torch"):
        assert torch.equal(model(IDS).logits, stock(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", CPP])
def test_compiled_without_graph_breaks(backend) -> None:
    model = moe("mixtral")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    with torch.no_grad(), hf_sparse.backend(backend):
        expected = model(IDS).logits
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS).logits, expected)


def test_tuning_covers_experts(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path))
    model = moe("qwen2_moe", num_hidden_layers=1)
    hf_sparse.patch(model, "relu")
    report = hf_sparse.tune(model, [{"input_ids": IDS}], tokens=(1,))
    assert [layer.obstacle for layer in report.layers] == [None, None]
    assert all(0 < one.density < 1 for one in experts_of(model))


class Stacked(nn.Module):
    """Names that say nothing."""

    def __init__(self, config=None) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 40, 8))
        self.second = nn.Parameter(torch.randn(4, 8, 20))
        self.f = nn.SiLU()

    def expert(self, x, e):
        gate, up = F.linear(x, self.first[e]).chunk(2, -1)
        return F.linear(self.f(gate) * up, self.second[e])

    def forward(self, x, experts, weights):
        y = torch.zeros_like(x)
        for slot in range(experts.shape[1]):
            for t, e in enumerate(experts[:, slot].tolist()):
                y[t] += self.inner(x[t], e) * weights[t, slot]
        return y

    def inner(self, x, e):
        return Stacked.expert(self, x, e)


def variant(body):
    """``Stacked`` whose forward has ``body(self, x, e)`` for one expert, not as a method."""

    class Variant(Stacked):
        def forward(self, x, experts, weights):
            y = torch.zeros_like(x)
            for slot in range(experts.shape[1]):
                for t, e in enumerate(experts[:, slot].tolist()):
                    y[t] += body(self, x[t], e) * weights[t, slot]
            return y

    return Variant()


def up_first(self, x, e):
    up, gate = F.linear(x, self.first[e]).chunk(2, -1)
    return F.linear(self.f(gate) * up, self.second[e])


def limited(self, x, e):
    gate, up = F.linear(x, self.first[e]).chunk(2, -1)
    return F.linear(self.f(gate.clamp(max=7.0)) * up, self.second[e])


def interleaved(self, x, e):
    both = F.linear(x, self.first[e])
    return F.linear(self.f(both[::2]) * both[1::2], self.second[e])


def test_experts_are_recognised_by_what_they_compute() -> None:
    roles = recognise(variant(Stacked.expert))
    assert isinstance(roles, Experts)
    assert (roles.first, roles.down, roles.act, roles.form) == ("first", "second", "f", "gated")


@pytest.mark.parametrize("body", [up_first, limited])
def test_other_functions_of_stacked_parameters_are_refused(body) -> None:
    assert recognise(variant(body)) is None


def clamped_like_gpt_oss(self, x, e):
    gate, up = F.linear(x, self.first[e]).view(-1, 2).unbind(-1)
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return F.linear(gate * torch.sigmoid(1.702 * gate) * (up + 1), self.second[e])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (interleaved, {"interleaved": True, "limit": None, "plus": 0.0, "written": None}),
        (clamped_like_gpt_oss, {"interleaved": True, "limit": "limit", "plus": 1.0, "written": "quick_gelu"}),
    ],
)
def test_other_gates_of_stacked_experts(body, expected) -> None:
    module = variant(body)
    module.limit = 7.0
    if expected["written"]:
        del module.f
    roles = recognise(module)
    assert isinstance(roles, Experts)
    assert {name: getattr(roles, name) for name in expected} == expected
    assert not roles.is_plain_formula
    x, chosen = 5 * torch.randn(6, 8), torch.randint(0, 4, (6, 2))
    weights = torch.rand(6, 2)
    calls = x, chosen, weights
    same = SparseExperts(module, roles, roles.activation(module))
    assert torch.equal(same(*calls), module(*calls))
    sparse = SparseExperts(module, roles, nn.ReLU()).eval()
    dense = sparse(*calls).detach()
    assert not torch.allclose(dense, module(*calls), atol=1e-3)
    (gate, _), (up, _), (down, _) = roles.weights(module)
    p, u = (torch.einsum("td,efd->tef", x, w) for w in (gate, up))
    if expected["limit"]:
        p, u = p.clamp(max=7.0), u.clamp(-7.0, 7.0) + 1
    y = torch.einsum("tef,edf->ted", p.relu() * u, down)
    by_formula = sum(weights[:, [k]] * y[torch.arange(6), chosen[:, k]] for k in range(2))
    torch.testing.assert_close(dense, by_formula.detach(), rtol=1e-4, atol=1e-4)
    del gate, up, down, by_formula, y, p, u, same, module  # what holds the weights
    with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
        torch.testing.assert_close(sparse(*calls), dense, rtol=1e-4, atol=1e-4)
    assert skips.count


def test_a_gate_of_its_own_must_be_silent_with_its_activation() -> None:
    class Own(Stacked):
        def _apply_gate(self, both):
            gate, up = both.chunk(2, -1)
            return (self.f(gate) + self.plus).clamp(max=5.0) * up

        def forward(self, x, experts, weights):
            y = torch.zeros_like(x)
            for slot in range(experts.shape[1]):
                for t, e in enumerate(experts[:, slot].tolist()):
                    h = self._apply_gate(F.linear(x[t], self.first[e]))
                    y[t] += F.linear(h, self.second[e]) * weights[t, slot]
            return y

    module = use_experts_implementation(Own)(None)
    module.plus = 0.0
    roles = recognise(module)
    assert isinstance(roles, Experts)
    assert roles.own_gate
    module.plus = 1.0
    assert recognise(module) is None


def test_recognising_touches_no_weight() -> None:
    model = moe("mixtral")
    before = {name: p.clone() for name, p in model.named_parameters()}
    find_blocks(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.device("meta"):
        assert recognise(variant(Stacked.expert)) is not None


def test_the_signature_that_is_read_is_that_of_the_class() -> None:
    """Decorated forwards take ``*args``."""
    forward = type(moe("mixtral").model.layers[0].mlp.experts).forward
    assert list(inspect.signature(inspect.unwrap(forward)).parameters)[1:] == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("patch_first", [True, False])
def test_adapters_on_experts(patch_first, tmp_path) -> None:
    """PEFT's ``target_parameters``: computed with the adapter, merged, saved, loaded."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = moe("mixtral")
    stock = swapped_by_hand(model, nn.ReLU())
    if patch_first:
        hf_sparse.patch(model, "relu")
    adapted = []
    for one in (stock, model):
        torch.manual_seed(1)
        adapted.append(get_peft_model(one, copy.deepcopy(config)).eval())
    if not patch_first:
        hf_sparse.patch(adapted[1], "relu")
    assert len(hf_sparse.inspect(adapted[1]).blocks) == 3
    expected = logits(adapted[0])
    with hf_sparse.backend("torch"):
        assert torch.equal(logits(adapted[1]), expected)
        merged = adapted[1].merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    hf_sparse.unpatch(merged)
    assert not experts_of(merged)


def test_a_parametrised_block_is_not_taken_apart() -> None:
    model = moe("mixtral")
    hf_sparse.patch(model, "relu")
    experts = model.model.layers[1].mlp.experts
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    expected = logits(model)
    with pytest.raises(hf_sparse.PatchError, match=r"MixtralExperts are parametrised \(down_proj\)"):
        hf_sparse.unpatch(model)
    assert torch.equal(logits(model), expected)
    assert len(experts_of(model)) == 3
