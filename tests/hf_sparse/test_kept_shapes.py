"""Which modules that run their MLP themselves are recognised, and what looks like one and is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse.adapters import Block, find_blocks
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.probe_kept import recognise_kept

D, N = 8, 20


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(D)
        self.a = nn.Linear(N, D)
        self.b = nn.Linear(D, N)
        self.c = nn.Linear(D, N)
        self.f = nn.GELU()
        self.drop = nn.Dropout(0.1)

    def attend(self, x):
        return x + self.attention(x)[0]

    def forward(self, x, mask):
        x = self.attend(x)
        return x + self.a(self.drop(self.f(self.b(self.norm(x)))))


class GatedLayer(Layer):
    def forward(self, x, mask):
        x = self.attend(x)
        return x + self.a(self.f(self.b(self.norm(x))) * self.c(self.norm(x)))


class Clamped(GatedLayer):
    def forward(self, x):
        return self.a(self.f(self.b(x).clamp(max=7)) * self.c(x).clamp(-7, 7))


class WithResidual(Layer):
    def forward(self, x, residual):
        return self.a(self.f(self.b(x))) + residual


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, h):
        return self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


class NormedBeforeDown(GatedLayer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = RMSNorm()

    def forward(self, x):
        return self.a(self.inner(self.f(self.b(x)) * self.c(x)))


class Half(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, act: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(fan_in, fan_out)
        if act:
            self.act = nn.GELU()

    def forward(self, x, residual=None):
        return self.act(self.dense(x)) if residual is None else self.dense(x) + residual


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.first, self.last = Attention(), Half(D, N, True), Half(N, D, False)

    def forward(self, x):
        x = self.attention(x)[0]
        return self.last(self.first(x), x)


class FusedWithAdapters(nn.Module):
    """As Zamba2, each layer of which adds its own product of two small matrices to one shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(D, 2 * N)
        self.adapters = nn.ModuleList([nn.Sequential(nn.Linear(D, 2), nn.Linear(2, 2 * N))])
        self.act = nn.SiLU()
        self.down = nn.Linear(N, D)

    def forward(self, x):
        up, gate = (self.both(x) + self.adapters[0](x)).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


FOUND = {
    Layer: (("b",), None, "f", "a"),
    GatedLayer: (("b", "c"), None, "f", "a"),
    Clamped: (("b", "c"), None, "f", "a"),
    WithResidual: (("b",), None, "f", "a"),
    NormedBeforeDown: (("b", "c"), None, "f", "a"),
    Split: (("first.dense",), None, "first.act", "last.dense"),
    FusedWithAdapters: (("both",), "up first", "act", "down"),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_roles_come_from_what_flows_where(kind, device) -> None:
    with torch.device(device):
        module = kind()
        roles = recognise_kept(module)
    assert isinstance(roles, Kept)
    assert (roles.first, roles.halves, roles.act, roles.down) == FOUND[kind]
    block = Block("layer", module, roles)
    assert (block.hidden_size, block.intermediate_size) == (D, N)
    *first, down = [tuple(weight.shape) for weight, _ in block.weights()]
    assert (first, down) == ([(N, D)] * (1 if roles.form == "plain" else 2), (D, N))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = WithResidual()

    def forward(self, x):
        return self.mlp(x, x)


def test_the_innermost_module_has_the_mlp() -> None:
    assert recognise_kept(Around()) is None
    assert recognise_kept(Around().mlp) is not None


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, N), nn.GELU(), nn.Linear(N, D)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class WithAnother(Split):
    """A layer with an MLP of its own and one that is a module, whose name begins alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first_of_all = Plain()

    def forward(self, x):
        return super().forward(self.first_of_all(x))


def test_a_layer_that_stays_may_have_other_blocks() -> None:
    blocks, skipped = find_blocks(nn.ModuleList([WithAnother()]))
    assert [(block.name, block.stays) for block in blocks] == [("0", True), ("0.first_of_all", False)]
    assert not skipped


def test_recognising_leaves_weights_hooks_and_random_state_alone() -> None:
    layer = Split()
    calls: list[object] = []
    for module in layer.modules():
        module.register_forward_hook(lambda *args: calls.append(args))
    weights = {name: p.clone() for name, p in layer.named_parameters()}
    state = torch.get_rng_state()
    assert recognise_kept(layer) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    assert not calls
    assert all(torch.equal(p, weights[name]) for name, p in layer.named_parameters())


class GateOfAttention(Layer):
    """``out(attention(x) * act(gate(x)))``, as gated attention has it: no neuron of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(D, N)

    def mixed(self, x):
        w = self.c(x)
        return F.scaled_dot_product_attention(w, w, self.wide(x))

    def forward(self, x):
        return self.a(self.mixed(x) * self.f(self.b(x)))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, N), nn.Linear(N, N))
        self.other = Attention()

    def forward(self, x):
        return self.inner(x)


class GateOfSomethingThatDoesNotRun(GateOfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.core = Wide()

    def mixed(self, x):
        return self.core(self.c(x))


class Mixer(Layer):
    """Tokens see earlier ones between the activation and the last layer."""

    def forward(self, x):
        a = self.f(self.b(x))
        return self.a(a * a.cumsum(-2))


class MixerBefore(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x).cumsum(-2)))


class MixerOfGate(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x)) * self.c(x).roll(1, -2))


class LayerNormed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(N)

    def forward(self, x):
        return self.a(self.inner(self.f(self.b(x))))


class Twice(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x)) * self.f(self.c(x)))


class TwiceDown(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x))) + self.a(self.c(x))


class Added(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x)) + self.c(x))


class Turned(Layer):
    """Neuron j of the activation is not neuron j of the down projection."""

    def forward(self, x):
        return self.a(self.f(self.b(x)).roll(1, -1))


class OtherActivation(Layer):
    def forward(self, x):
        return self.a(F.relu(self.b(x))) + self.f(x)


class ReadsTheWeight(Layer):
    def forward(self, x):
        return self.a(self.f(self.b(x)).to(self.a.weight.dtype))


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.act, self.down = nn.Linear(D, 2 * N), nn.SiLU(), nn.Linear(N, D)

    def forward(self, x):
        both = self.both(x)
        return self.down(self.act(both[..., ::2]) * both[..., 1::2])


class WithParameters(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.PReLU(N)

    def forward(self, x):
        return self.a(self.f(self.b(x).transpose(1, 2)).transpose(1, 2))


class TwoMLPs(GatedLayer):
    """A name would not tell which of the two is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = nn.ReLU(), nn.Linear(N, D)

    def forward(self, x):
        return self.a(self.f(self.b(x))) + self.d(self.g(self.c(x)))


class ScaledByTheInput(Layer):
    """As a gate on something that comes from elsewhere: Gemma-3n's embeddings of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, input_of_layer):
        return self.a(self.f(self.b(x)) * input_of_layer)


class Fails(Layer):
    def forward(self, x):
        raise KeyError("not without a cache")


@pytest.mark.parametrize(
    "kind",
    [
        GateOfAttention,
        GateOfSomethingThatDoesNotRun,
        Mixer,
        MixerBefore,
        MixerOfGate,
        LayerNormed,
        Twice,
        TwiceDown,
        Added,
        Turned,
        OtherActivation,
        ReadsTheWeight,
        Interleaved,
        WithParameters,
        TwoMLPs,
        ScaledByTheInput,
        Fails,
    ],
)
def test_what_only_looks_like_it_is_refused(kind) -> None:
    assert recognise_kept(kind()) is None
