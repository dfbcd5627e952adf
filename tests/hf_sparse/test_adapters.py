"""Blocks are found by structure and confirmed by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sparse.adapters import find_blocks
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
    assert roles is not None
    assert (roles.gate, roles.up, roles.down, roles.act) == ("w1", "w3", "w2", "f")


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


def test_blocks_of_real_models(tiny_model, model_type) -> None:
    blocks, skipped = find_blocks(tiny_model(model_type))
    assert [(b.hidden_size, b.intermediate_size) for b in blocks] == [(32, 88)] * 3
    assert not skipped


def test_experts_are_listed_as_left_alone(tiny_model) -> None:
    model = tiny_model(
        "qwen2_moe", moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4
    )
    blocks, skipped = find_blocks(model)
    assert len(blocks) == 3  # the shared experts
    assert {s.class_name for s in skipped} == {"Qwen2MoeExperts"}
    assert "stacked experts" in skipped[0].reason
