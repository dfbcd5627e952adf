"""Blocks are found by structure and confirmed by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse.adapters import Block, find_blocks
from hf_sparse.adapters.fused import Fused as FusedRoles
from hf_sparse.adapters.gated import Gated as GatedRoles
from hf_sparse.adapters.shapes import recognise


class Gated(nn.Module):
    """Names that say nothing, in an order that says nothing."""

    def __init__(self, hidden: int = 8, intermediate: int = 20) -> None:
        super().__init__()
        self.w2 = nn.Linear(intermediate, hidden)
        self.w3 = nn.Linear(hidden, intermediate)
        self.w1 = nn.Linear(hidden, intermediate)
        self.f = nn.SiLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.w2(self.f(self.w1(x)) * self.w3(x)))


class Square(Gated):
    """As wide inside as outside: sizes cannot tell the down projection."""

    def __init__(self) -> None:
        super().__init__(8, 8)


class Clamped(Gated):
    def forward(self, x):
        return self.w2(self.f(self.w1(x)).clamp(max=0.1) * self.w3(x))


class IgnoresItsActivation(Gated):
    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


class ActivationAfterProduct(Gated):
    def forward(self, x):
        return self.w2(self.f(self.w1(x) * self.w3(x)))


class Residual(Gated):
    def forward(self, x):
        return x + self.w2(self.f(self.w1(x)) * self.w3(x))


class TwoArguments(Gated):
    def forward(self, x, residual):
        return residual + self.w2(self.f(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("mlp", [Gated, Square])
def test_roles_come_from_what_is_computed(mlp: type[nn.Module]) -> None:
    roles = recognise(mlp())
    assert isinstance(roles, GatedRoles)
    assert (roles.gate, roles.up, roles.down, roles.act) == ("w1", "w3", "w2", "f")


class Fused(nn.Module):
    gate_first = True

    def __init__(self, hidden: int = 8, intermediate: int = 20) -> None:
        super().__init__()
        self.w2 = nn.Linear(intermediate, hidden)
        self.w13 = nn.Linear(hidden, 2 * intermediate)
        self.f = nn.SiLU()
        self.first = type(self).gate_first

    def forward(self, x):
        halves = self.w13(x).chunk(2, dim=-1)
        gate, up = halves if self.first else halves[::-1]
        return self.w2(up * self.f(gate))


class FusedTheOtherWay(Fused):
    gate_first = False


class Interleaved(Fused):
    def forward(self, x):
        both = self.w13(x)
        return self.w2(self.f(both[..., ::2]) * both[..., 1::2])


@pytest.mark.parametrize("mlp", [Fused, FusedTheOtherWay])
def test_gate_and_up_in_one_layer(mlp: type[Fused]) -> None:
    module = mlp()
    roles = recognise(module)
    assert isinstance(roles, FusedRoles)
    assert roles.gate_first is mlp.gate_first
    block = Block("mlp", module, roles)
    assert (block.hidden_size, block.intermediate_size) == (8, 20)
    x = torch.randn(3, 8)
    (gate, gate_bias), (up, up_bias), (down, down_bias) = block.weights()
    h = torch.nn.functional.silu(x @ gate.t() + gate_bias) * (x @ up.t() + up_bias)
    torch.testing.assert_close(module(x), h @ down.t() + down_bias)


class NeedsItsClass(Gated):
    def forward(self, x):
        return super().forward(x)


class NeedsAMethod(Gated):
    def forward(self, x):
        return self.down(self.f(self.w1(x)) * self.w3(x))

    def down(self, h):
        return self.w2(h)


@pytest.mark.parametrize(
    "mlp",
    [
        Clamped,
        IgnoresItsActivation,
        ActivationAfterProduct,
        Residual,
        TwoArguments,
        NeedsItsClass,
        NeedsAMethod,
        Interleaved,
    ],
)
def test_other_functions_of_the_same_structure_are_refused(mlp: type[nn.Module]) -> None:
    assert recognise(mlp()) is None


def test_recognising_leaves_weights_and_random_state_alone() -> None:
    mlp = Gated()
    weights = {name: p.clone() for name, p in mlp.named_parameters()}
    state = torch.get_rng_state()
    recognise(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    assert mlp.training
    assert all(torch.equal(p, weights[name]) for name, p in mlp.named_parameters())


def test_recognises_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert recognise(Gated()) is not None


def test_blocks_of_real_models(tiny_model, any_type) -> None:
    blocks, skipped = find_blocks(tiny_model(any_type))
    assert [(b.hidden_size, b.intermediate_size) for b in blocks] == [(32, 88)] * 3
    assert not skipped


def test_every_site_of_a_block_can_be_watched(tiny_model, any_type, input_ids) -> None:
    model = tiny_model(any_type)
    hf_sparse.patch(model, "relu")
    (block, *_), _ = find_blocks(model)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        block.watch(site, lambda value, _, site=site: seen.__setitem__(site, value))
        for site in ("x", "p", "a", "h", "y")
    ]
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    *first, down = block.weights()
    linear = torch.nn.functional.linear
    close = torch.testing.assert_close
    close(seen["p"], linear(seen["x"], *first[0]))
    close(seen["a"], seen["p"].relu())
    h = seen["a"] * (linear(seen["x"], *first[1]) if block.form == "gated" else 1)
    close(seen["h"], h if any_type != "bitnet" else block.module.ffn_sub_norm(h))
    close(seen["y"], linear(seen["h"], *down))
    seen.clear()
    with torch.no_grad():
        model(input_ids)
    assert not seen


def test_experts_are_listed_as_left_alone(tiny_model) -> None:
    model = tiny_model(
        "qwen2_moe", moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4
    )
    blocks, skipped = find_blocks(model)
    assert len(blocks) == 3  # the shared experts
    assert {s.class_name for s in skipped} == {"Qwen2MoeExperts"}
    assert "stacked experts" in skipped[0].reason
