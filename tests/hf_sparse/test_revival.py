"""Dead neurons are found and drawn towards new weights, as arXiv 2603.23198 does it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters import find_blocks
from hf_sparse.methods import Acting, Training
from hf_sparse.methods.revival import Revival
from support.runs import run_on_two

DEAD = [0, 3, 4]


def with_dead(kind: str, tiny: Callable[..., PreTrainedModel], activation: str = "relu") -> PreTrainedModel:
    """Neurons ``DEAD`` of the second block have no weights before the activation, so that they stay 0."""
    model = tiny(kind, num_hidden_layers=2).train()
    hf_sparse.patch(model, activation)
    with torch.no_grad():
        for weight, bias in find_blocks(model)[0][1].weights()[:-1]:
            weight[DEAD] = 0
            if bias is not None:
                bias[DEAD] = 0
    return model


def look(model: PreTrainedModel, acting: Acting, steps: range, ids: Tensor, **inputs: Tensor) -> None:
    for step in steps:
        acting.before_step(step)
        model(input_ids=ids, **inputs)
        with torch.no_grad():
            acting.after_step(step)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [("llama", "relu"), ("llama", "drelu"), ("phi3", "relu"), ("gpt2", "relu"), ("opt", "relu")],
)
def test_rows_of_dead_neurons_move_by_the_formula_and_no_others(tiny_model, kind, activation) -> None:
    model = with_dead(kind, tiny_model, activation)
    acting = Revival(window=3, strength=0.25, std=0.5, seed=7).attach(Training(model, steps=6))
    ids = torch.randint(3, 128, (8, 16))
    before = copy.deepcopy(model.state_dict())
    look(model, acting, range(1, 3), ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    blocks = find_blocks(model)[0]
    old = [[weight.detach().clone() for weight, _ in block.weights()] for block in blocks]
    alive = []
    for block in blocks:
        block.watch("h", lambda h, _: alive.append((h != 0).flatten(0, -2).any(0)))
    look(model, acting, range(3, 4), ids)
    deciding = 2 if activation == "drelu" else 1
    generator = torch.Generator().manual_seed((7 << 32) + 3)
    dead = [(~one).nonzero().flatten().tolist() for one in alive]
    assert set(DEAD) <= set(dead[1])
    for rows, block, weights in zip(dead, blocks, old, strict=True):
        for i, (weight, _) in enumerate(block.weights()):
            expected = weights[i].clone()
            if i < deciding and rows:
                drawn = torch.randn(len(rows), expected.shape[1], generator=generator)
                expected[rows] = 0.75 * expected[rows] + 0.25 * 0.5 * drawn
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    share = sum(map(len, dead)) / sum(len(one) for one in alive)
    assert acting.values()["dead_neurons"] == pytest.approx(share)
    acting.detach()


def test_revived_neurons_fire_again(tiny_model) -> None:
    model = with_dead("llama", tiny_model)
    acting = Revival(window=1).attach(Training(model, steps=9))
    ids = torch.randint(3, 128, (8, 16))
    look(model, acting, range(1, 2), ids)
    first = acting.values()["dead_neurons"]
    assert first > 0
    with torch.no_grad():  # the up projection of them was taken out as well
        model.model.layers[1].mlp.up_proj.weight[DEAD] = 1.0
    look(model, acting, range(2, 3), ids)
    assert acting.values()["dead_neurons"] < first


def test_padding_evaluation_and_recomputation_wake_nobody(tiny_model) -> None:
    model = with_dead("llama", tiny_model)
    padded = torch.randint(3, 128, (2, 8))
    padded[:, :4] = 1
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    with torch.no_grad():  # fire for the padding alone
        model.model.layers[1].mlp.up_proj.weight[DEAD] = 1.0
    seen: list[Tensor] = []

    def fire(_: object, args: object, h: Tensor) -> Tensor:
        out = h.clone()
        out[:, :4, DEAD] = 1.0
        seen.append(out)
        return out

    model.model.layers[1].mlp.gate_proj.register_forward_hook(fire)
    acting = Revival(window=1, strength=1.0).attach(Training(model, steps=1))
    acting.before_step(1)
    with torch.no_grad():
        model(input_ids=padded)  # an evaluation
    model(input_ids=padded, attention_mask=mask)
    with torch.no_grad():
        acting.after_step(1)
    assert len(seen) == 2
    assert model.model.layers[1].mlp.gate_proj.weight[DEAD].abs().min() > 0


def test_a_resumed_run_knows_who_was_active(tiny_model) -> None:
    model = with_dead("llama", tiny_model)
    twin = copy.deepcopy(model)
    method, ids = Revival(window=4), torch.randint(3, 128, (1, 2))
    other_ids = torch.randint(3, 128, (1, 3))
    acting = method.attach(Training(model, steps=8))
    look(model, acting, range(1, 3), ids)
    look(model, acting, range(3, 5), other_ids)
    first = method.attach(Training(twin, steps=8))
    look(twin, first, range(1, 3), ids)
    state = json.loads(json.dumps(first.state_dict()))
    first.detach()
    second = method.attach(Training(twin, steps=8))
    second.load_state_dict(state)
    look(twin, second, range(3, 5), other_ids)
    assert second.values() == acting.values()
    assert second.state_dict() == acting.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_what_cannot_be_revived_is_refused(tiny_model) -> None:
    model = tiny_model("mixtral", num_local_experts=4)
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match=r"stacked experts model\.layers\.0"):
        Revival().attach(Training(model, steps=1))
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    with pytest.raises(PatchError, match=r"model\.layers\.1\.mlp, which is not trained"):
        Revival().attach(Training(model, steps=1))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="dense baseline"):
        Revival().check(None)
    Revival().check(SparsityConfig())


@pytest.mark.slow
def test_sharded_and_replicated_models_are_revived_as_one_is(tmp_path) -> None:
    run_on_two("support.reviving", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    one = found.pop("one process")
    for way in ("fsdp1", "fsdp2 of a layer for both"):
        assert "the way they are sharded" in found.pop(way)
    assert found.keys() == {"ddp", "fsdp2"}
    assert one[1] > 0
    for way, (weights, dead) in found.items():
        assert dead == one[1], way
        torch.testing.assert_close(weights, one[0], rtol=1e-6, atol=1e-7, msg=way)
