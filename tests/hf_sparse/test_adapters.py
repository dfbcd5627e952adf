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
from hf_sparse.modules import SparseMLP


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


class FactorsTheOtherWay(Gated):
    def forward(self, x):
        return self.w2(self.w3(x) * self.f(self.w1(x)))


class Clamped(Gated):
    def forward(self, x):
        return self.w2(self.f(self.w1(x)).clamp(max=0.1) * self.w3(x))


class IgnoresItsActivation(Gated):
    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


class ActivationAfterProduct(Gated):
    def forward(self, x):
        return self.w2(self.f(self.w1(x) * self.w3(x)))


class ActivatedTwice(Gated):
    def forward(self, x):
        return self.w2(self.f(self.f(self.w1(x))) * self.w3(x))


class ThreeFactors(Gated):
    def forward(self, x):
        return self.w2(self.f(self.w1(x)) * self.w3(x) * self.w3(x))


class Residual(Gated):
    def forward(self, x):
        return x + self.w2(self.f(self.w1(x)) * self.w3(x))


class TwoArguments(Gated):
    def forward(self, x, residual):
        return residual + self.w2(self.f(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("mlp", [Gated, Square, FactorsTheOtherWay])
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

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(up * self.f(gate))


class FusedTheOtherWay(Fused):
    gate_first = False

    def forward(self, x):
        up, gate = self.w13(x).chunk(2, dim=-1)
        return self.w2(up * self.f(gate))


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
        ActivatedTwice,
        ThreeFactors,
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


def test_every_site_of_a_block_can_be_watched(tiny_model, unrouted_type, input_ids) -> None:
    model = tiny_model(unrouted_type)
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
    close(seen["h"], h if unrouted_type != "bitnet" else block.module.ffn_sub_norm(h))
    close(seen["y"], linear(seen["h"], *down))
    seen.clear()
    with torch.no_grad():
        model(input_ids)
    assert not seen


def test_experts_of_another_kind_are_listed_as_left_alone(tiny_model) -> None:
    model = tiny_model("llama4_text", num_local_experts=4, intermediate_size_mlp=88)
    blocks, skipped = find_blocks(model)
    assert {type(b.module).__name__ for b in blocks} == {"Llama4TextMLP"}  # the shared experts
    assert {s.class_name for s in skipped} == {"Llama4TextExperts"}
    assert "stacked experts" in skipped[0].reason


def written(activation, form: str = "gated") -> nn.Module:
    """A block with no child for its activation."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w2, self.w3, self.w1 = nn.Linear(20, 8), nn.Linear(8, 20), nn.Linear(8, 20)
            if form == "plain":
                del self.w3

        def forward(self, x):
            a = activation(self.w1(x))
            return self.w2(a if form == "plain" else a * self.w3(x))

    return Written()


@pytest.mark.parametrize("form", ["gated", "plain"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_pytorch_tanh", lambda p: torch.nn.functional.gelu(p, approximate="tanh")),
        ("relu2", lambda p: torch.square(torch.relu(p))),
    ],
)
def test_an_activation_that_is_written_into_the_forward(name, function, form) -> None:
    module = written(function, form)
    roles = recognise(module)
    assert roles is not None
    assert (roles.written, roles.form, roles.down) == (name, form, "w2")
    x = torch.randn(2, 8)
    expected = module(x)
    original = SparseMLP(module, roles, roles.activation(module))
    assert torch.equal(original(x), expected)
    changed = SparseMLP(module, roles, nn.ReLU())
    other = written(torch.relu, form)
    other.load_state_dict(module.state_dict())
    assert torch.equal(changed(x), other(x))
    assert changed.restore() is module
    assert module._modules.keys() == other._modules.keys()
    block = Block("mlp", module, roles)
    with pytest.raises(ValueError, match="site='p' of a stock Written cannot be watched"):
        block.watch("p", lambda *_: None)


def test_a_function_of_ours_that_is_written_into_the_forward_is_not_known() -> None:
    assert recognise(written(lambda p: torch.sigmoid(p) * p.abs())) is None


def test_a_sequential_is_a_plain_block() -> None:
    module = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))
    roles = recognise(module)
    assert roles is not None
    assert (roles.form, roles.act, roles.down) == ("plain", "1", "2")
    x = torch.randn(2, 8)
    assert torch.equal(SparseMLP(module, roles, nn.ReLU())(x), module(x))
    for more in (nn.Dropout(), nn.LayerNorm(8)):
        assert recognise(nn.Sequential(*module, more)) is None
